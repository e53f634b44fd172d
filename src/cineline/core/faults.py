"""Faults on purpose: what a rank is to do wrong, and when. Off unless the environment asks for them.

For tests of how the engine takes failures. `rank.faults` does them. A slow disk is a delay at load.
"""

from __future__ import annotations

import logging
import os
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from cineline.core.request import WorkItem
from cineline.errors import InvalidConfig, shown

log = logging.getLogger(__name__)

VARIABLE = "CINELINE_FAULTS"
"""Of the environment: a JSON list of faults."""

EXAMPLE = '[{"do": "kill", "rank": 1, "at": "before", "kind": "denoise", "number": 2}]'

Moment = Literal["load", "admit", "take", "before", "after", "finish", "give", "answer"]
"""Before the weights are loaded; before a request is admitted; before a value is taken in, given out, or answered with;
before and after an item is computed; after a solver step."""

Number = Annotated[int, Field(ge=0)]

UNKNOWN = {"load": ("kind", "request", "number", "branch"), "admit": ("kind", "number", "branch")}
"""Fields that say nothing at a moment, for it is not an item's."""

SPOILS = ("after", "finish")
"""Moments at which something has been made."""


class Fault(BaseModel):
    """One thing that goes wrong on one rank. A field left out (None) fits all.

    Attributes:
        do: kill, stop: SIGKILL, SIGSTOP to the own process. exit: end it. raise: an error. delay: sleep. nan, inf: one
            NaN or infinity in what was made. memory: an allocation that the rank's device refuses. hang_up: nothing
            more reaches the engine, the process goes on. cut: its other TCP connections, and with them its edges, are
            shut down.
        rank: that does it. at: the moment.
        kind, number, branch: of the item, which is the maker where a value is taken or given. request: the job's id.
        seconds: of a delay.
        times: how often; the first moments that fit count.
        start: of the ranks, from 0: a fault of one start is none of the next.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    do: Literal["kill", "stop", "exit", "raise", "delay", "nan", "inf", "memory", "hang_up", "cut"]
    rank: Number
    at: Moment
    kind: Literal["text", "encode", "denoise", "decode"] | None = None
    request: Number | None = None
    number: Number | None = None
    branch: Literal["cond", "uncond"] | None = None
    seconds: Annotated[float, Field(ge=0, le=86400)] | None = None
    times: Annotated[int, Field(ge=1)] = 1
    start: Number = 0

    @model_validator(mode="after")
    def _can_happen(self) -> Fault:
        if self.do == "delay" and self.seconds is None:
            raise ValueError("do='delay' has no seconds: give some")
        if self.do != "delay" and self.seconds is not None:
            raise ValueError(f"seconds={shown(self.seconds)} is for do='delay', not '{self.do}': leave it out")
        if self.do in ("nan", "inf") and self.at not in SPOILS:
            raise ValueError(f"at='{self.at}' has nothing for do='{self.do}' to spoil: use {' or '.join(SPOILS)}")
        for field in UNKNOWN.get(self.at, ()):
            if (value := getattr(self, field)) is not None:
                raise ValueError(f"{field}={shown(value)} is not known at='{self.at}': leave it out")
        return self

    def fits(self, at: Moment, request: int | None = None, item: WorkItem | None = None) -> bool:
        """Whether this is its moment. The items of scripts are all of request 0, so that it is given beside."""
        wanted: list[str | int | None] = [self.request]
        here: list[str | int | None] = [request]
        if item is not None:
            wanted += self.kind, self.number, self.branch
            here += item.kind.name.lower(), item.number, item.branch.name.lower()
        return self.at == at and all(one in (None, other) for one, other in zip(wanted, here, strict=True))

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self if value is not None)


_FAULTS = TypeAdapter(tuple[Fault, ...])


def planned() -> tuple[Fault, ...]:
    """What the environment asks for.

    Raises:
        InvalidConfig: it is no list of faults.
    """
    text = os.environ.get(VARIABLE, "").strip()
    try:
        faults = _FAULTS.validate_json(text) if text else ()
    except ValidationError as error:
        raise InvalidConfig(f"{VARIABLE}{_first_sentence(error, text)}") from None
    if faults:
        log.warning("%s: faults on purpose: %s.", VARIABLE, "; ".join(map(str, faults)))
    return faults


def _first_sentence(error: ValidationError, text: str) -> str:
    first = error.errors()[0]
    place, field = first["loc"][:1], ".".join(str(part) for part in first["loc"][1:2])
    if not place or first["type"] == "model_type":
        return f"={shown(text)} is no JSON list of faults: give one such as {EXAMPLE}."
    if first["type"] == "extra_forbidden":
        known = ", ".join(Fault.model_fields)
        return f": fault {place[0]} has an unknown field {shown(field)}: the fields are {known}."
    if first["type"] == "missing":
        return f": fault {place[0]} has no {shown(field)}: give one."
    if not field:
        return f": of fault {place[0]}, {first['msg'].removeprefix('Value error, ')}."
    rule = first["msg"].replace("Input should be", "give")
    return f": {field}={shown(first['input'])} of fault {place[0]} cannot be used: {rule}."
