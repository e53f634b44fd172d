"""A rank's part in decoding: which decoder it is, and a request's way through it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cineline.core.request import WorkItem
from cineline.families.pipeline_parallel import StagePart
from cineline.families.wan.spec import WanSpec
from cineline.families.wan.state import WanState
from cineline.families.wan.vae import vae_of
from cineline.families.wan_vae.costs import VaeCosts
from cineline.families.wan_vae.decoder import Decoder, DecoderSlice, TiledDecoder, boundary_specs
from cineline.families.wan_vae.rows import RowDecoder
from cineline.transport.channel import TensorSpec


class DecoderPart:
    """The VAE's decoder, as `ParallelConfig.vae_decode` divides it.

    Attributes:
        bytes_read: of the weights.
    """

    def __init__(self, spec: WanSpec, part: StagePart) -> None:
        self._part, self._dtype = part, getattr(torch, part.config.vae_dtype)
        self._costs = VaeCosts.of(spec.vae)
        self._decoder = self._load(spec) if part.decodes else None
        self.bytes_read = self._decoder.bytes_read if self._decoder else 0

    def _load(self, spec: WanSpec) -> Decoder:
        vae, part = vae_of(spec), self._part
        dtype, device = self._dtype, part.device
        if part.parallel.vae_decode == "rows":
            return RowDecoder(vae, dtype, device, part.axis("pp"))
        if part.parallel.vae_decode == "tiled":
            return TiledDecoder(vae, dtype, device)
        return DecoderSlice(vae, part.cut.decoder, dtype, device, part.takes_latents)

    def specs(self, state: WanState, item: WorkItem) -> tuple[TensorSpec, ...]:
        """Of what comes from the stage before."""
        return boundary_specs(self._costs, state.latent_shape, item.number, self._part.cut.decoder.start, self._dtype)

    def compute(self, state: WanState, item: WorkItem, starts: bool, ends: bool) -> None:
        """A latent frame, in order; a decode begins with the final latents."""
        assert self._decoder is not None
        if state.decoding is None:
            state.decoding = self._decoder.start(self._latents(state) if self._part.takes_latents else None)
        state.hidden = self._decoder.run(state.decoding, item.number, state.take_hidden())

    def _latents(self, state: WanState) -> Tensor:
        """Final latents [1, C, F', H', W'], where a decode begins; by rows that is on every stage."""
        if not self._part.parallel.decodes_together:
            return state.final_latents()
        if self._part.is_tail:
            latents = state.final_latents()
        else:
            latents = torch.empty(state.latent_shape, device=self._part.device)
        return self._part.axis("pp").broadcast(latents, self._part.parallel.pp - 1)

    def export(self, state: WanState) -> Any:
        """A copy of the decode under way; None where there is none."""
        return self._decoder.export(state.decoding) if self._decoder and state.decoding is not None else None

    def restore(self, state: WanState, exported: Any) -> None:
        """Go on with it."""
        if exported is not None:
            assert self._decoder is not None
            state.decoding = self._decoder.restore(exported)
