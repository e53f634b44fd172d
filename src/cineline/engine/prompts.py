"""How many prompts' embeddings fit into so many bytes."""

from __future__ import annotations

import re

from cineline.core.config import Dtype
from cineline.core.family import FamilySpec, PromptedFamily
from cineline.errors import InvalidConfig, shown

PROMPT_CACHE = "256MB"

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

SIZE = re.compile(r"([0-9]{1,15})\s*([KMG]I?B)?", re.ASCII | re.IGNORECASE)


def prompts_in(spec: FamilySpec, dtype: Dtype, size: int | str) -> int:
    """Embeddings of this model; 0 where its family keeps none.

    Raises:
        InvalidConfig: it is no size.
    """
    found = SIZE.fullmatch(str(size).strip()) if isinstance(size, (int, str)) and not isinstance(size, bool) else None
    if found is None:
        raise InvalidConfig(f"prompt_cache={shown(size)} is no size: give bytes, such as 256MB, or 0 for none.")
    nbytes = int(found[1]) * UNITS[(found[2] or "").upper()]
    return nbytes // spec.prompt_bytes(dtype) if isinstance(spec, PromptedFamily) else 0
