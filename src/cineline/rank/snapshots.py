"""A request's state for the engine, step by step, and back from there where the request begins anew."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from cineline.core.control import KeepSnapshot, Snapshot
from cineline.core.request import Group, Kind
from cineline.families import snapshot
from cineline.families.pipeline_parallel import PipelineParallelMixin, RequestState
from cineline.rank.guard import Guard
from cineline.rank.pace import Pace
from cineline.transport.queue import DeviceQueue


class Snapshots:
    """Takes a rank's snapshots, and goes on from them.

    Args:
        family: this rank's part of the model.
        every: solver steps from one to the next; 0 for none.
        device: its queue. pace: its distance.
        keep: has them sent.
    """

    def __init__(
        self, family: PipelineParallelMixin[Any], every: int, device: DeviceQueue, pace: Pace, keep: KeepSnapshot
    ) -> None:
        self._family = family
        self._every = every
        self._device = device
        self._pace = pace
        self._keep = keep

    def take(self, state: RequestState, group: Group, guard: Guard) -> None:
        """Behind a group that this rank answers for: where it is a step after which one is due, have it kept when the
        device has got to here, and nothing was spoiled. None is due after the last step: a request that decodes is
        begun anew before that. Nor before a step that is skipped, so that what that would need is in none: it is taken
        before the next one that is computed."""
        done, skipped = group.number + 1, state.job.skipped
        if not self._every or group.kind is not Kind.DENOISE or done >= state.job.steps or done in skipped:
            return
        last = max(step for step in range(done) if step == 0 or step not in skipped)
        if done // self._every == last // self._every:
            return
        exported = snapshot.mapped(self._family.export(state), self._device.to_host)
        expert = self._family.expert(state, done)
        written = partial(_written, group.request, done, expert, exported)
        self._pace.after(lambda: None if guard.spoiled else self._keep(group.request, written))

    def restore(self, state: RequestState, resume: bytes) -> None:
        """Go on from a snapshot, where this rank has latents."""
        if state.latents is not None:
            self._family.restore(state, snapshot.mapped(snapshot.read(resume), self._device.to_device))


def _written(request: int, step: int, expert: int, exported: Mapping[str, Any]) -> Snapshot:
    return Snapshot(request, step, expert, snapshot.write(exported))
