"""Options' texts to values, shared by the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cineline.config import AXES, Dtype, ExpertPlacement, ParallelConfig
from cineline.errors import InvalidConfig

Json = Annotated[Path | None, typer.Option("--json", help="Also write the result there.", show_default=False)]


def dtype_of(name: str, value: str | None) -> Dtype | None:
    """A dtype by its name.

    Raises:
        InvalidConfig: it is none that Cineline computes in.
    """
    if value == "float32":
        return "float32"
    if value == "bfloat16":
        return "bfloat16"
    if value is None:
        return None
    raise InvalidConfig(f"{name}={value!r} is not supported: use float32 or bfloat16.")


def placement_of(value: str) -> ExpertPlacement:
    """An expert placement by its name.

    Raises:
        InvalidConfig: there is no such one.
    """
    if value == "shared":
        return "shared"
    if value == "split":
        return "split"
    raise InvalidConfig(f"expert_placement={value!r} is not known: use shared or split.")


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


def whole_numbers(name: str, text: str) -> list[int]:
    """Positive whole numbers separated by commas.

    Raises:
        InvalidConfig: there is something else between the commas.
    """
    numbers = [part.strip() for part in text.split(",")]
    if not all(number.isascii() and number.isdigit() and int(number) for number in numbers):
        raise InvalidConfig(f"{name}={text!r} is no list of whole numbers above 0: write it as 5,2,1.")
    return [int(number) for number in numbers]
