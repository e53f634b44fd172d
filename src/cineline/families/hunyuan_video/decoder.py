"""The decoder of HunyuanVideo 1.5's VAE, cut over the stages: diffusers' own modules, one after another."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLHunyuanVideo15
from diffusers.video_processor import VideoProcessor
from torch import Tensor, nn

from cineline.families.frames import quantise
from cineline.families.hunyuan_video.spec import HunyuanVideoSpec
from cineline.families.hunyuan_video.vae import HunyuanVae
from cineline.families.pipeline_parallel import StagePart
from cineline.weights.files import Weights
from cineline.weights.sources import open_source

MODULES = {"head": ("norm_out", "conv_out")}
"""Of units that are several."""


class HunyuanDecoder:
    """This stage's units, with no other weights than theirs.

    Attributes:
        bytes_read: of the weights.
    """

    def __init__(self, spec: HunyuanVideoSpec, part: StagePart) -> None:
        weights = Weights(open_source(spec.folder / "vae", spec.variant))
        with torch.device("meta"):
            vae = AutoencoderKLHunyuanVideo15.from_config(dict(spec.configs["vae"]))
        weights.check_names(vae.state_dict())
        self._dtype, self._device = getattr(torch, part.config.vae_dtype), part.device
        self._scaling, self._repeat = vae.config.scaling_factor, vae.decoder.repeat
        self._activation, self._takes = vae.decoder.conv_act, part.takes_latents
        self._processor = VideoProcessor(vae_scale_factor=spec.vae_scale)
        units = HunyuanVae.of(spec.configs["vae"]).units
        self._units = [units[number].name for number in part.cut.decoder]
        self._modules: dict[str, nn.Module] = {}
        for name in (name for unit in self._units for name in MODULES.get(unit, (unit,))):
            module = vae.decoder.get_submodule(name)
            stored = {key: f"decoder.{name}.{key}" for key in module.state_dict()}
            weights.load(module, self._dtype, part.device, aliases=stored)
            self._modules[name] = module
        self.bytes_read = weights.bytes_read

    def run(self, hidden: Tensor) -> Tensor:
        """What this stage makes of final latents [1, C, F', H', W'], or of what the stage before has made; with the
        last unit frames uint8 [F, H, W, 3]."""
        if self._takes:
            hidden = hidden.to(self._dtype) / self._scaling
        for unit in self._units:
            hidden = self._run_unit(unit, hidden)
        return hidden

    def _run_unit(self, unit: str, hidden: Tensor) -> Tensor:
        if unit == "conv_in":
            made: Tensor = self._modules[unit](hidden) + hidden.repeat_interleave(repeats=self._repeat, dim=1)
            return made
        if unit == "head":
            pixels = self._modules["conv_out"](self._activation(self._modules["norm_out"](hidden)))
            return quantise(self._processor, pixels)
        return self._modules[unit](hidden)  # type: ignore[no-any-return]
