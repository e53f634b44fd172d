"""Sequence parallelism inside a stage: each rank holds some of the tokens, self-attention sees them all.

Ulysses (Jacobs et al. 2023, arXiv 2309.14509) exchanges tokens for heads: a rank computes all tokens of some
heads. The ring (Liu et al. 2023, arXiv 2310.01889) passes keys and values around and merges the parts of a
softmax by their log-sum-exp. Both together: Ulysses within a row of ranks, the ring across rows.

Legend: B batch (1), S tokens, s this rank's, H heads, h = H / ulysses, d head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cineline.transport.axis import Axis, broken_by

Rotary = tuple[Tensor, Tensor]


class TokenShards:
    """Which of a request's tokens this rank holds.

    Args:
        tokens: S.
        ring, ulysses: the axes; ring coordinate first, each row of Ulysses ranks holds a run of tokens.

    Attributes:
        rows: tokens of each row of the ring. sizes: tokens of each rank of this rank's row.
        own: this rank's tokens.
    """

    def __init__(self, tokens: int, ring: Axis, ulysses: Axis) -> None:
        self._ring, self._ulysses = ring, ulysses
        self.rows = ring.share(tokens)
        self.sizes = ulysses.share(self.rows[ring.index])
        start = sum(self.rows[: ring.index]) + sum(self.sizes[: ulysses.index])
        self.own = slice(start, start + self.sizes[ulysses.index])

    @property
    def whole(self) -> bool:
        """There is nothing to share."""
        return self._ring.size * self._ulysses.size == 1

    def cut(self, tokens: Tensor) -> Tensor:
        """This rank's part of [B, S, ...]."""
        return tokens if self.whole else tokens[:, self.own]

    def gather(self, own: Tensor) -> Tensor:
        """[1, S, ...] of every rank's [1, s, ...]."""
        if self.whole:
            return own
        row = self._ulysses.all_gather(own[0], self.sizes)
        return self._ring.all_gather(row, self.rows).unsqueeze(0)


class ShardedAttention:
    """Wan's self-attention, as diffusers' `WanAttnProcessor` computes it, over the tokens of all ranks.

    Set as a block's `attn1.processor`; `shards` must be set before each forward.
    """

    def __init__(self, ring: Axis, ulysses: Axis) -> None:
        self._ring, self._ulysses = ring, ulysses
        self.shards = TokenShards(0, ring, ulysses)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Rotary | None = None,
    ) -> Tensor:
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        key = attn.norm_k(attn.to_k(hidden_states)).unflatten(2, (attn.heads, -1))
        value = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1))
        assert rotary_emb is not None
        query, key = rotate(query, rotary_emb), rotate(key, rotary_emb)
        mixed = self._give_heads(torch.stack([query[0], key[0], value[0]], dim=2))  # [row's tokens, h, 3, d]
        query, key, value = (part.unsqueeze(0).transpose(1, 2) for part in mixed.unbind(2))
        if self._ring.size == 1:
            found = F.scaled_dot_product_attention(query, key, value)
        else:
            found = ring_attention(query, key, value, self.shards.rows, self._ring)
        found = self._give_tokens(found.transpose(1, 2)[0]).unsqueeze(0)
        found = found.flatten(2, 3).type_as(query)
        return attn.to_out[1](attn.to_out[0](found))  # type: ignore[no-any-return]

    def _give_heads(self, own: Tensor) -> Tensor:
        """[s, H, ...] to [tokens of the row, h, ...]."""
        ranks, sizes = self._ulysses.size, self.shards.sizes
        if ranks == 1:
            return own
        by_rank = torch.cat(own.chunk(ranks, dim=1))  # [ranks s, h, ...]
        return self._ulysses.all_to_all(by_rank, [own.shape[0]] * ranks, sizes)

    def _give_tokens(self, heads: Tensor) -> Tensor:
        """[tokens of the row, h, d] to [s, H, d]."""
        ranks, sizes = self._ulysses.size, self.shards.sizes
        if ranks == 1:
            return heads
        own = sizes[self._ulysses.index]
        by_rank = self._ulysses.all_to_all(heads, sizes, [own] * ranks)  # [ranks s, h, d]
        return torch.cat(by_rank.chunk(ranks), dim=1)


def rotate(hidden: Tensor, rotary: Rotary) -> Tensor:
    """Rotary position embedding of [B, s, H, d], in diffusers' arithmetic."""
    first, second = hidden[..., 0::2], hidden[..., 1::2]
    cos, sin = rotary[0][..., 0::2], rotary[1][..., 1::2]
    rotated = torch.empty_like(hidden)
    rotated[..., 0::2] = first * cos - second * sin
    rotated[..., 1::2] = first * sin + second * cos
    return rotated


def ring_attention(query: Tensor, key: Tensor, value: Tensor, rows: list[int], ring: Axis) -> Tensor:
    """Attention [B, h, s, d] of this row's queries to the keys and values of all rows.

    Each step passes keys and values on while it computes with those at hand.

    Args:
        rows: tokens of each row; some may have none.
    """
    total: Tensor | None = None
    weight: Tensor | None = None
    pair = torch.stack([key, value]).contiguous()
    for step in range(ring.size):
        works = []
        coming = pair
        if step + 1 < ring.size:
            coming = pair.new_empty(*pair.shape[:3], rows[(ring.index - step - 1) % ring.size], pair.shape[4])
            works = ring.pass_on(pair, coming)
        if query.shape[2] and pair.shape[3]:  # torch's kernels do not take empty ones
            part, log_sum = attend(query, pair[0], pair[1])
            if total is None or weight is None:
                total, weight = part.float(), log_sum
            else:
                both = torch.logaddexp(weight, log_sum)
                total = total * (weight - both).exp() + part.float() * (log_sum - both).exp()
                weight = both
        for work in works:
            with broken_by("the ring"):
                work.wait()
        pair = coming
    return query if total is None else total.to(query.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Attention [B, h, s, d] and the log-sum-exp [B, h, s, 1] of its scores, float32."""
    if query.device.type == "cpu":
        found, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
    elif query.dtype in (torch.bfloat16, torch.float16):
        found, log_sum = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[:2]
    else:
        found, log_sum = torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, True)[:2]
    return found, log_sum[..., : query.shape[2]].float().unsqueeze(-1)
