"""Devices and links by name, from vendors' data sheets (dense rates; not measured here; no torch)."""

from __future__ import annotations

import re
from dataclasses import replace

from cineline.core.hardware import Device, Link
from cineline.errors import InvalidConfig, shown

LINK_SHARE = 0.8
"""Of the data sheet's rate that large messages reach: an assumption, as `core.hardware` has some for devices."""

GIGA, TERA = 1e9, 1e12


def _device(name: str, bf16: float, fp32: float, memory: float, bandwidth: float, direct: bool = True) -> Device:
    return Device(name, memory * GIGA, bf16 * TERA, fp32 * TERA, bandwidth * GIGA, direct)


DEVICES = {
    device.name.lower(): device
    for device in (
        _device("RTX4090", 165, 82.6, 24, 1008, direct=False),
        _device("RTX5090", 210, 104.8, 32, 1792, direct=False),
        _device("L40", 181, 90.5, 48, 864),
        _device("L40S", 362, 91.6, 48, 864),
        _device("A100", 312, 19.5, 80, 2039),
        _device("H100", 989, 67, 80, 3350),
        _device("H100-PCIe", 756, 51, 80, 2000),
        _device("H20", 148, 44, 96, 4000),
        _device("H200", 989, 67, 141, 4800),
        _device("B200", 2250, 75, 180, 8000),
    )
}
"""By name in small letters."""


LINKS = {
    "pcie4": Link("pcie4", LINK_SHARE * 32 * GIGA, on_bus=True),
    "pcie5": Link("pcie5", LINK_SHARE * 64 * GIGA, on_bus=True),
    "nvlink3": Link("nvlink3", LINK_SHARE * 300 * GIGA),
    "nvlink4": Link("nvlink4", LINK_SHARE * 450 * GIGA),
    "nvlink5": Link("nvlink5", LINK_SHARE * 900 * GIGA),
    "ethernet10": Link("ethernet10", LINK_SHARE * 1.25 * GIGA, latency_s=50e-6),
    "ethernet25": Link("ethernet25", LINK_SHARE * 3.125 * GIGA, latency_s=50e-6),
    "ethernet100": Link("ethernet100", LINK_SHARE * 12.5 * GIGA, latency_s=50e-6),
    "ethernet400": Link("ethernet400", LINK_SHARE * 50 * GIGA, latency_s=50e-6),
}
"""By name; a data sheet's figure for both ways halved."""


def devices_of(text: str) -> tuple[Device, ...]:
    """Devices such as 4xL40S, or 2xL40S,1xRTX4090, in the order of the stages.

    Raises:
        InvalidConfig: an unknown device, or no number.
    """
    devices: list[Device] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(?:([1-9]\d{0,3})x)?([A-Za-z][\w-]*)\s*", part, re.ASCII)
        if match is None:
            raise InvalidConfig(f"devices={shown(text)}: write them as 4xL40S or 2xL40S,1xRTX4090.")
        device = DEVICES.get(match[2].lower())
        if device is None:
            known = ", ".join(entry.name for entry in DEVICES.values())
            raise InvalidConfig(f"devices={shown(text)}: {shown(match[2])} is not in the table; known are {known}.")
        devices += [device] * int(match[1] or 1)
    return tuple(devices)


def link_of(name: str) -> Link:
    """A link by its name.

    Raises:
        InvalidConfig: there is no such one.
    """
    link = LINKS.get(name.lower())
    if link is None:
        raise InvalidConfig(f"link={shown(name)} is not in the table: use one of {', '.join(LINKS)}.")
    return link


def device_named(name: str, memory: float) -> Device:
    """The device that a driver calls so, such as "NVIDIA A100-SXM4-80GB", with no more memory than it reports.

    Raises:
        InvalidConfig: none in the table has such a name.
    """
    plain = name.lower().replace(" ", "").replace("-", "")
    matches = [key for key in DEVICES if key.replace("-", "") in plain]
    if not matches:
        known = ", ".join(entry.name for entry in DEVICES.values())
        raise InvalidConfig(f"device {shown(name)} is not in the planner's table ({known}): give the axes yourself.")
    device = DEVICES[max(matches, key=len)]
    return replace(device, memory=min(device.memory, memory))
