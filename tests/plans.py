"""Random plans for the line: how it is divided, and what is asked of it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any

from cineline.core.config import ParallelConfig
from cineline.core.request import Job

WAYS = ("layers", "rows", "tail", "tiled")


def job(number: int, steps: int = 3, branches: int = 2, texts: bool = False, chunks: int = 0) -> Job:
    """A request of which only this counts."""
    fields: dict[str, Any] = dict.fromkeys(("height", "width", "num_frames", "fps"), 1)
    fields |= {"steps": steps, "branches": branches, "texts": branches * texts, "chunks": chunks}
    fields |= {"prompt": "", "negative_prompt": "", "guidance_scale": float(branches), "seed": 0, "has_image": False}
    return Job(id=number, **fields)


@dataclass(frozen=True)
class Plan:
    """A line and its requests.

    Attributes:
        high: of each request, how many of its first steps are the first expert's.
        in_flight: requests that denoise at once; None for the default.
        skipped: of each request, steps that are skipped; its job may say others, which the scheduler goes by.
        prompts: embeddings that each head keeps.
        cancels: requests by number that are cancelled, each after so many words from the ranks.
    """

    parallel: ParallelConfig
    jobs: tuple[Job, ...]
    high: tuple[int, ...]
    in_flight: int | None = None
    cancels: dict[int, int] = field(default_factory=dict)
    prompts: int = 0
    skipped: tuple[tuple[int, ...], ...] = ()

    def settled(self, job: Job) -> Job:
        """As ranks know it."""
        return replace(job, skipped=self.skipped[job.id]) if self.skipped else job

    def experts(self, job: Job) -> list[int]:
        """Of each step."""
        return [int(step >= self.high[job.id]) for step in range(job.steps)]

    @classmethod
    def drawn(cls, draw: random.Random) -> Plan:
        """Any division of up to five stages by any product of axes, up to five requests; some begin at a later step,
        some have no guidance by one expert or both, some skip steps, some are cancelled."""
        pp = draw.randint(1, 5)
        axes: dict[str, Any] = {"pp": pp, "cfg": draw.randint(1, 2), "vae_decode": draw.choice(WAYS)}
        axes |= {axis: draw.choice([1, 1, 1, 2]) for axis in ("ring", "ulysses", "tp")}
        if draw.random() < 0.3:
            axes["text_split"] = tuple(draw.choice([0, 1]) for _ in range(pp))
        if axes["vae_decode"] == "layers" and draw.random() < 0.5:
            units = [draw.choice([0, 1, 1]) for _ in range(pp)]
            axes["vae_split"] = tuple(units) if any(units) else None
        if pp > 1 and draw.random() < 0.5:
            axes |= {"expert_placement": "split", "high_stages": draw.randint(1, pp - 1)}
        jobs = [
            job(number, draw.randint(1, 5), draw.randint(1, 2), draw.random() < 0.5, draw.choice([0, 1, 2, 6]))
            for number in range(draw.randint(1, 5))
        ]
        high = tuple(draw.randint(0, one.steps) for one in jobs)
        for number, one in enumerate(jobs):
            if one.branches == 2 and draw.random() < 0.4:
                jobs[number] = one = replace(one, unguided=draw.choice([(0,), (1,), (0, 1)]))
            if draw.random() < 0.4:
                step = draw.randrange(one.steps)
                jobs[number] = replace(one, first_step=step, first_expert=int(step >= high[number]))
        prompts = draw.choice([0, 0, 1, 2, 5])
        jobs = [replace(one, prompt=draw.choice("ab"), negative_prompt=draw.choice("abc")) for one in jobs]
        skipped = tuple(skips(draw, one, high[one.id]) for one in jobs)
        for number, one in enumerate(jobs):
            guessed = skipped[number] if draw.random() < 0.7 else skips(draw, one, draw.randint(0, one.steps))
            jobs[number] = replace(one, skipped=guessed)
        cancels = {number: draw.randint(0, 40) for number in range(len(jobs)) if draw.random() < 0.2}
        in_flight = draw.choice([None, 1, 2, 3])
        return cls(ParallelConfig(**axes), tuple(jobs), high, in_flight, cancels, prompts, skipped)


def skips(draw: random.Random, one: Job, high: int) -> tuple[int, ...]:
    """Of half of the requests some steps, none that is an expert's first or the request's."""
    share = draw.choice([0.0, 0.0, 0.4, 0.8])
    return tuple(step for step in range(one.first_step + 1, one.steps) if step != high and draw.random() < share)
