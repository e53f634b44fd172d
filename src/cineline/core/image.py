"""Images that a request brings along."""

from __future__ import annotations

import re
from pathlib import Path

from PIL import Image, ImageOps

from cineline.errors import InvalidRequest, reason, shown

DEEP = ("I;16", "I;16B", "I;16L", "I;16N")
"""Modes of 16-bit grey, which Pillow would clip at 255 on the way to RGB."""

WHITELESS = ("I", "F")
"""Modes whose values say nothing of where white is: 255, 65535, 1.0 or another; but see `_is_deep`."""

ADDRESS = re.compile(r"(https?|ftp|s3|gs|data|file):", re.IGNORECASE)
"""How a path begins that is none."""


def load_image(image: Path | Image.Image) -> Image.Image:
    """The image in RGB and upright, as diffusers' `load_image` makes it.

    16-bit grey keeps its upper 8 bits, as Pillow has it with 16-bit colour; in diffusers nearly all of it is white.

    Raises:
        InvalidRequest: the file is missing or no image, it has no pixels, or no white that is known.
    """
    if isinstance(image, Path) and ADDRESS.match(str(image)):
        raise InvalidRequest(f"image={shown(image)} is an address, and nothing is downloaded: give a file.")
    named = called(image)
    try:
        opened = Image.open(image) if isinstance(image, Path) else image
        upright = ImageOps.exif_transpose(opened)
        if _is_deep(opened):
            upright = upright.convert("I").point(lambda value: value * (1 / 256)).convert("L")
        if upright.mode in WHITELESS:
            raise InvalidRequest(
                f"{named} has 32-bit values (mode {upright.mode!r}), and which of them is white is not known: give "
                "one of 8 or 16 bits a channel, such as a PNG."
            )
        if isinstance(upright.info.get("transparency"), bytes):  # the same colours, without a warning on the way
            upright = upright.convert("RGBA")
        loaded = upright.convert("RGB")
    except InvalidRequest:
        raise
    except Exception as error:  # a broken file's decoder may raise anything
        raise InvalidRequest(f"{named} cannot be read ({reason(error)}): give a PNG or JPEG file.") from None
    if not (loaded.width and loaded.height):
        raise InvalidRequest(f"{named} has {loaded.width}x{loaded.height} pixels: give one that is not empty.")
    return loaded


def called(image: Path | Image.Image) -> str:
    """What a sentence about it begins with: its path, where it has one."""
    return f"image={shown(image)}" if isinstance(image, Path) else "The image"


def _is_deep(opened: Image.Image) -> bool:
    """Whether it is 16-bit grey: Pillow has that of a PGM in 32 bits, with 65535 for white whatever the file's is."""
    return opened.mode in DEEP or (opened.mode == "I" and opened.format == "PPM")
