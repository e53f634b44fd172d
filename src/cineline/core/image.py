"""Images that a request brings along."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageOps

from cineline.errors import InvalidRequest


def load_image(image: Path | Image.Image) -> Image.Image:
    """The image in RGB; a file is turned upright (as diffusers' `load_image` does).

    Raises:
        InvalidRequest: the file is missing or no image.
    """
    try:
        loaded = (ImageOps.exif_transpose(Image.open(image)) if isinstance(image, Path) else image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InvalidRequest(f"image={str(image)!r} cannot be read ({error}): give a PNG or JPEG file.") from None
    if not (loaded.width and loaded.height):
        raise InvalidRequest(f"The image has {loaded.width}x{loaded.height} pixels: give one that is not empty.")
    return loaded
