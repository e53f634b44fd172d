"""Benchmarks of Cineline's own parts, for who changes them (see README.md here); users have `cineline bench`."""
