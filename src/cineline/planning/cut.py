"""The cut that is used where nobody says another: of text encoder and VAE decoder over the stages (no torch)."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np

from cineline.core.config import ParallelConfig, Place
from cineline.core.costs import Costs
from cineline.planning.balance import Row, fill_evenly, sums

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
        parallel = replace(parallel, vae_split=_decoder_cut(costs, parallel))
    if parallel.text_split is None:
        base = _weights(costs, replace(parallel, text_split=(0,) * parallel.pp))
        layers = fill_evenly(base, costs.text_layer_bytes, costs.text_layers)
        parallel = replace(parallel, text_split=tuple(layers))
    return parallel


def _weights(costs: Costs, parallel: ParallelConfig) -> list[int]:
    """Of each stage's first rank."""
    return [costs.held_bytes(parallel, Place(pp=stage)) for stage in range(parallel.pp)]


def _decoder_cut(costs: Costs, parallel: ParallelConfig) -> tuple[int, ...]:
    """Units of the decoder on each stage."""
    stages, nothing = parallel.pp, (0,) * parallel.pp
    free = parallel.text_split is None
    bare = replace(parallel, vae_split=nothing, text_split=nothing if free else parallel.text_split)
    row = Row(
        base=_weights(costs, bare),
        nbytes=[sums(costs.decoder_bytes)] * stages,
        work=[sums(costs.decoder_flop)] * stages,
        piece=costs.text_layer_bytes,
        pieces=costs.text_layers if free else 0,
    )
    total = sum(row.base) + sum(costs.decoder_bytes) + row.pieces * row.piece
    weight = max(row.least_above(np.inf), TARGET * total / stages)
    flop, best, all_flop = row.least_work(weight), row.least_work(total), sum(costs.decoder_flop)
    if flop > 1.01 * best:
        log.info(
            "The VAE decoder's largest stage has %.0f %% of its FLOP (%.0f %% would be possible), so that no stage "
            "holds more than %.2f times its share of the weights.",
            *(100 * flop / all_flop, 100 * best / all_flop, weight / total * stages),
        )
    cut = row.cut(row.least_above(flop, weight), flop)
    assert cut is not None
    return tuple(cut)
