"""Embeddings of prompts that a head keeps for later requests, as their jobs say (`schedule.prompts`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cineline.core.request import Branch, Job, PromptKey
from cineline.schedule.prompts import keys_of


@dataclass
class Slot:
    """A prompt's embedding, from when it has been made on."""

    embedding: torch.Tensor | None = None


class Prompts:
    """A head's.

    Args:
        lines: see `keys_of`.
    """

    def __init__(self, lines: int) -> None:
        self._lines = lines
        self._slots: dict[PromptKey, Slot] = {}

    def admit(self, job: Job, branches: Sequence[Branch]) -> dict[Branch, Slot]:
        """The slots of a request's branches, in the order of admission: those that it finds are filled before it needs
        them, those of others it fills itself. None where nothing is to be kept."""
        if job.prompts is None:
            return {}
        keys = keys_of(job, self._lines)
        for branch in branches:
            if branch not in job.prompts.found:
                self._slots[keys[branch]] = Slot()
        own = {branch: self._slots[keys[branch]] for branch in branches}
        for key in job.prompts.gone:
            self._slots.pop(key, None)
        return own

    @staticmethod
    def embedding(slots: dict[Branch, Slot], branch: Branch, made: dict[Branch, torch.Tensor]) -> torch.Tensor:
        """Of a request's branch: what has been made for it, of which a copy is kept, or what was kept."""
        slot = slots.get(branch)
        if slot is None:
            return made[branch]
        if branch in made:
            slot.embedding = made[branch].clone()  # it is lent
        assert slot.embedding is not None, "its request comes first in the stream"
        return slot.embedding
