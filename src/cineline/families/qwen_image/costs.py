"""What Qwen-Image's parts weigh and compute (no torch).

Legend: S tokens of the picture, T of a prompt, D model width, F = 4 D.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cineline.core.config import Dtype
from cineline.core.request import Branch, Job
from cineline.core.work import Parameters, Work
from cineline.families.double_stream import double_block, double_work
from cineline.families.qwen_image.vae import wan_config
from cineline.families.qwen_vl_costs import QwenText
from cineline.families.stack import Stack, StackCosts, StackLine
from cineline.families.wan_vae.costs import VaeCosts

FREQUENCIES = 256
"""Of a timestep's embedding."""

CELLS = 166 * 166
"""H' x W' that the decoder's units are compared for (1328 x 1328 pixels)."""


@dataclass(frozen=True, kw_only=True)
class QwenCosts(StackCosts):
    """The model's weights.

    Attributes:
        width: D. head: of one head of attention. encoder: the text encoder. vae: the VAE.
    """

    width: int
    head: int
    encoder: QwenText
    vae: VaeCosts

    @classmethod
    def of(cls, configs: Mapping[str, Mapping[str, Any]], dtype: Dtype, vae_dtype: Dtype) -> QwenCosts:
        """From the configs of a checkpoint's components; what they leave out is as in diffusers."""
        own, encoder = configs["transformer"], QwenText.of(configs["text_encoder"])
        head = int(own.get("attention_head_dim", 128))
        d = head * int(own.get("num_attention_heads", 24))
        text, packed = int(own.get("joint_attention_dim", 3584)), int(own.get("in_channels", 64))
        out = int(own.get("patch_size", 2)) ** 2 * int(own.get("out_channels", 16) or packed)
        first = text + text * d + d + packed * d + d + FREQUENCIES * d + d + d * d + d
        last = d * 2 * d + 2 * d + d * out + out
        vae = VaeCosts.of(wan_config(configs["vae"]))
        return cls(
            transformer=Stack(
                int(own.get("num_layers", 60)), double_block(d, head, 1), Parameters(first), Parameters(last)
            ),
            text=encoder.stack(encoder.layers, last_norm=True),
            decoder=tuple(unit.parameters for unit in vae.decoder),
            before_decoder=vae.before_decoder,
            dtype=dtype,
            vae_dtype=vae_dtype,
            width=d,
            head=head,
            encoder=encoder,
            vae=vae,
        )

    def block_shard(self, tp: int) -> Parameters:
        """See `StackCosts`."""
        return double_block(self.width, self.head, tp)

    @property
    def decoder_flop(self) -> Sequence[int]:
        """Of each unit for the one chunk there is."""
        return [unit.flop(CELLS, first=True) for unit in self.vae.decoder]


@dataclass(frozen=True)
class QwenLine(StackLine):
    """One division of it on given devices."""

    def _rows(self, job: Job) -> tuple[int, int]:
        """S, and T of the longer prompt."""
        texts: list[int] = [job.text_rows(Branch(branch)) for branch in range(job.branches)]  # type: ignore[attr-defined]
        return self.spec.tokens(job), max(texts)

    def _prompt(self, job: Job) -> int:
        """Tokens that the text encoder sees of the longer prompt."""
        return max(len(tokens) for tokens in job.tokens)  # type: ignore[attr-defined]

    def block_work(self, job: Job) -> Work:
        """See `StackLine`."""
        return double_work(sum(self._rows(job)), self.costs.width, self.parallel.tp, self.itemsize)

    def block_workspace(self, job: Job) -> int:
        """See `StackLine`: queries, keys and values of both streams, joined; or a feed-forward's activation."""
        d, rows, tp = self.costs.width, sum(self._rows(job)), self.parallel.tp
        return int(rows * d * self.itemsize * (4 + 8 / tp))

    def ends_work(self, job: Job) -> tuple[Work, Work]:
        """See `StackLine`."""
        work = Work(linear=2 * self.spec.tokens(job) * self.costs.width * self.spec.latent_shape(job)[1] * 4, calls=1)
        return work, work

    def condition_work(self, job: Job) -> Work:
        """See `StackLine`."""
        d = self.costs.width
        text = 2 * self._rows(job)[1] * self.costs.encoder.width * d * self.branches(job)
        return Work(linear=text + job.steps * 2 * (FREQUENCIES * d + d * d), calls=job.steps + self.branches(job))

    def conditioning_bytes(self, job: Job) -> int:
        """See `StackLine`."""
        rows = self._rows(job)[1] * self.branches(job) + job.steps
        return rows * self.costs.width * self.itemsize  # type: ignore[no-any-return]

    def hidden_bytes(self, job: Job) -> int:
        """See `StackLine`: both streams."""
        return sum(self._rows(job)) * self.costs.width * self.itemsize  # type: ignore[no-any-return]

    def latent_bytes(self, job: Job) -> int:
        """See `StackLine`."""
        _, channels, _, rows, columns = self.spec.latent_shape(job)
        return channels * rows * columns * self.itemsize  # type: ignore[no-any-return]

    def text_layer_work(self, job: Job) -> Work:
        """See `StackLine`."""
        return self.costs.encoder.layer_work(self._prompt(job), self.itemsize)  # type: ignore[no-any-return]

    def text_workspace(self, job: Job) -> int:
        """See `StackLine`."""
        return self.costs.encoder.workspace(self._prompt(job), self.itemsize)  # type: ignore[no-any-return]

    def text_bytes(self, job: Job) -> int:
        """See `StackLine`."""
        return self._prompt(job) * self.costs.encoder.width * self.itemsize  # type: ignore[no-any-return]

    def _cells(self, job: Job) -> int:
        _, _, _, rows, columns = self.spec.latent_shape(job)
        return rows * columns  # type: ignore[no-any-return]

    def unit_work(self, unit: int, job: Job) -> Work:
        """See `StackLine`."""
        return self.costs.vae.decoder[unit].work(self._cells(job), True, self.vae_itemsize)  # type: ignore[no-any-return]

    def unit_workspace(self, unit: int, job: Job) -> int:
        """See `StackLine`, with the feature caches that diffusers' modules fill."""
        own = self.costs.vae.decoder[unit]
        cells, size = self._cells(job), self.vae_itemsize
        return own.workspace(cells, True, size) + own.cache_bytes(cells, size)  # type: ignore[no-any-return]

    def unit_bytes(self, unit: int, job: Job) -> int:
        """See `StackLine`."""
        return self.costs.vae.boundary_bytes(unit, self._cells(job), True, self.vae_itemsize)  # type: ignore[no-any-return]
