"""A request to a Wan model, with nothing left open (no torch)."""

from __future__ import annotations

from dataclasses import dataclass

from cineline.core.request import Job, Solver


@dataclass(frozen=True, kw_only=True)
class WanJob(Job):
    """A `Job` with Wan's own settings, `VideoRequest`'s resolved.

    Attributes:
        guidance_scale_2: of the second expert's steps; None where there is one expert.
        flow_shift: instead of the checkpoint's. boundary_ratio: the noise level at which the second expert takes over.
        switch_step: the step at which it does, instead.
        solver: instead of the checkpoint's. sigmas: of each step, before the shift; None for the solver's own.
        cache: "mag:T". ratios: then, of each expert, those of its steps (`mag_cache`).
        calibrates: it is run for such ratios, and gives them in place of latents.
        loras: those that it has, in their order; None where requests have no choice. lora_scales: times each one's own.
        has_last_image: whether the head is handed a last frame beside the first one.
    """

    guidance_scale_2: float | None = None
    flow_shift: float | None = None
    boundary_ratio: float | None = None
    switch_step: int | None = None
    solver: Solver | None = None
    sigmas: tuple[float, ...] | None = None
    loras: tuple[str, ...] | None = None
    lora_scales: tuple[float, ...] | None = None
    has_last_image: bool = False
    cache: str | None = None
    ratios: tuple[tuple[float, ...], ...] | None = None
    calibrates: bool = False

    @property
    def own_settings(self) -> dict[str, str]:
        """See `Job.own_settings`; without guidance there is no second scale."""
        off = {"has_last_image", "ratios", "calibrates"} | ({"guidance_scale_2"} if self.branches == 1 else set())
        own = {name: value for name, value in super().own_settings.items() if name not in off}
        return own | ({"skip_guidance_at_one": ""} if self.unguided else {})
