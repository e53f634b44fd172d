"""Benchmarks: what is measured, apart from the command line that asks for it."""
