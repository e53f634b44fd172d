"""Which axes a family's blocks can be divided by (no torch)."""

from __future__ import annotations

from dataclasses import replace

from cineline.core.config import ParallelConfig, stages_alone
from cineline.errors import InvalidConfig


def heads_alone(parallel: ParallelConfig, heads: int) -> ParallelConfig:
    """The config as it is, for a family of one expert whose blocks are divided by tp alone.

    Args:
        heads: of attention.

    Raises:
        InvalidConfig: another axis than pp, cfg and tp divides something, or tp does not divide the heads.
    """
    if parallel.ulysses * parallel.ring > 1:
        raise InvalidConfig(
            f"{parallel}: tokens of text and latents attend together here, and ulysses and ring share out the latents' "
            "alone: use tp or pp."
        )
    if heads % parallel.tp:
        divisors = ", ".join(str(number) for number in range(1, heads + 1) if heads % number == 0)
        raise InvalidConfig(
            f"tp={parallel.tp} does not divide the model's {heads} attention heads: use one of {divisors}."
        )
    stages_alone(replace(parallel, tp=1))
    return parallel
