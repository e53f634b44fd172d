"""Options from the configs' fields, and options' texts to values; shared by the commands."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from cineline.core.config import AXES, LEAST, ParallelConfig, texts_of
from cineline.core.output import check_output
from cineline.core.streams import console
from cineline.engine.prompts import PROMPT_CACHE
from cineline.errors import InvalidConfig, shown


def _json_file(path: Path | None) -> Path | None:
    if path is not None:
        check_output(path, (".json",))
    return path


Json = Annotated[
    Path | None,
    typer.Option("--json", help="Also write the result there.", show_default=False, callback=_json_file),
]
Runs = Annotated[int, typer.Option(help="Runs of each arm, interleaved.", min=1)]
FILES = "Files of the model"
"""The panel of --help that these are in."""

Lora = Annotated[
    list[str] | None,
    typer.Option(
        help="A LoRA, \\[NAME=]\\[high:|low:]FILE\\[@SCALE]; may be given again.",  # else rich takes these for styles
        rich_help_panel=FILES,
        show_default=False,
    ),
]
LoraWay = Annotated[
    str,
    typer.Option(
        "--lora-mode",
        help="merge: into the weights; runtime: requests name theirs (loras); merge.",
        rich_help_panel=FILES,
        show_default=False,
    ),
]
PromptCache = Annotated[
    str,
    typer.Option(
        help=f"Bytes of prompts' embeddings that are kept, so that none is made twice; {PROMPT_CACHE}.",
        rich_help_panel="The run",
        show_default=False,
    ),
]
InFlight = Annotated[str, typer.Option(help="Requests at once, M, such as 1,3.")]

KINDS = (bool, int, float, Path)
"""Of options; others are texts."""

MOST_DIGITS = 1000
"""Of a text that is read as a number: Python refuses longer ones."""

Given = dict[str, Any]
"""Values of fields by name."""


@dataclass(frozen=True)
class Fields:
    """In a command's `Annotated[Given, ...]`: an option for each of these fields stands in the parameter's place.

    Attributes:
        owner: whose fields: a config's, or `VideoRequest`'s.
        names: which; all that have a text where none is named.
        panel: of --help, where a text ends with the default.
        unset: fields that are left out of what is given unless their options are there, with what then holds.
        given: leave them all out so.
    """

    owner: type
    names: Sequence[str] = ()
    panel: str | None = None
    unset: Mapping[str, str] = field(default_factory=dict)
    given: bool = False

    def options(self) -> list[inspect.Parameter]:
        """As parameters that typer makes options of."""
        texts, hints = texts_of(self.owner), get_type_hints(self.owner)
        return [self._option(name, hints[name], texts[name]) for name in self.names or texts]

    def _option(self, name: str, hint: Any, text: str) -> inspect.Parameter:
        kind = str if _takes_words(hint) else next((each for each in KINDS if each in (hint, *get_args(hint))), str)
        default = None if name in self.unset else inspect.signature(self.owner).parameters[name].default
        held = self.unset.get(name, "")
        if self.panel and default is not None and kind is not bool:
            held = str(default)
        option = typer.Option(
            None if self.given else default,
            f"--{name.replace('_', '-')}",  # named, so that a bool has no --no- beside it
            help=f"{text}; {held}." if held else f"{text}.",
            rich_help_panel=self.panel,
            show_default=self.panel is None,
        )
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind | None)

    def take(self, values: Given) -> Given:
        """Take these fields out of a command's values, as the owner wants them, without those that are None."""
        hints = get_type_hints(self.owner)
        taken = {name: values.pop(name) for name in self.names or texts_of(self.owner)}
        return {name: _read(name, hints[name], value) for name, value in taken.items() if value is not None}


def _takes_words(hint: Any) -> bool:
    """Whether words stand there beside numbers, such as a seed's."""
    return any(get_origin(each) is Literal for each in get_args(hint))


def _read(name: str, hint: Any, value: Any) -> Any:
    if get_origin(hint) is Literal:
        return one_of(name, value, hint)
    if _takes_words(hint):
        digits = value.removeprefix("-")
        return int(value) if digits.isascii() and digits.isdigit() and len(digits) < MOST_DIGITS else value
    return whole_numbers(name, value, LEAST[name]) if name in LEAST else value


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer is to see it, with options in place of each parameter that has `Fields` beside it."""
    parameters = inspect.signature(command, eval_str=True).parameters.values()
    marks = {own.name: getattr(own.annotation, "__metadata__", (None,))[0] for own in parameters}
    groups = {name: mark for name, mark in marks.items() if isinstance(mark, Fields)}

    @wraps(command)
    def called(**values: Any) -> None:
        given = {name: group.take(values) for name, group in groups.items()}
        command(**given, **values)

    seen = [option for own in parameters for option in (groups[own.name].options() if own.name in groups else [own])]
    called.__signature__ = inspect.Signature(seen)  # type: ignore[attr-defined]
    return called


def teller() -> Callable[[str], None]:
    """Prints a line on the side, where no result goes."""
    aside = console(stderr=True)
    return lambda text: aside.print(text, highlight=False)


def one_of(name: str, value: str, known: Any) -> Any:
    """The value, if it is one of a `Literal`'s.

    Raises:
        InvalidConfig: it is none.
    """
    if value not in get_args(known):
        raise InvalidConfig(f"{name}={shown(value)} is not known: use {' or '.join(get_args(known))}.")
    return value


def axes_of(name: str, text: str) -> ParallelConfig:
    """Axes and their sizes, such as pp=2,cfg=2.

    Raises:
        InvalidConfig: an unknown axis, or a size that is no number.
    """
    sizes: dict[str, Any] = {}
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in AXES or not _is_number(size):
            raise InvalidConfig(f"{name}={shown(text)}: write axes as pp=2,cfg=2; they are {', '.join(AXES)}.")
        sizes[axis] = int(size)
    return ParallelConfig(**sizes)


def whole_numbers(name: str, text: str, least: int = 1) -> list[int]:
    """Whole numbers, none below `least`, separated by commas.

    Raises:
        InvalidConfig: there is something else between the commas.
    """
    numbers = [part.strip() for part in text.split(",")]
    if not all(_is_number(number) and int(number) >= least for number in numbers):
        raise InvalidConfig(f"{name}={shown(text)} is no list of whole numbers from {least} on: write it as 5,2,1.")
    return [int(number) for number in numbers]


def _is_number(text: str) -> bool:
    """Whether it is a whole number, of no more digits than any size has."""
    return text.isascii() and text.isdigit() and len(text) < 19
