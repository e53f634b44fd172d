"""Blocks of two streams that attend together, each with a modulation, projections and a feed-forward of its own (Esser
et al. 2024, arXiv 2403.03206; no torch)."""

from __future__ import annotations

from cineline.core.work import Parameters, Work

ATTENTION = tuple(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"))
OUTPUTS = ("attn.to_out.0", "attn.to_add_out")
"""Linears of diffusers' modules, whose outputs, and whose inputs, the ranks of a stage share."""


def double_block(d: int, head: int, tp: int, wide: int = 4) -> Parameters:
    """What one of `tp` ranks holds of a block.

    Args:
        d: model width. head: of one head, whose queries and keys have norms. wide: of the feed-forward, times `d`.
    """
    columns = (3 * (d * d + d) + wide * (d * d + d)) // tp
    rows = (d * d + wide * d * d) // tp + 2 * d
    modulation = 6 * (d * d + d)
    return Parameters(2 * (columns + rows + modulation) + 4 * head)


def double_work(rows: int, d: int, tp: int, itemsize: int, wide: int = 4) -> Work:
    """A rank's part of a block over so many tokens of both streams."""
    linear = 2 * rows * (4 + 2 * wide) * d * d / tp + 2 * 2 * 6 * d * d
    moved = rows * d * itemsize * (26 + 26 / tp)
    return Work(linear=linear, attention=4 * rows * rows * d / tp, moved=moved, calls=1)
