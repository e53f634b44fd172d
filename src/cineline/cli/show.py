"""`cineline show`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from cineline.core.request import IMAGES, VideoRequest
from cineline.core.streams import console

LINE = set(VideoRequest.model_fields) - set(IMAGES)
"""What a line of requests has; no file's place, which a stranger's file could name."""

NOT_SETTINGS = ("name", "identity", "files", "loras", "lora_mode")
"""Of a model: what has a sentence of its own."""


def show(
    file: Annotated[Path, typer.Argument(help="A video, a picture or latents that Cineline has made.")],
) -> None:
    """Print the request that made a file, as a line for generate --requests.

    On the side it says the model, its LoRAs, and the images that the request
    needs.
    """
    from cineline.media.about import read_about

    about = read_about(file)
    print(json.dumps({name: value for name, value in about["request"].items() if name in LINE}))
    aside = console(stderr=True)
    for words in _aside(about, about.get("model") or {}):
        aside.print(_harmless(words), markup=False, highlight=False, soft_wrap=True)


def _aside(about: Mapping[str, Any], model: Mapping[str, Any]) -> Iterator[str]:
    """A sentence of the model, and one of each other thing that the request needs."""
    settings = ", ".join(f"{name} {value}" for name, value in model.items() if name not in NOT_SETTINGS)
    named = model.get("name") or "a model without a public name"
    yield f"Made by Cineline {about.get('cineline')} with {named} (identity {model.get('identity')}): {settings}"
    if files := model.get("files"):
        yield f"It needs files of the model: {', '.join(map(_option, files))}"
    if loras := model.get("loras"):
        options = " ".join(f"--lora {shlex.quote(lora)}" for lora in loras)
        yield f"It needs LoRAs: {options} --lora-mode {model.get('lora_mode')}"
    for name, image in (about.get("images") or {}).items():
        yield f"It needs {_option(name)}, whose pixels are not in the file: size and SHA-256 {image}"


def _harmless(words: str) -> str:
    """A file may be anybody's, and a terminal does what control characters say."""
    return "".join(letter if letter.isprintable() else "?" for letter in words)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
