"""Which prompts' embeddings the line's heads keep, so that none is made twice (no torch).

The scheduler decides it, in the order of the stream; heads do as the jobs say (`families.prompts`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace

from cineline.core.request import Branch, Job, PromptKey, Remembered


def keys_of(job: Job, lines: int) -> Mapping[Branch, PromptKey]:
    """What each branch's embedding goes by: the line whose head has it, and the text.

    Args:
        lines: that run a branch each, or both branches where there is one.
    """
    texts = {Branch.COND: job.prompt, Branch.UNCOND: job.negative_prompt}
    return {Branch(branch): (branch if lines > 1 else 0, texts[Branch(branch)]) for branch in range(job.branches)}


class PromptCache:
    """The least recently used go first.

    A request whose prompt is being made for another waits until that is sure to come first: until what makes
    conditioning of it has been emitted.

    Args:
        entries: embeddings that each head keeps; 0 for none. lines: see `keys_of`.
    """

    def __init__(self, entries: int, lines: int) -> None:
        self._entries = entries
        self._lines = lines
        self._known: OrderedDict[PromptKey, None] = OrderedDict()
        self._made_by: dict[int, list[PromptKey]] = {}
        self._underway: dict[PromptKey, int] = {}
        self._gone: list[PromptKey] = []

    def awaits(self, job: Job) -> bool:
        """Whether one of its prompts is being made for another request."""
        return self._entries > 0 and any(key in self._underway for key in keys_of(job, self._lines).values())

    def settle(self, job: Job) -> Job:
        """The job as it is admitted: with the prompts that it finds, and those that heads forget."""
        if not (self._entries and job.texts):
            return job
        keys = keys_of(job, self._lines)
        found = [branch for branch, key in keys.items() if key in self._known]
        if Branch.UNCOND in keys and keys[Branch.COND] == keys[Branch.UNCOND] and not found:
            found = [Branch.UNCOND]  # made for the first branch
        if self._lines > 1 and len(found) < len(keys):
            found = []  # the lines do it together, or not at all
        made = [key for branch, key in keys.items() if branch not in found]
        self._made_by[job.id] = made
        for key in made:
            self._underway[key] = job.id
        for key in keys.values():
            self._known[key] = None
            self._known.move_to_end(key)
        lines = min(self._lines, job.branches)  # a second line hears nothing of a request without guidance
        waiting = [key for key in self._gone if key not in self._known]
        gone, self._gone = [key for key in waiting if key[0] < lines], [key for key in waiting if key[0] >= lines]
        for line in range(lines):
            of_line = [key for key in self._known if key[0] == line]
            gone += of_line[: max(0, len(of_line) - self._entries)]
        for key in gone:
            self._known.pop(key, None)
        return replace(job, prompts=Remembered(tuple(found), tuple(gone)))

    def encoded(self, request: int) -> None:
        """What makes its conditioning has been emitted: whatever is emitted from now on finds its prompts."""
        for key in self._made_by.get(request, ()):
            self._underway.pop(key, None)

    def forget(self, request: int) -> None:
        """It has been cancelled, maybe before its prompts were made, or because what was made was not finite."""
        self.encoded(request)
        for key in self._made_by.pop(request, ()):
            if key in self._known:
                del self._known[key]
                self._gone.append(key)

    def end(self, request: int) -> None:
        """It is done."""
        self._made_by.pop(request, None)
