"""A checkpoint's config files (no torch)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cineline.errors import CheckpointError, reason, shown


def read_json(path: Path, rule: str) -> dict[str, Any]:
    """The object in a config file; `rule` says why it should be there.

    Raises:
        CheckpointError: it is missing, or holds no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise CheckpointError(f"{shown(path)} does not exist ({rule}): check the model's path.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{shown(path)} cannot be read ({reason(error)}): download it again.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{shown(path)} holds no JSON object: download it again.")
    return value
