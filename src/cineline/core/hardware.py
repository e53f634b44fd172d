"""Devices and the links between them: what they do a second, what they hold (no torch)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cineline.core.config import Dtype
from cineline.core.work import Work

LINEAR_SHARE, ATTENTION_SHARE, CONVOLUTION_SHARE, MEMORY_SHARE = 0.6, 0.5, 0.3, 0.7
"""Of the data sheet's rate that large shapes reach: assumptions, to be replaced by a calibration where there is one."""

CALL_S = 20e-6
"""Of every unit called, on an accelerator."""

RESERVED_BYTES = 5 * 10**8
"""On an accelerator, for its context. A card sold as 24 GB has 24 GiB; 24 x 10^9 bytes are counted on, and what is
between is left to libraries, communicators and fragmentation (cards with GDDR and ECC have less of it)."""


@dataclass(frozen=True)
class Rates:
    """What a device does a second.

    Attributes:
        linear, attention, convolution: FLOP/s, the last one in the VAE's dtype.
        moved: bytes/s of element-wise operations.
        call_s: seconds that each unit costs by itself.
    """

    linear: float
    attention: float
    convolution: float
    moved: float
    call_s: float = 0.0

    def seconds(self, work: Work) -> float:
        """Time that the work takes."""
        return (
            work.linear / self.linear
            + work.attention / self.attention
            + work.convolution / self.convolution
            + work.moved / self.moved
            + work.calls * self.call_s
        )


@dataclass(frozen=True)
class Device:
    """One device of a kind.

    Attributes:
        memory: bytes.
        bf16, fp32: FLOP/s on the data sheet, dense; fp32 without TF32.
        bandwidth: of its memory, bytes/s.
        direct: whether it can send to another over PCIe; if not, what travels goes through the host's memory.
        measured: rates that a calibration found, which then count instead.
        reserved: bytes that are never free.
    """

    name: str
    memory: float
    bf16: float = 0.0
    fp32: float = 0.0
    bandwidth: float = 0.0
    direct: bool = True
    measured: Rates | None = None
    reserved: int = RESERVED_BYTES

    def rates(self, dtype: Dtype, vae_dtype: Dtype) -> Rates:
        """For models in these dtypes. torch convolves float32 in TF32, at half of the rate of 16 bits."""
        if self.measured is not None:
            return self.measured
        peak = self.fp32 if dtype == "float32" else self.bf16
        convolution = self.bf16 / 2 if vae_dtype == "float32" else self.bf16
        return Rates(
            linear=LINEAR_SHARE * peak,
            attention=ATTENTION_SHARE * peak,
            convolution=CONVOLUTION_SHARE * convolution,
            moved=MEMORY_SHARE * self.bandwidth,
            call_s=CALL_S,
        )


@dataclass(frozen=True)
class Link:
    """What joins two stages, one way.

    Attributes:
        bandwidth: bytes/s that large messages reach.
        latency_s: of any message.
        on_bus: PCIe, over which devices that are not `direct` send through the host.
    """

    name: str
    bandwidth: float
    latency_s: float = 20e-6
    on_bus: bool = False

    def seconds(self, nbytes: float) -> float:
        """Time of one message."""
        return self.latency_s + nbytes / self.bandwidth

    def between(self, *devices: Device) -> Link:
        """As it is between these: half as fast where they cannot send to each other directly."""
        staged = self.on_bus and not all(device.direct for device in devices)
        return replace(self, bandwidth=self.bandwidth / 2) if staged else self
