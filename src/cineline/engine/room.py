"""Refuses a request that the devices' memory cannot hold, by the planner's formulas, at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from cineline.core.config import DeviceConfig, ParallelConfig
from cineline.core.family import FamilySpec, PlannedFamily
from cineline.core.hardware import Device
from cineline.core.request import Job
from cineline.errors import InvalidRequest
from cineline.planning.hardware import LINKS

ANY_LINK = LINKS["pcie4"]
"""No bytes that are held depend on it."""


class Room:
    """What the line's devices can hold.

    Args:
        spec: the model's. parallel: how it is divided, with nothing open.
        memory: bytes of each device; rank r is on device r modulo their number. Empty where nothing is known of it.
    """

    def __init__(
        self, spec: FamilySpec, parallel: ParallelConfig, config: DeviceConfig, memory: Sequence[float]
    ) -> None:
        self._spec = spec
        self._parallel = parallel
        self._config = config
        # What `reload` and `cpu` hold the formulas do not know.
        self._memory = memory if config.text_encoder == "resident" else ()

    def check(self, job: Job) -> None:
        """Hold a request against it, as if it were alone.

        Raises:
            InvalidRequest: it is too large.
        """
        if not self._memory or not isinstance(self._spec, PlannedFamily):
            return
        parallel, config = self._parallel, self._config
        devices = [Device(config.device, self._memory[stage % len(self._memory)]) for stage in range(parallel.pp)]
        line = self._spec.line(parallel, devices, ANY_LINK, job, config.dtype, config.vae_dtype)
        needed: dict[int, int] = defaultdict(int)
        stages: dict[int, int] = {}
        for rank in range(parallel.ranks):
            place, device = parallel.place(rank), rank % len(self._memory)
            needed[device] += line.peak_bytes(place, 0 if job.chunks else 1)  # one that decodes counts by itself
            stages.setdefault(device, place.pp)
        device = max(needed, key=lambda number: needed[number] - self._memory[number])
        above = needed[device] - self._memory[device]
        if above > 0:
            raise InvalidRequest(
                f"{job.width}x{job.height} with {job.num_frames} frames needs {needed[device] / 1e9:.1f} GB on the "
                f"device of stage {stages[device]}, {above / 1e9:.1f} GB more than its "
                f"{self._memory[device] / 1e9:.1f} GB: "
                "use a smaller size, fewer frames or more stages, or say with --memory-gb that there is more."
            )


def memory_of(config: DeviceConfig, ranks: int, is_local: bool) -> list[float]:
    """Bytes of each device, as given or as the accelerators here say; none where nothing is known.

    Args:
        is_local: whether all ranks are on this host; elsewhere each has a device of its own, like the smallest here.
    """
    if config.device != "cuda":
        return [] if config.memory_gb is None else [config.memory_gb * 1e9] * ranks
    import torch

    found = [float(torch.cuda.get_device_properties(each).total_memory) for each in range(torch.cuda.device_count())]
    if config.memory_gb is not None:
        found = [config.memory_gb * 1e9 for _ in found]
    return found if is_local or not found else [min(found)] * ranks
