"""What an engine is to be: checked as a whole before anything is downloaded or started."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any, Literal, get_args

from cineline.core.config import DEVICES, Cut, DeviceConfig, ParallelConfig, asked_threads, texts_of
from cineline.core.control import Setup
from cineline.core.extras import need
from cineline.core.family import FamilySpec, StoredFamily
from cineline.core.faults import planned
from cineline.engine.auto import divide
from cineline.engine.folder import Run
from cineline.engine.hosts import launch_torchrun
from cineline.engine.hub import name_of
from cineline.engine.launch import Launcher, RankProcess, check_launch, launch_local
from cineline.engine.ray_launch import check_ray, launch_ray
from cineline.engine.replica import ALONE, Replica
from cineline.engine.room import Room, memory_of
from cineline.engine.torchrun import need_torchrun, spans_hosts, torchrun_world
from cineline.errors import InvalidConfig, shown
from cineline.families.identity import identity_of

log = logging.getLogger(__name__)

NOT_EXACT = {
    "rows": "are close to the exact ones (most values equal, others a grey level off), not equal.",
    "tiled": "differ from the exact ones, most of all where tiles meet.",
}
"""What is said of the ways to decode that are not exact."""

IN_ANOTHER_ORDER = ("ring", "tp")
"""Axes that sum up in another order, so that the bits depend on their sizes."""

THREADS = "OMP_NUM_THREADS"
LIBRARIES = ("torch", "diffusers")

OPTION_OF = {"text_encoder": "text_encoder_file"}
"""Of `ModelFiles`, where it has another name than the component."""

OF_THE_MACHINE = ("memory_gb", "allow_untested_device", "compare_weights")
"""Options that say nothing of a run on another one."""


@dataclass(frozen=True)
class Blueprint:
    """A model on its ranks, with nothing left open.

    Attributes:
        spec: the model's. parallel, cut: how it is divided. config: what the ranks compute on and in.
        in_flight: requests that denoise at once; None fills the line. launcher: what starts the ranks.
        replica: which it is of the engines that stand side by side.
    """

    spec: FamilySpec
    parallel: ParallelConfig
    cut: tuple[Cut, ...]
    config: DeviceConfig
    in_flight: int | None
    launcher: Launcher
    replica: Replica = ALONE

    @classmethod
    def draw(
        cls,
        spec: FamilySpec,
        parallel: ParallelConfig | Literal["auto"] | None,
        config: DeviceConfig,
        in_flight: int | None,
        launcher: Launcher,
        replica: Replica = ALONE,
    ) -> Blueprint:
        """From what the caller gives, as `Engine` takes it.

        Raises:
            InvalidConfig: the model cannot be divided so, or not on this machine.
        """
        if in_flight is not None and (type(in_flight) is not int or in_flight < 1):
            raise InvalidConfig(f"in_flight={shown(in_flight)} is no whole number from 1 on: give 1 or more.")
        check_launcher(launcher)
        if parallel == "auto":
            if launcher != "local":
                raise InvalidConfig(
                    f"parallel='auto' is for ranks of this machine: give {launcher}'s a ParallelConfig."
                )
            parallel, in_flight = divide(spec, config, in_flight)
        parallel = spec.place(parallel or ParallelConfig())
        if parallel.vae_decode in NOT_EXACT:
            log.warning("vae_decode=%r: frames %s", parallel.vae_decode, NOT_EXACT[parallel.vae_decode])
        if launcher == "local":
            _check_devices(parallel, config)
        cut = spec.cut(parallel, config)
        if launcher == "ray":
            check_ray(config)
        else:
            check_launch(launcher, parallel)
        return cls(spec, parallel.filled(cut), cut, config, in_flight, launcher, replica)

    def setup(self, trace: bool, live: bool, snapshot_every: int) -> Setup:
        """What rank 0 is told in the first start.

        Raises:
            InvalidConfig: the environment asks for faults that are none.
        """
        faults = planned()
        own = self.spec, 0, self.parallel, self.cut, self.config
        return Setup(*own, 0, None, trace, faults, 0, snapshot_every=snapshot_every, live=live)

    def compared(self, setup: Setup) -> Setup:
        """The same, with what other hosts compare their model with, where there are any; the weights are here.

        Raises:
            CheckpointError: a file cannot be read.
        """
        if self.launcher != "torchrun" or not spans_hosts() or not isinstance(self.spec, StoredFamily):
            return setup
        return replace(setup, identity=identity_of(self.spec, self.config.compare_weights == "content"))

    def launch(self) -> list[RankProcess]:
        """Start the ranks' processes."""
        if self.launcher == "ray":
            return launch_ray(self.parallel.ranks, self._environment, self.config.device)
        if self.launcher == "torchrun":
            return launch_torchrun(self.parallel.ranks, self._environment)
        family = self.spec.stages_class.partition(":")[0] if self.config.device == "cpu" else None
        return launch_local(self.parallel.ranks, self._environment, family)

    @property
    def _environment(self) -> dict[str, str]:
        """The ranks'."""
        match self.launcher:
            case "torchrun":
                return self.config.rank_environment(torchrun_world()[1])
            case "ray":  # a core each: nodes need not have as many as this one
                return self.config.rank_environment(len(os.sched_getaffinity(0)))
        environment = self.config.rank_environment(self.parallel.ranks * self.replica.of)
        return environment | self.replica.devices(self.parallel.ranks, self.config.device)

    @property
    def room(self) -> Room:
        memory = memory_of(self.config, self.parallel.ranks, self.launcher == "local")
        return Room(self.spec, self.parallel, self.config, memory)

    def run(self) -> Run:
        """What a snapshot folder says of it."""
        line = {name: getattr(self.parallel, name) for name in texts_of(ParallelConfig)}
        of_the_run = [name for name in texts_of(DeviceConfig) if name not in OF_THE_MACHINE]
        options = {name: getattr(self.config, name) for name in of_the_run}
        model, variant, files = name_of(self.spec), None, {}
        if isinstance(self.spec, StoredFamily):
            variant = self.spec.variant
            files = {OPTION_OF.get(name, name): str(path.absolute()) for name, path in self.spec.files.items()}
            loras = [lora.text for lora in self.spec.loras]
            options |= {"loras": loras, "lora_mode": self.spec.lora_mode}
        options |= {"in_flight": self.in_flight}
        return Run(model, variant, files, identity_of(self.spec), self.bits, self.made_with, line, options)

    @property
    def bits(self) -> dict[str, Any]:
        """The settings that bits depend on, beside the model and the requests."""
        config, parallel = self.config, self.parallel
        own: dict[str, Any] = {name: getattr(config, name) for name in ("device", "dtype", "vae_dtype")}
        own["text_encoder"] = "cpu" if config.text_encoder == "cpu" else config.device
        own["vae_decode"] = parallel.vae_decode if parallel.vae_decode in NOT_EXACT else "exact"
        own |= {axis: getattr(parallel, axis) for axis in IN_ANOTHER_ORDER}
        if "cpu" in (config.device, own["text_encoder"]):
            own[THREADS] = self._environment.get(THREADS, "")
        return own

    @property
    def made_with(self) -> dict[str, str]:
        """What bits may depend on, too: the libraries' versions and the device's name."""
        found = {name: metadata.version(name) for name in LIBRARIES}
        gpu = device_name() if self.config.device == "cuda" else None
        return found | ({} if gpu is None else {"gpu": gpu})


def device_name() -> str | None:
    """Of this machine's first GPU; None where only other nodes have some."""
    import torch

    return str(torch.cuda.get_device_name(0)) if torch.cuda.is_available() else None


def check_launcher(launcher: str) -> None:
    """Refuse one that is not known, or cannot be used here.

    Raises:
        InvalidConfig: it cannot.
    """
    if launcher not in get_args(Launcher):
        raise InvalidConfig(f"launcher={shown(launcher)} is not known: use {', '.join(get_args(Launcher))}.")
    if launcher == "torchrun":
        need_torchrun()
    if launcher == "ray":
        need("ray")


def _check_devices(parallel: ParallelConfig, config: DeviceConfig) -> None:
    """Refuse what this machine's accelerators cannot run; stages may share them, the ranks of a stage may not."""
    if config.device not in DEVICES and parallel.ring > 1:
        raise InvalidConfig(f"ring={parallel.ring} has no attention for device={shown(config.device)}: use ulysses.")
    if config.device == "cpu" or parallel.lanes == 1:
        return
    import torch

    found = torch.accelerator.device_count()
    if parallel.ranks > found:
        raise InvalidConfig(
            f"{parallel} is {parallel.ranks} ranks, which need an accelerator each, and here are {found}: "
            f"{parallel.advice(found)}."
        )


def default_device() -> str:
    """The device that is used where none is named.

    Raises:
        InvalidConfig: torch, which is asked, would take the environment's threads for something else.
    """
    asked_threads()
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
