"""Libraries that a few commands need and the rest of the package does not: pyproject's optional dependencies."""

from __future__ import annotations

from importlib.util import find_spec

from cineline.errors import MissingLibrary

EXTRAS = {
    "accelerate": "bench",
    "fastapi": "serve",
    "gguf": "gguf",
    "matplotlib": "picture",
    "ray": "ray",
    "torchmetrics": "eval",
}
"""The extra that brings each."""


def need(library: str) -> None:
    """Look for one of `EXTRAS` without loading it.

    Raises:
        MissingLibrary: it is not installed.
    """
    if find_spec(library) is None:
        raise MissingLibrary(
            f'{library} is needed for this and not installed: run pip install "cineline[{EXTRAS[library]}]".'
        )
