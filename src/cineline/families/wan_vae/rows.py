"""Latents to frames by rows: every rank has the whole decoder and some of the picture's rows.

Applied from outside to diffusers' modules. A convolution over the picture takes the row beyond its rank's first
and last ones from the neighbours, where the whole picture has zeros at its edges; the attention takes keys and
values of all rows. The arithmetic is diffusers', but on smaller feature maps the CPU's (or GPU's) convolutions may
add up in another order: frames are close to the exact ones, not equal.

Legend: C channels, T frames of a chunk, h rows of this rank, w columns, at whatever scale the feature map has.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    CACHE_T,
    WanAttentionBlock,
    WanCausalConv3d,
    WanResample,
)
from torch import Tensor, nn
from torch.nn import functional as F

from cineline.families.snapshot import copied
from cineline.families.wan_vae.costs import VaeCosts
from cineline.families.wan_vae.decoder import DecoderSlice, SliceState, Tensors
from cineline.families.wan_vae.halves import VaeFiles
from cineline.transport.axis import Axis


class RowPeers:
    """The ranks that share a picture, seen from this one: who holds how many of its rows.

    Where there are fewer rows than ranks the last ranks have none.

    Args:
        axis: the ranks, in the order of their rows.
        rows: of the latents.

    Attributes:
        shares: rows of each rank. own: this rank's.
    """

    def __init__(self, axis: Axis, rows: int) -> None:
        self._axis = axis
        self.shares = axis.share(rows)
        self._holders = sum(share > 0 for share in self.shares)
        start = sum(self.shares[: axis.index])
        self.own = slice(start, start + self.shares[axis.index])

    def swap_edges(self, rows: Tensor) -> Tensor:
        """The rows beyond the first and the last one, [..., 2, w], of [..., h, w]; zeros beyond the picture."""
        index, height = self._axis.index, rows.shape[-2]
        beyond = rows.new_zeros(2, *rows.shape[:-2], rows.shape[-1])
        sent, received = {}, {}
        if index > 0:
            sent[index - 1], received[index - 1] = rows[..., 0, :].contiguous(), beyond[0]
        if index + 1 < self._holders:
            sent[index + 1], received[index + 1] = rows[..., height - 1, :].contiguous(), beyond[1]
        if sent:
            self._axis.exchange(sent, received)
        return beyond.movedim(0, -2)

    def gather(self, own: Tensor, dim: int, each: int) -> Tensor:
        """Every rank's rows in order, where this one has its own (contiguous); along `dim` each row is `each` long."""
        parts = self._parts(own, dim, each)
        others = {rank: part for rank, part in enumerate(parts[: self._holders]) if rank != self._axis.index}
        if others:
            self._axis.exchange(dict.fromkeys(others, own), others)
        return torch.cat(parts, dim)

    def deliver(self, own: Tensor, dim: int, each: int) -> Tensor | None:
        """As `gather`, but at the last rank of all alone; None at the others."""
        index, last = self._axis.index, len(self.shares) - 1
        if index < last:
            if self.shares[index]:
                self._axis.exchange({last: own}, {})
            return None
        parts = self._parts(own, dim, each)
        others = {rank: part for rank, part in enumerate(parts[: self._holders]) if rank != index}
        if others:
            self._axis.exchange({}, others)
        return torch.cat(parts, dim)

    def _parts(self, own: Tensor, dim: int, each: int) -> list[Tensor]:
        """This rank's rows, and room for those of the others."""
        sizes = [list(own.shape) for _ in self.shares]
        for size, share in zip(sizes, self.shares, strict=True):
            size[dim] = share * each
        return [own if rank == self._axis.index else own.new_empty(size) for rank, size in enumerate(sizes)]


@dataclass
class RowState:
    """One request's decode under way on this rank.

    Attributes:
        shape: of the whole latents, [1, C, F', H', W'].
        slice: of the rank's rows; None where it has none.
        beyond: by convolution, the rows beyond this rank's of the frames in its cache, [1, C, <= 2, 2, w]. They came
            once, with the chunk of those frames.
    """

    peers: RowPeers
    shape: tuple[int, ...]
    slice: SliceState | None
    beyond: dict[str, Tensor] = field(default_factory=dict)


class _OverRows:
    """A module's forward, over this rank's rows. `state` must be set for each chunk, and not kept beyond it."""

    state: RowState | None = None

    def __init__(self, name: str, module: Any) -> None:
        self._name = name
        self._module = module

    @property
    def _request(self) -> RowState:
        assert self.state is not None
        return self.state


class _Convolution(_OverRows):
    """Of a `WanCausalConv3d` of 3 x 3 x 3, with zeros before the first frame and beside the picture."""

    def __call__(self, hidden: Tensor, cache_x: Tensor | None = None) -> Tensor:
        beyond = self._request.peers.swap_edges(hidden)
        past, frames, rows = CACHE_T, *hidden.shape[2:4]
        padded = hidden.new_zeros(1, hidden.shape[1], past + frames, rows + 2, hidden.shape[4] + 2)
        inner = padded[..., 1:-1]
        inner[:, :, past:, 1:-1] = hidden
        if cache_x is not None:
            inner[:, :, past - cache_x.shape[2] : past, 1:-1] = cache_x
            beyond = torch.cat([self._request.beyond[self._name], beyond], dim=2)
        inner[:, :, -beyond.shape[2] :, :: rows + 1] = beyond
        self._request.beyond[self._name] = beyond[:, :, -past:].clone()
        return nn.Conv3d.forward(self._module, padded)


class _Upsampling(_OverRows):
    """Of a `WanResample`'s nearest-neighbour doubling and convolution of 3 x 3."""

    def __init__(self, name: str, module: Any) -> None:
        super().__init__(name, module)
        module[1].padding = (0, 1)

    def __call__(self, hidden: Tensor) -> Tensor:
        double, convolution = self._module
        beyond = double(self._request.peers.swap_edges(hidden))[..., 1:3, :]  # of each row the copy that is nearer
        padded = torch.cat([beyond[..., :1, :], double(hidden), beyond[..., 1:, :]], dim=-2)
        return convolution(padded)  # type: ignore[no-any-return]


class _Attention(_OverRows):
    """Of a `WanAttentionBlock`: this rank's queries, everybody's keys and values."""

    def __call__(self, hidden: Tensor) -> Tensor:
        channels, frames, rows, columns = hidden.shape[1:]
        pictures = hidden[0].transpose(0, 1)
        mixed = self._module.to_qkv(self._module.norm(pictures)).flatten(2).transpose(1, 2).unsqueeze(1)
        query, own = mixed.split([channels, 2 * channels], dim=-1)
        key, value = self._request.peers.gather(own.contiguous(), 2, columns).chunk(2, dim=-1)
        found = F.scaled_dot_product_attention(query, key, value)
        found = found.squeeze(1).transpose(1, 2).reshape(frames, channels, rows, columns)
        return hidden + self._module.proj(found).transpose(0, 1).unsqueeze(0)  # type: ignore[no-any-return]


class RowDecoder:
    """The whole decoder on each rank of an axis, for a share of the picture's rows; a `Decoder`.

    All ranks decode the same chunk together. The last one gets the frames, the others none.

    Attributes:
        bytes_read: of the weights.
    """

    def __init__(self, files: VaeFiles, dtype: torch.dtype, device: torch.device, axis: Axis) -> None:
        self._axis = axis
        self._device = device
        self._slice = DecoderSlice(files, None, dtype, device, takes_latents=True)
        self._costs = VaeCosts.of(self._slice.config)
        self.bytes_read = self._slice.bytes_read
        self._over_rows: list[_OverRows] = []
        for name, module in self._slice.modules():
            if isinstance(module, WanCausalConv3d) and module.kernel_size[1:] == (3, 3):
                self._replace(_Convolution(name, module), module)
            elif isinstance(module, WanResample):
                self._replace(_Upsampling(name, module.resample), module.resample)
            elif isinstance(module, WanAttentionBlock):
                self._replace(_Attention(name, module), module)

    def _replace(self, forward: _OverRows, module: Any) -> None:
        module.forward = forward
        self._over_rows.append(forward)

    def _set(self, state: RowState | None) -> None:
        for forward in self._over_rows:
            forward.state = state

    def start(self, latents: Tensor | None) -> RowState:
        assert latents is not None
        peers = RowPeers(self._axis, latents.shape[3])
        own = latents[:, :, :, peers.own]
        return RowState(peers, tuple(latents.shape), self._slice.start(own) if own.numel() else None)

    def run(self, state: RowState, chunk: int, received: Tensors = ()) -> Tensors:
        end = len(self._costs.decoder)
        ((frames, height, width, colours),) = self._costs.boundary_shapes(end, state.shape, chunk)
        nothing = torch.empty(frames, 0, width, colours, dtype=torch.uint8, device=self._device)
        own = nothing
        if state.slice is not None:
            self._set(state)
            (own,) = self._slice.run(state.slice, chunk)
            self._set(None)
        delivered = state.peers.deliver(own, 1, height // state.shape[3])
        return (nothing if delivered is None else delivered,)

    def export(self, state: RowState) -> Any:
        own = None if state.slice is None else self._slice.export(state.slice)
        return {"shape": list(state.shape), "slice": own, "beyond": copied(state.beyond)}

    def restore(self, exported: Any) -> RowState:
        shape, own = tuple(exported["shape"]), exported["slice"]
        slice_state = None if own is None else self._slice.restore(own)
        return RowState(RowPeers(self._axis, shape[3]), shape, slice_state, copied(exported["beyond"]))
