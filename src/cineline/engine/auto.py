"""`Engine(parallel="auto")` and `--replicas auto`: the planner's choice for given devices."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from cineline.core.config import DeviceConfig, ParallelConfig
from cineline.core.family import FamilySpec, plannable
from cineline.core.hardware import Device
from cineline.errors import InvalidConfig, shown
from cineline.planning.hardware import LINKS, device_named
from cineline.planning.plan import Plan
from cineline.planning.planner import Planning, Task, plan, planned_job
from cineline.planning.report import exactness, name_of

LINK = "pcie4"
"""Between this machine's devices: the least that they have; a faster one makes no plan of this one wrong."""

FindDevices = Callable[[], tuple[Sequence[Device], str]]

log = logging.getLogger(__name__)


def divide(spec: FamilySpec, config: DeviceConfig, in_flight: int | None) -> tuple[ParallelConfig, int | None]:
    """The best division of the model as one engine, and the requests in flight, for requests of the model's defaults.

    On the CPU that is one stage: its cores work together already.

    Raises:
        InvalidConfig: no plan fits, a device is not in the planner's table, or the family says nothing of costs.
    """
    if config.device == "cpu":
        return ParallelConfig(), in_flight
    best = _planned(spec, config, in_flight, local_cluster).single
    if best is None:
        raise InvalidConfig(
            f"parallel='auto' finds no plan of one engine for {shown(plannable(spec).folder)}: give a ParallelConfig."
        )
    _tell(best)
    return best.parallel, best.in_flight


def replicate(
    spec: FamilySpec, config: DeviceConfig, in_flight: int | None, find: FindDevices
) -> tuple[ParallelConfig, int, int]:
    """The best division of the devices as engines side by side: that of each, its requests in flight, how many.

    Args:
        find: the devices, and the name of the link between them.

    Raises:
        InvalidConfig: as `divide`, or on the CPU.
    """
    if config.device == "cpu":
        raise InvalidConfig("replicas='auto' plans for CUDA devices, not for the CPU: give a number of replicas.")
    best = _planned(spec, config, in_flight, find).best
    _tell(best)
    return best.parallel, best.in_flight, best.replicas


def _planned(spec: FamilySpec, config: DeviceConfig, in_flight: int | None, find: FindDevices) -> Planning:
    if config.text_encoder != "resident":
        raise InvalidConfig(
            f"parallel='auto' plans for a resident text encoder, not {shown(config.text_encoder)}: "
            "give a ParallelConfig."
        )
    planned = plannable(spec)
    devices, link = find()
    if config.memory_gb is not None:
        devices = [replace(device, memory=config.memory_gb * 1e9) for device in devices]
    task = Task(
        planned,
        devices,
        LINKS[link],
        planned_job(planned, {}),
        dtype=config.dtype,
        vae_dtype=config.vae_dtype,
        in_flight=in_flight,
    )
    return plan(task)


def _tell(best: Plan) -> None:
    log.log(
        logging.INFO if best.exact else logging.WARNING,
        "Divided by the planner: %s, %d in flight, %s.",
        *(name_of(best), best.in_flight, exactness(best)),
    )


def local_cluster() -> tuple[Sequence[Device], str]:
    """This machine's devices, and the link between them."""
    return local_devices(), LINK


def local_devices() -> list[Device]:
    """CUDA's devices here, with the memory that they report.

    Raises:
        InvalidConfig: there is none, or one that is not in the planner's table.
    """
    import torch

    if not torch.cuda.is_available():
        raise InvalidConfig("parallel='auto' plans for CUDA devices, and torch finds none here: give a ParallelConfig.")
    found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return [device_named(device.name, float(device.total_memory)) for device in found]
