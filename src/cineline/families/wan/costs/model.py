"""A whole model's costs, and what each rank holds of its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cineline.core.config import Dtype, ParallelConfig, Place
from cineline.core.request import Job
from cineline.core.work import ITEMSIZE
from cineline.families.wan.costs.clip import ClipCosts
from cineline.families.wan.costs.text import TextCosts
from cineline.families.wan.costs.transformer import TransformerCosts
from cineline.families.wan_vae.costs import VaeCosts


class Shapes(Protocol):
    """A model's configs, and what follows from them for a job; a `WanSpec` has them."""

    @property
    def kind(self) -> str: ...
    @property
    def experts(self) -> tuple[str, ...]: ...
    @property
    def beside(self) -> tuple[tuple[int, ...], ...]: ...
    @property
    def transformer(self) -> Mapping[str, Any]: ...
    @property
    def text(self) -> Mapping[str, Any]: ...
    @property
    def vae(self) -> Mapping[str, Any]: ...
    @property
    def vae_scale(self) -> int: ...
    @property
    def image(self) -> Mapping[str, Any] | None: ...
    @property
    def pictures(self) -> int: ...
    @property
    def picture_rows(self) -> int: ...

    def latent_shape(self, job: Job) -> tuple[int, int, int, int, int]: ...
    def high_steps(self, job: Job) -> int: ...


LATENTS = 1560
"""H' x W' that the decoder's units are compared for (480x832 and Wan 2.1's VAE); shares hardly depend on it."""


@dataclass(frozen=True)
class Held:
    """Bytes of the weights that a rank holds.

    Attributes:
        transformer: of all experts. text: of the encoder. vae: of both halves. image: of the CLIP encoder.
    """

    transformer: int
    text: int
    vae: int
    image: int = 0

    @property
    def total(self) -> int:
        return self.transformer + self.text + self.vae + self.image


@dataclass(frozen=True)
class ModelCosts:
    """The costs of a model's components (`core.costs.Costs`).

    Attributes:
        kind: ti2v, t2v or i2v; only t2v has no use for the VAE's encoder.
        experts: transformers.
        dtype, vae_dtype: of transformers and text encoder, and of the VAE and the CLIP encoder.
        beside: of each expert, the numbers of LoRAs that are kept beside each block.
    """

    kind: str
    experts: int
    transformer: TransformerCosts
    text: TextCosts
    vae: VaeCosts
    dtype: Dtype
    vae_dtype: Dtype
    image: ClipCosts
    beside: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(cls, shapes: Shapes, dtype: Dtype, vae_dtype: Dtype) -> ModelCosts:
        """From a model's configs."""
        return cls(
            shapes.kind,
            len(shapes.experts),
            TransformerCosts.of(shapes.transformer, shapes.pictures * shapes.picture_rows),
            TextCosts.of(shapes.text, dtype),
            VaeCosts.of(shapes.vae),
            dtype,
            vae_dtype,
            ClipCosts.of(shapes.image, shapes.picture_rows, shapes.pictures),
            shapes.beside,
        )

    @property
    def blocks(self) -> int:
        return self.transformer.layers

    @property
    def text_layers(self) -> int:
        return self.text.layers

    @property
    def text_layer_bytes(self) -> int:
        return self.text.layer.nbytes(self.dtype)

    @property
    def decoder_bytes(self) -> Sequence[int]:
        return [unit.parameters.nbytes(self.vae_dtype) for unit in self.vae.decoder]

    @property
    def decoder_flop(self) -> Sequence[int]:
        return [unit.flop(LATENTS) for unit in self.vae.decoder]

    @property
    def encodes_images(self) -> bool:
        return self.kind != "t2v"

    @property
    def whole(self) -> Held:
        """All that one rank alone holds."""
        transformer = self.transformer.whole.nbytes(self.dtype) * self.experts
        transformer += sum(map(sum, self.beside)) * ITEMSIZE[self.dtype]
        vae = sum(self.decoder_bytes) + self._ends_of_vae()
        return Held(transformer, self.text.whole.nbytes(self.dtype), vae, self._image_bytes)

    @property
    def _image_bytes(self) -> int:
        return self.image.parameters.nbytes(self.vae_dtype)

    def _ends_of_vae(self) -> int:
        encoder = self.vae.encoder_parameters.nbytes(self.vae_dtype) if self.encodes_images else 0
        return encoder + self.vae.before_decoder.nbytes(self.vae_dtype)

    def held(self, parallel: ParallelConfig, place: Place) -> Held:
        """What the rank at `place` holds; of the config nothing is open."""
        return Held(
            self.held_of_experts(parallel, place),
            self._held_of_text(parallel, place),
            self._held_of_vae(parallel, place),
            self._image_bytes if place == Place(cfg=place.cfg) else 0,
        )

    def held_bytes(self, parallel: ParallelConfig, place: Place) -> int:
        """See `core.costs.Costs`."""
        return self.held(parallel, place).total

    def experts_on(self, parallel: ParallelConfig, stage: int) -> int:
        """Experts of which the stage has blocks."""
        return self.experts if parallel.expert_placement == "shared" else 1

    def held_of_experts(self, parallel: ParallelConfig, place: Place) -> int:
        """Blocks, and what stands before and after them."""
        parts, dtype, stage = self.transformer, self.dtype, place.pp
        on, groups = self.experts_on(parallel, stage), parallel.groups
        blocks = len(parallel.blocks(parts.layers)[stage])
        held = on * blocks * parts.block_shard(parallel.tp).nbytes(dtype)
        if stage == 0:
            held += self.experts * parts.condition_embedder.nbytes(dtype)
        ends = {group.stop - 1 for group in groups}
        if stage in ends | {group.start for group in groups}:  # a skipped step begins where it ends
            held += on * parts.patch_embedding.nbytes(dtype)
        if stage in ends:
            held += on * parts.output_head.nbytes(dtype)
        return held + self._held_of_loras(parallel, stage)

    def _held_of_loras(self, parallel: ParallelConfig, stage: int) -> int:
        """Beside the blocks there; of one that is cut by `tp` a share of a factor's is counted as the whole."""
        blocks, alone = parallel.blocks(self.blocks)[stage], parallel.expert_placement == "split"
        group = next(number for number, stages in enumerate(parallel.groups) if stage in stages)
        kept = self.beside[group : group + 1] if alone else self.beside
        return sum(counts[block] for counts in kept for block in blocks) * ITEMSIZE[self.dtype]

    def _held_of_text(self, parallel: ParallelConfig, place: Place) -> int:
        if not place.is_first_lane:
            return 0
        assert parallel.text_split is not None
        held = parallel.text_split[place.pp] * self.text.layer.nbytes(self.dtype)
        held += self.text.embedding.nbytes(self.dtype) if place.pp == 0 else 0
        return held + (self.text.last_norm.nbytes(self.dtype) if place.pp == parallel.pp - 1 else 0)

    def _held_of_vae(self, parallel: ParallelConfig, place: Place) -> int:
        held = 0
        if self.encodes_images and place == Place(cfg=place.cfg):
            held += self.vae.encoder_parameters.nbytes(self.vae_dtype)
        if place.leads:
            held += sum(unit.parameters.nbytes(self.vae_dtype) for unit in self.units_on(parallel, place.pp))
            if parallel.takes_latents(place.pp):
                held += self.vae.before_decoder.nbytes(self.vae_dtype)
        return held

    def units_on(self, parallel: ParallelConfig, stage: int) -> tuple[Any, ...]:
        """The decoder's units there."""
        if parallel.vae_decode != "layers":
            return self.vae.decoder if stage in parallel.decoders else ()
        assert parallel.vae_split is not None
        start = sum(parallel.vae_split[:stage])
        return self.vae.decoder[start : start + parallel.vae_split[stage]]
