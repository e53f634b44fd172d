"""The fields of a `VideoRequest` that clients give: what each may hold, and how a form says it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter

from cineline.core.request import IMAGES, VideoRequest
from cineline.errors import shown
from cineline.server.refusal import Refusal, invalid

NOT_OFFERED = (*IMAGES, "decode")
"""Images come along, and a video is always wanted."""

MOST_DIGITS = 30
"""Of a number in a form: more than any has that can be used."""


def _alternatives(name: str) -> list[dict[str, Any]]:
    """JSON schemas, of which a field's value has one; null is as good as leaving it out."""
    hint: Any = VideoRequest.model_fields[name].annotation
    schema = TypeAdapter(hint).json_schema()
    return [each for each in schema.get("anyOf", [schema]) if each.get("type") != "null"]


OFFERED: Mapping[str, Sequence[Mapping[str, Any]]] = {
    name: _alternatives(name) for name in VideoRequest.model_fields if name not in NOT_OFFERED
}
"""The fields that a client may give, with the JSON schemas of their values."""


LISTS: Mapping[str, str] = {
    name: each["items"]["type"] for name, schemas in OFFERED.items() for each in schemas if each.get("type") == "array"
}
"""Of these, those that hold several values, with the type of each."""


def listed(name: str) -> str | None:
    """The list that a form's field is an item of, called so or as OpenAI's client does it, NAME[]; None for others."""
    base = name.removesuffix("[]")
    return base if base in LISTS else None


def typed(texts: Mapping[str, str], lists: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The fields of a form, whose values are all texts, as their types want them.

    Args:
        lists: the items of those that hold several.

    Raises:
        Refusal: one that cannot be read.
    """
    return {name: _value(name, text) for name, text in texts.items()} | {
        name: _values(name, items) for name, items in lists.items()
    }


def _values(name: str, items: Sequence[str]) -> Any:
    """A row of numbers may be one text, which the request reads."""
    if LISTS[name] == "string":
        return list(items)
    return items[0] if len(items) == 1 else [READERS[LISTS[name]](name, item) for item in items]


def _value(name: str, text: str) -> Any:
    schemas = OFFERED.get(name, ())
    if any(text == each.get("const") or text in each.get("enum", ()) for each in schemas):
        return text
    kinds = [each["type"] for each in schemas if each.get("type") in READERS]
    return READERS[kinds[0]](name, text) if kinds else text


def _number(name: str, text: str, read: Callable[[str], float]) -> float:
    try:
        number = read(text) if len(text) < MOST_DIGITS else float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise _unread(name, text, "number")
    return number


def _truth(name: str, text: str) -> bool:
    if text not in ("true", "false"):
        raise _unread(name, text, "true or false")
    return text == "true"


def _unread(name: str, text: str, what: str) -> Refusal:
    return invalid(f"{name}={shown(text)} is no {what}: give one.", name)


READERS: Mapping[str, Callable[[str, str], Any]] = {
    "integer": lambda name, text: _number(name, text, int),
    "number": lambda name, text: _number(name, text, float),
    "boolean": _truth,
}
"""Of a form's texts, by the type of JSON."""
