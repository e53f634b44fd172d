"""LoRAs that a Wan model is given: the files in a folder, whose they are, and whether they fit (no torch)."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from cineline.core.lora import MAIN, Level, Lora, LoraMode
from cineline.errors import CheckpointError, InvalidConfig, shown
from cineline.families.wan.assemble import NOISE
from cineline.families.wan.lora_keys import EXPERTS, IMAGE_ENCODER, adapters, deltas_of, levels_of
from cineline.families.wan.spec import WanSpec
from cineline.weights.layout import SUFFIX
from cineline.weights.lora import Delta
from cineline.weights.sources import Source, open_source

log = logging.getLogger(__name__)


def with_loras(spec: WanSpec, loras: Sequence[Lora], mode: LoraMode) -> WanSpec:
    """The spec with these LoRAs, whose paths are here, each held against the model.

    Raises:
        CheckpointError: a file cannot be read, is no LoRA, or of another model. InvalidConfig: a name that two have, or
            an expert that the model has not.
    """
    found = tuple(one for lora in loras for one in _files(lora, len(spec.experts) > 1))
    for number, lora in enumerate(found):
        if lora.level == "low" and len(spec.experts) == 1:
            raise InvalidConfig(
                f"LoRA low:{shown(lora.path)} is for the second of two experts, and {shown(spec.folder)} has one: "
                "leave out low:."
            )
        for other in found[:number]:
            if other.name == lora.name and (other.level == lora.level or None in (other.level, lora.level)):
                raise InvalidConfig(
                    f"LoRAs {shown(other.path)} and {shown(lora.path)} are both called {shown(lora.name)}: name one, "
                    "as NAME=FILE."
                )
        _warn_of_level(spec, lora)
        _check(spec, lora, mode)
    spec = replace(spec, loras=found, lora_mode=mode)
    return spec if mode == "merge" else replace(spec, beside=tuple(_beside(spec, expert) for expert in spec.experts))


def _beside(spec: WanSpec, expert: str) -> tuple[int, ...]:
    """Numbers that LoRAs keep beside each block; what stands before the blocks counts as the first one's, what stands
    behind them as the last one's."""
    counts = [0] * spec.layers
    for lora in adapters(spec, expert).values():
        for name, numbers in lora.numbers.items():
            block = re.match(r"blocks\.(\d+)\.", name)
            counts[int(block[1]) if block else -1 if name.startswith("proj_out") else 0] += numbers
    return tuple(counts)


def _files(lora: Lora, two_experts: bool) -> Iterator[Lora]:
    """A LoRA's file in its folder, or both experts'."""
    if not lora.path.is_dir():
        yield lora
        return
    names = sorted(path.name for path in lora.path.iterdir() if path.suffix == SUFFIX)
    for name in choose(names, lora, two_experts):
        level = next((level for level in EXPERTS if lora.level is None and len(names) > 1 and _says(name, level)), None)
        yield replace(lora, path=lora.path / name, level=lora.level or level)


def choose(names: Collection[str], lora: Lora, two_experts: bool) -> list[str]:
    """Of the safetensors files in a LoRA's folder the one to be used, or a pair for two experts.

    Raises:
        CheckpointError: there is none, or no telling.
    """
    main = [name for name in MAIN if name in names]
    if main or len(names) == 1:
        return main[:1] or list(names)
    pair = {level: [name for name in names if _says(name, level)] for level in EXPERTS}
    if all(len(own) == 1 for own in pair.values()) and len(names) == 2:
        if lora.level is not None:
            return pair[lora.level]
        if two_experts:
            return [pair["high"][0], pair["low"][0]]
    if not names:
        raise CheckpointError(f"LoRA {shown(lora.path)} has no {SUFFIX} file at its top: give the file, or its folder.")
    raise CheckpointError(
        f"LoRA {shown(lora.path)} holds {len(names)} files, such as {shown(sorted(names)[:3])}: give one of them, by "
        "its path."
    )


def _says(name: str, level: Level) -> bool:
    return NOISE[level].search(name.lower()) is not None


def _warn_of_level(spec: WanSpec, lora: Lora) -> None:
    told = [level for level in EXPERTS if _says(lora.path.name, level)]
    if len(spec.experts) > 1 and len(told) == 1 and told[0] != lora.level:
        used = f"for the {lora.level}-noise expert" if lora.level else "for both experts"
        log.warning(
            "LoRA %s is used %s, and its name says %s: nothing in it tells them apart, write %s:FILE if it is for one.",
            shown(lora.path),
            used,
            told[0],
            told[0],
        )


def _check(spec: WanSpec, lora: Lora, mode: LoraMode) -> None:
    """Hold a file's tensors against the model's, of each expert that it is for."""
    source = open_source(lora.path)
    levels = [level for level, expert in EXPERTS.items() if expert in spec.experts]
    found = {level: deltas_of(spec, source, level) for level in levels if lora.level in (None, level)}
    told = {level for level in levels_of(source).values() if level is not None}
    if told and not told <= set(levels):
        raise CheckpointError(
            f"{shown(lora.path)} is for two experts, by the numbers in its names, and {shown(spec.folder)} has one: "
            "use a LoRA of this model."
        )
    if not any(found.values()):
        raise CheckpointError(f"{shown(lora.path)} has no tensor of a LoRA: give another file.")
    left_out = sum(IMAGE_ENCODER.search(name) is not None for name in source.stored)
    if left_out and spec.image is None:
        log.warning(
            "LoRA %s: %d tensors for the image encoder of Wan 2.1 are left out, which this model has not.",
            shown(lora.path),
            left_out,
        )
    if mode == "runtime":
        for deltas in found.values():
            _check_runtime(source, deltas)


def _check_runtime(source: Source, deltas: Mapping[str, Delta]) -> None:
    """Only linear layers can have a LoRA beside them."""
    for name, delta in deltas.items():
        module, _, leaf = name.rpartition(".")
        linear = leaf in ("weight", "bias") and "norm" not in module and module != "patch_embedding"
        twice = delta.down is not None and delta.diff is not None
        weight = deltas.get(f"{module}.weight")
        alone = leaf == "bias" and (weight is None or weight.factor != delta.factor)
        if not linear or twice or alone:
            raise CheckpointError(
                f"{shown(source.path)}: {shown(delta.names[0])} changes {shown(name)}, which is no product that a "
                "request can have and another not: use lora_mode='merge'."
            )
