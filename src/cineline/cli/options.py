"""Options' texts to values, shared by the commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console

from cineline.core.config import AXES, ParallelConfig
from cineline.core.output import check_output
from cineline.errors import InvalidConfig


def _json_file(path: Path | None) -> Path | None:
    if path is not None:
        check_output(path, (".json",))
    return path


Json = Annotated[
    Path | None,
    typer.Option("--json", help="Also write the result there.", show_default=False, callback=_json_file),
]
Runs = Annotated[int, typer.Option(help="Runs of each arm, interleaved.", min=1)]
InFlight = Annotated[str, typer.Option(help="Requests at once, M, such as 1,3.")]
DtypeName = Annotated[str, typer.Option("--dtype", help="float32 or bfloat16.")]


def teller() -> Callable[[str], None]:
    """Prints a line on the side, where no result goes."""
    console = Console(stderr=True)
    return lambda text: console.print(text, highlight=False)


def one_of(name: str, value: str, known: Any) -> Any:
    """The value, if it is one of a `Literal`'s.

    Raises:
        InvalidConfig: it is none.
    """
    if value not in get_args(known):
        raise InvalidConfig(f"{name}={value!r} is not known: use {' or '.join(get_args(known))}.")
    return value


def axes_of(name: str, text: str) -> ParallelConfig:
    """Axes and their sizes, such as pp=2,cfg=2.

    Raises:
        InvalidConfig: an unknown axis, or a size that is no number.
    """
    sizes: dict[str, Any] = {}
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in AXES or not (size.isascii() and size.isdigit()):
            raise InvalidConfig(f"{name}={text!r}: write axes as pp=2,cfg=2; they are {', '.join(AXES)}.")
        sizes[axis] = int(size)
    return ParallelConfig(**sizes)


def whole_numbers(name: str, text: str, least: int = 1) -> list[int]:
    """Whole numbers, none below `least`, separated by commas.

    Raises:
        InvalidConfig: there is something else between the commas.
    """
    numbers = [part.strip() for part in text.split(",")]
    if not all(number.isascii() and number.isdigit() and int(number) >= least for number in numbers):
        raise InvalidConfig(f"{name}={text!r} is no list of whole numbers from {least} on: write it as 5,2,1.")
    return [int(number) for number in numbers]
