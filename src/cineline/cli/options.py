"""Options' texts to values, shared by the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cineline.config import Dtype
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


def whole_numbers(name: str, text: str) -> list[int]:
    """Positive whole numbers separated by commas.

    Raises:
        InvalidConfig: there is something else between the commas.
    """
    numbers = [part.strip() for part in text.split(",")]
    if not all(number.isascii() and number.isdigit() and int(number) for number in numbers):
        raise InvalidConfig(f"{name}={text!r} is no list of whole numbers above 0: write it as 5,2,1.")
    return [int(number) for number in numbers]
