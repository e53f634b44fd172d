"""What a file says of itself: text in the ordinary field of its container.

That is the comment of MP4, Matroska, PNG and GIF, the EXIF description of WebP and JPEG, the metadata of safetensors.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cineline.core.output import LATENT_SUFFIXES, STILL_SUFFIXES, VIDEO_SUFFIXES
from cineline.errors import OutputError, reason, shown

log = logging.getLogger(__name__)

PNG_KEYWORD = "Comment"
DESCRIPTION = 0x010E
"""EXIF's ImageDescription, which is ASCII."""

TENSORS_KEY = "cineline"

MOV_LIMIT = 60_000
"""Characters of a MOV's comment, whose size has 16 bits."""

EXIF_LIMIT = 60_000
"""Bytes of a JPEG's EXIF, which takes 64 KiB."""

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif")


def picture_options(path: Path, about: str | None) -> dict[str, Any]:
    """What Pillow's `save` is to be given so that a picture or an animation says it."""
    suffix = path.suffix.lower()
    if about is None:
        return {}
    if suffix == ".png":
        info = PngInfo()
        info.add_text(PNG_KEYWORD, about)
        return {"pnginfo": info}
    if suffix == ".gif":
        return {"comment": about.encode()}
    if suffix != ".webp" and len(about) > EXIF_LIMIT:
        log.warning("%s does not say what made it: a JPEG has no room for so long a prompt.", path.name)
        return {}
    exif = Image.Exif()
    exif[DESCRIPTION] = about
    return {"exif": exif.tobytes()}


def read_about(path: Path) -> dict[str, Any]:
    """What a file of Cineline's says of itself.

    Raises:
        OutputError: it cannot be read, or says nothing.
    """
    known = (*VIDEO_SUFFIXES, *STILL_SUFFIXES, *LATENT_SUFFIXES)
    if path.suffix.lower() not in known:
        raise OutputError(f"{shown(path)} ends in {shown(path.suffix)}: give a file in {' or '.join(known)}.")
    try:
        text = _text(path)
    except Exception as error:  # a broken file's decoder may raise anything
        raise OutputError(
            f"{shown(path)} cannot be read ({reason(error)}): give a file that Cineline has made."
        ) from None
    try:
        about = json.loads(text or "null")
    except (ValueError, RecursionError):
        about = None
    if not _is_about(about):
        raise OutputError(
            f"{shown(path)} does not say what made it: it is not Cineline's, was made with --no-metadata, or another "
            "program has changed it."
        )
    return about  # type: ignore[no-any-return]


def _is_about(about: Any) -> bool:
    """Whether it has the shape that `engine.about` gives it."""
    if not (isinstance(about, dict) and isinstance(about.get("request"), dict)):
        return False
    images, model = about.get("images") or {}, about.get("model") or {}
    if not (isinstance(images, dict) and isinstance(model, dict)):
        return False
    lists = [model.get(name) or [] for name in ("files", "loras")]
    return all(isinstance(one, list) and all(isinstance(text, str) for text in one) for one in lists)


def _text(path: Path) -> str | None:
    suffix = path.suffix.lower()
    if suffix in LATENT_SUFFIXES:
        from safetensors import safe_open

        with safe_open(path, framework="np") as tensors:
            return (tensors.metadata() or {}).get(TENSORS_KEY)
    if suffix not in PICTURES:
        import av

        with av.open(str(path)) as container:
            return next((text for key, text in container.metadata.items() if key.lower() == "comment"), None)
    with Image.open(path) as picture:
        comment = picture.info.get(PNG_KEYWORD) or picture.info.get("comment") or picture.getexif().get(DESCRIPTION)
    return comment.decode(errors="replace") if isinstance(comment, bytes) else comment
