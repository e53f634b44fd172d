"""One division of one Wan model on given devices: seconds of each item, and bytes that travel (no torch).

Legend: S tokens, D model width, H' x W' latents a frame. A stage's lanes (ring, ulysses, tp) count as one rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from cineline.core.config import ParallelConfig, Place
from cineline.core.hardware import Device, Link, Rates
from cineline.core.request import Job, Kind, Value, WorkItem
from cineline.core.work import ITEMSIZE, Work
from cineline.families.wan.constants import TEXT_TOKENS, TIME_ROWS
from cineline.families.wan.costs.model import ModelCosts, Shapes
from cineline.families.wan_vae.constants import TILE, TILE_STRIDE

HISTORY = 4
"""Latents that a multistep solver keeps (UniPC: two predictions, the sample, the corrector's)."""

TILE_OVERLAP = (TILE / TILE_STRIDE) ** 2
"""Times the picture that the tiles cover."""


@dataclass(frozen=True)
class TimedLine:
    """Seconds of items on one line.

    Attributes:
        spec: the model. costs: its components'.
        parallel: nothing left open.
        devices: of each stage. link: between stages, and between the lanes of one.
        job: the request that buffers and caches are made for.
    """

    spec: Shapes
    costs: ModelCosts
    parallel: ParallelConfig
    devices: Sequence[Device]
    link: Link
    job: Job

    # What the model and the request are like.

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.costs.dtype]

    @property
    def vae_itemsize(self) -> int:
        return ITEMSIZE[self.costs.vae_dtype]

    def cells(self, job: Job) -> int:
        """H' x W'."""
        return math.prod(self.spec.latent_shape(job)[3:])

    def tokens(self, job: Job) -> int:
        """S."""
        return math.prod(self.spec.latent_shape(job)[2:]) // self.costs.transformer.patch

    def own_tokens(self, job: Job) -> int:
        """Of one rank of a stage."""
        return -(-self.tokens(job) // (self.parallel.ring * self.parallel.ulysses))

    def latent_bytes(self, job: Job) -> int:
        """Of the latents, float32."""
        return math.prod(self.spec.latent_shape(job)) * 4

    def branches(self, job: Job) -> int:
        """Forwards a step in each line."""
        return 1 if self.parallel.cfg == 2 else job.branches

    def per_token(self, job: Job) -> bool:
        """Tokens of the first frame have a time of their own."""
        return self.spec.kind == "ti2v" and job.has_image

    def expert(self, job: Job, step: int) -> int:
        """Which expert makes a step."""
        return 0 if step < self.spec.high_steps(job) else 1

    @cached_property
    def blocks(self) -> list[int]:
        """On each stage, of each expert that it has."""
        return [len(blocks) for blocks in self.parallel.blocks(self.costs.transformer.layers)]

    # Time.

    def rates(self, stage: int) -> Rates:
        """Of the stage's device."""
        return self.devices[stage].rates(self.costs.dtype, self.costs.vae_dtype)

    def link_between(self, stages: Sequence[int]) -> Link:
        """The link as it is between these stages' devices."""
        return self.link.between(*(self.devices[stage] for stage in stages))

    def compute_s(self, place: Place, item: WorkItem, job: Job) -> float:
        """Seconds of an item on a rank, collectives within its stage included."""
        if item.kind is Kind.TEXT:
            return self.text_s(place.pp)
        if item.kind is Kind.ENCODE:
            return self.encode_s(job) if place.pp == 0 else 0.0
        if item.kind is Kind.DENOISE and item.number in job.skipped:
            return self.skipped_s(place.pp, self.expert(job, item.number), job)
        if item.kind is Kind.DENOISE:
            return self.denoise_s(place.pp, self.expert(job, item.number), job)
        return self.decode_s(place.pp, item.number, job) if item.kind is Kind.DECODE else 0.0

    def text_s(self, stage: int) -> float:
        """One prompt through the stage's layers."""
        assert self.parallel.text_split is not None
        layers = self.parallel.text_split[stage]
        return self.rates(stage).seconds(self.costs.text.layer_work(self.itemsize) * layers)

    def encode_s(self, job: Job) -> float:
        """Conditioning on the head: times, texts, image."""
        rows = self.tokens(job) if self.spec.kind == "ti2v" else 1
        work = self.costs.transformer.condition_work(job.steps, self.branches(job) * self.costs.experts, rows)
        if job.has_image:
            chunks = 1 if self.spec.kind == "ti2v" else self.spec.latent_shape(job)[2]
            work += self.costs.vae.encode_work(self.cells(job), chunks, self.vae_itemsize)
            work += self.costs.image.work(self.vae_itemsize)
        return self.rates(0).seconds(work)

    def denoise_s(self, stage: int, expert: int, job: Job) -> float:
        """One forward through the stage's blocks, and what stands before and after them."""
        route = self.parallel.route(expert)
        if stage not in route:
            return 0.0
        ends, own = Work(), self.own_tokens(job)
        if stage == route.start:
            ends += self.costs.transformer.embed_work(self.tokens(job), self.itemsize)
        if stage == route.stop - 1:
            ends += self.costs.transformer.predict_work(own, self.itemsize)
        return self.blocks[stage] * self.block_s(stage, job) + self.rates(stage).seconds(ends)

    def skipped_s(self, stage: int, expert: int, job: Job) -> float:
        """What stands before and after the blocks, on the last stage of the expert's."""
        if stage != self.parallel.route(expert)[-1]:
            return 0.0
        embed = self.costs.transformer.embed_work(self.tokens(job), self.itemsize)
        return self.rates(stage).seconds(
            embed + self.costs.transformer.predict_work(self.own_tokens(job), self.itemsize)
        )

    def block_s(self, stage: int, job: Job) -> float:
        """One block on one rank, with what its ranks exchange."""
        axes, rates = self.parallel, self.rates(stage)
        work = self.costs.transformer.block_work(
            self.tokens(job), self.itemsize, self.per_token(job), axes.ring * axes.ulysses, axes.tp
        )
        ring = max(0.0, self.ring_s(job) - work.attention / rates.attention)  # it travels while attention computes
        return rates.seconds(work) + self.ulysses_s(job) + ring + self.tp_s(job)

    def ulysses_s(self, job: Job) -> float:
        """Queries, keys, values and outputs, tokens for heads."""
        ranks = self.parallel.ulysses
        if ranks == 1:
            return 0.0
        sent = 4 * self.hidden_bytes(job) / self.parallel.tp * (ranks - 1) / ranks
        return 2 * self.link.latency_s + self.link_between([0]).seconds(sent)

    def ring_s(self, job: Job) -> float:
        """Keys and values, once round."""
        hops = self.parallel.ring - 1
        sent = 2 * self.hidden_bytes(job) / self.parallel.tp
        return hops * self.link_between([0]).seconds(sent) if hops else 0.0

    def tp_s(self, job: Job) -> float:
        """Three sums of hidden states, four of a norm's squares."""
        ranks = self.parallel.tp
        if ranks == 1:
            return 0.0
        share = 2 * (ranks - 1) / ranks
        link = self.link_between([0])
        return 3 * link.seconds(share * self.hidden_bytes(job)) + 4 * link.seconds(share * self.own_tokens(job) * 4)

    def hidden_bytes(self, job: Job) -> int:
        """Of one rank's hidden states."""
        return self.costs.transformer.hidden_bytes(self.own_tokens(job), self.itemsize)

    def decode_s(self, stage: int, chunk: int, job: Job) -> float:
        """One chunk through the stage's units."""
        how, cells, size = self.parallel.vae_decode, self.cells(job), self.vae_itemsize
        if how == "tiled" and chunk < job.chunks - 1:
            return 0.0
        works = [unit.work(cells, chunk == 0, size) for unit in self.costs.units_on(self.parallel, stage)]
        seconds = self.rates(stage).seconds(sum(works, Work()))
        if how == "tiled":
            return seconds * TILE_OVERLAP * job.chunks
        if how == "rows":
            return seconds / self.parallel.pp + self.halo_s(job)
        return seconds

    def halo_s(self, job: Job) -> float:
        """By rows: a row to each neighbour at every convolution, the middle's keys and values to all."""
        if self.parallel.pp == 1:
            return 0.0
        link, size = self.link_between(range(self.parallel.pp)), self.vae_itemsize
        columns = self.spec.latent_shape(job)[4]
        seconds = 0.0
        for unit in self.costs.vae.decoder:
            for conv in (conv for conv in unit.convs if conv.volume in (9, 27)):
                seconds += link.seconds(conv.taken.channels * conv.taken.frames * conv.taken.side * columns * size)
            if unit.attends:
                seconds += link.seconds(2 * unit.taken.frame(self.cells(job)) * size)
        return seconds

    def transfer_s(self, value: Value, item: WorkItem, job: Job) -> float:
        """Seconds of the message in which a value travels that the item makes; of a decode's the largest one."""
        nbytes = self.message_bytes(value, item, job)
        return self.link_between(range(self.parallel.pp)).seconds(nbytes)

    def message_bytes(self, value: Value, item: WorkItem, job: Job) -> int:
        """What travels."""
        match value:
            case Value.EMBEDDING:
                return TEXT_TOKENS * self.costs.transformer.text_width * self.itemsize
            case Value.PREDICTION:
                return self.latent_bytes(job) * self.itemsize // 4
            case Value.LATENTS:
                return self.latent_bytes(job)
            case Value.HISTORY:
                return self.latent_bytes(job) * HISTORY
            case _:
                stages = self.parallel.decoders if item.kind is Kind.DECODE else range(self.parallel.pp)
                return max((self.forward_bytes(stage, item, job) for stage in stages[1:]), default=0)

    def forward_bytes(self, stage: int, item: WorkItem, job: Job) -> int:
        """What comes to a stage from the one before it."""
        if item.kind is Kind.TEXT:
            return self.costs.text.hidden_bytes(self.itemsize)
        if item.kind is Kind.ENCODE:
            return self.conditioning_bytes(job)
        if item.kind is Kind.DENOISE:
            return self.hidden_bytes(job)
        if item.kind is Kind.DROP or self.parallel.vae_decode != "layers":
            return 0
        assert self.parallel.vae_split is not None
        unit = sum(self.parallel.vae_split[:stage])
        return self.costs.vae.boundary_bytes(unit, self.cells(job), item.number == 0, self.vae_itemsize)

    def conditioning_bytes(self, job: Job) -> int:
        """What the head hands to all stages."""
        width, experts = self.costs.transformer.width, self.costs.experts
        shown = TEXT_TOKENS + self.costs.transformer.image_rows
        texts = experts * self.branches(job) * shown * width * self.itemsize
        rows = TIME_ROWS if self.spec.kind == "ti2v" else 1
        times = job.steps * rows * 7 * width * self.itemsize
        beside = self.beside_bytes(job) if job.skipped else 0
        return texts + times + beside + (job.steps * self.tokens(job) if self.spec.kind == "ti2v" else 0)

    def beside_bytes(self, job: Job) -> int:
        """Of an I2V model's channels beside the latents."""
        model = self.costs.transformer
        return self.latent_bytes(job) * (model.channels_in - model.channels_out) // model.channels_out
