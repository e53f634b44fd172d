"""Images that a request brings along."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, NamedTuple

from PIL import Image, ImageOps

from cineline.errors import InvalidRequest, reason, shown

DEEP = ("I;16", "I;16B", "I;16L", "I;16N")
"""Modes of 16-bit grey, which Pillow would clip at 255 on the way to RGB."""

WHITELESS = ("I", "F")
"""Modes whose values say nothing of where white is: 255, 65535, 1.0 or another; but see `_is_deep`."""

Fit = Literal["stretch", "crop", "pad"]
"""What becomes of an image in another shape than the video's."""

ADDRESS = re.compile(r"(https?|ftp|s3|gs|data|file):", re.IGNORECASE)
"""How a path begins that is none."""


class KeyFrames(NamedTuple):
    """Frames that are given: RGB, upright.

    Attributes:
        first, last: of the video.
    """

    first: Image.Image
    last: Image.Image | None = None


def load_image(image: Path | Image.Image, name: str = "image") -> Image.Image:
    """The image in RGB and upright, as diffusers' `load_image` makes it.

    Args:
        name: of the request's field.

    16-bit grey keeps its upper 8 bits, as Pillow has it with 16-bit colour; in diffusers nearly all of it is white.

    Raises:
        InvalidRequest: the file is missing or no image, it has no pixels, or no white that is known.
    """
    if isinstance(image, Path) and ADDRESS.match(str(image)):
        raise InvalidRequest(f"{name}={shown(image)} is an address, and nothing is downloaded: give a file.")
    named = called(image, name)
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


def fitted(image: Image.Image, width: int, height: int, fit: Fit) -> Image.Image:
    """The image as the family is to take it, which resizes it to the video's size, as diffusers does, by Lanczos.

    crop: its middle, in the video's shape. pad: the whole, with black beside it. stretch: as it is.
    """
    if fit == "stretch" or image.width * height == image.height * width:
        return image
    resample = Image.Resampling.LANCZOS
    if fit == "crop":
        return ImageOps.fit(image, (width, height), resample)
    return ImageOps.pad(image, (width, height), resample, color="black")


def fitting(image: Image.Image, width: int, height: int, fit: Fit, name: str = "image") -> str:
    """What `fitted`, and whoever resizes, make of it, in words."""
    own = f"{name} {image.width}x{image.height}"
    shape = width * image.height / (height * image.width)
    if image.width * height == image.height * width:
        return own if (image.width, image.height) == (width, height) else f"{own} scaled"
    if fit == "crop":
        taken = round(image.width * min(1, shape)), round(image.height * min(1, 1 / shape))
        return f"{own} cropped to {taken[0]}x{taken[1]}"
    if fit == "pad":
        own_size = max(1, round(width * min(1, 1 / shape))), max(1, round(height * min(1, shape)))
        return f"{own} scaled to {own_size[0]}x{own_size[1]} and padded"
    times, side = (shape, "wide") if shape > 1 else (1 / shape, "high")
    return f"{own} stretched {times:.2f} times as {side}"


def fitted_frames(frames: KeyFrames, width: int, height: int, fit: Fit) -> tuple[KeyFrames, str]:
    """Each of them `fitted`, and in words, each behind a comma, what became of it."""
    there = [frame for frame in frames if frame is not None]
    names = ("image", "last image")
    words = "".join(f", {fitting(frame, width, height, fit, names[number])}" for number, frame in enumerate(there))
    return KeyFrames(*(fitted(frame, width, height, fit) for frame in there)), words


def called(image: Path | Image.Image, name: str = "image") -> str:
    """What a sentence about it begins with: its path, where it has one."""
    return f"{name}={shown(image)}" if isinstance(image, Path) else f"The {name.replace('_', ' ')}"


def _is_deep(opened: Image.Image) -> bool:
    """Whether it is 16-bit grey: Pillow has that of a PGM in 32 bits, with 65535 for white whatever the file's is."""
    return opened.mode in DEEP or (opened.mode == "I" and opened.format == "PPM")
