"""Benchmarks."""

import typer

app = typer.Typer()
