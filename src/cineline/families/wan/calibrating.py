"""A Wan model that is run for its ratios for MagCache (no torch)."""

from __future__ import annotations

from dataclasses import fields, replace

from cineline.core.request import VideoRequest
from cineline.families.wan.job import WanJob
from cineline.families.wan.spec import WanSpec


class CalibratingSpec(WanSpec):
    """A model whose requests give their ratios in place of latents, as `residuals.measured` has them."""

    @classmethod
    def of(cls, spec: WanSpec) -> CalibratingSpec:
        return cls(**{each.name: getattr(spec, each.name) for each in fields(spec)})

    def resolve(self, request: VideoRequest, number: int) -> WanJob:
        """See `FamilySpec.resolve`; nothing is skipped, no branch left out, and nothing decoded."""
        plain = request.model_copy(update={"cache": None, "decode": False})
        return replace(super().resolve(plain, number), calibrates=True, unguided=())
