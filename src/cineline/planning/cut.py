"""The cut that is used where nobody says another: of text encoder and VAE decoder over the stages (no torch)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cineline.core.config import ParallelConfig, Place
from cineline.core.costs import Costs
from cineline.planning.balance import fill_evenly, smallest

TARGET = 1.15
"""Times an even share of all weights that the largest stage may hold before the decoder's FLOP give way."""

log = logging.getLogger(__name__)


def default_cut(costs: Costs, parallel: ParallelConfig) -> ParallelConfig:
    """The config with `text_split`, and where the decoder is cut `vae_split`, filled in; blocks as they are.

    Decoder units are balanced by FLOP, text layers by weights; where the units' weights alone make the largest
    stage too heavy (above `TARGET`), their balance gives way, and the log says so.

    Args:
        parallel: placed (`ParallelConfig.placed`).

    Raises:
        InvalidConfig: a given split does not fit the model.
    """
    parallel.cut(costs.blocks, costs.text_layers, len(costs.decoder_bytes))
    if parallel.vae_split is None and parallel.vae_decode == "layers":
        parallel = replace(parallel, vae_split=_Stages.of(costs, parallel).decoder_cut())
    if parallel.text_split is None:
        base = _weights(costs, replace(parallel, text_split=(0,) * parallel.pp))
        layers = fill_evenly(base, costs.text_layer_bytes, costs.text_layers)
        parallel = replace(parallel, text_split=tuple(layers))
    return parallel


def _weights(costs: Costs, parallel: ParallelConfig) -> list[int]:
    """Of each stage's first rank."""
    return [costs.held_bytes(parallel, Place(pp=stage)) for stage in range(parallel.pp)]


@dataclass(frozen=True)
class _Stages:
    """What decides the decoder's cut.

    Attributes:
        base: bytes on each stage beside decoder units and text layers that are free to move.
        unit_bytes, unit_flop: of each decoder unit, summed up to it: [units + 1].
        layer, layers: bytes of a text layer, and how many there are to share out.
    """

    base: Sequence[int]
    unit_bytes: Sequence[int]
    unit_flop: Sequence[int]
    layer: int
    layers: int

    @classmethod
    def of(cls, costs: Costs, parallel: ParallelConfig) -> _Stages:
        nothing = (0,) * parallel.pp
        free = parallel.text_split is None
        bare = replace(parallel, vae_split=nothing, text_split=nothing if free else parallel.text_split)
        return cls(
            base=_weights(costs, bare),
            unit_bytes=_sums(costs.decoder_bytes),
            unit_flop=_sums(costs.decoder_flop),
            layer=costs.text_layer_bytes,
            layers=costs.text_layers if free else 0,
        )

    @property
    def total(self) -> int:
        return sum(self.base) + self.unit_bytes[-1] + self.layers * self.layer

    def decoder_cut(self) -> tuple[int, ...]:
        """Units on each stage."""
        all_flop = float(self.unit_flop[-1])
        least_bytes = smallest(0, self.total, lambda weight: self._cut(weight, all_flop) is not None)
        weight = max(least_bytes, TARGET * self.total / len(self.base))
        flop = smallest(0, all_flop, lambda limit: self._cut(weight, limit) is not None)
        best = smallest(0, all_flop, lambda limit: self._cut(self.total, limit) is not None)
        if flop > 1.01 * best:
            log.info(
                "The VAE decoder's largest stage has %.0f %% of its FLOP (%.0f %% would be possible), so that no stage "
                "holds more than %.2f times its share of the weights.",
                *(100 * flop / all_flop, 100 * best / all_flop, weight / self.total * len(self.base)),
            )
        weight = smallest(0, weight, lambda limit: self._cut(limit, flop) is not None)
        cut = self._cut(weight, flop)
        assert cut is not None
        return tuple(cut)

    def _cut(self, weight: float, flop: float) -> list[int] | None:
        """Units on each stage so that no stage is above either limit and all text layers find room, if there is one.

        For each number of units on the stages so far, the most text layers that these have room for.
        """
        units = len(self.unit_bytes)
        rooms: list[float] = [0.0] + [-1.0] * (units - 1)
        cuts = []
        for base in self.base:
            row, froms = [-1.0] * units, [0] * units
            for stop in range(units):
                for start in range(stop + 1):
                    left = weight - base - self.unit_bytes[stop] + self.unit_bytes[start]
                    if rooms[start] < 0 or left < 0 or self.unit_flop[stop] - self.unit_flop[start] > flop:
                        continue
                    room = rooms[start] + left // self.layer
                    if room > row[stop]:
                        row[stop], froms[stop] = room, start
            rooms = row
            cuts.append(froms)
        if rooms[-1] < self.layers:
            return None
        counts, stop = [], units - 1
        for froms in reversed(cuts):
            counts.append(stop - froms[stop])
            stop = froms[stop]
        return counts[::-1]


def _sums(values: Sequence[int]) -> list[int]:
    return [sum(values[:stop]) for stop in range(len(values) + 1)]
