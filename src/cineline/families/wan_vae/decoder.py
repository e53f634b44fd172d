"""Latents to frames, by diffusers' own decoder modules: all of them on one rank, or cut over the stages.

A chunk is one latent frame. Legend: C latent channels, F' latent frames, H' x W' latents a frame; F frames of
H x W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import CACHE_T, WanCausalConv3d, unpatchify
from diffusers.video_processor import VideoProcessor
from torch import Tensor, nn

from cineline.families.frames import quantise
from cineline.families.snapshot import copied
from cineline.families.wan_vae.constants import TILE, TILE_STRIDE
from cineline.families.wan_vae.costs import VaeCosts
from cineline.families.wan_vae.halves import DECODER, VaeFiles, build_vae, load_half, statistics
from cineline.transport.channel import TensorSpec

Tensors = tuple[Tensor, ...]
"""What travels from slice to slice: the feature map, and within a residual block its shortcut; frames at the end."""


class Decoder(Protocol):
    """A rank's part in decoding, chunk by chunk: a slice of the layers, of the rows, or all of it."""

    @property
    def bytes_read(self) -> int:
        """Of the weights."""
        ...

    def start(self, latents: Tensor | None) -> Any:
        """Begin a request, where it is given them with its final latents [1, C, F', H', W']; its state."""
        ...

    def run(self, state: Any, chunk: int, received: Tensors = ()) -> Tensors:
        """Latent frame `chunk`, in order, with what the slice before made of it; from the end frames, uint8."""
        ...

    def export(self, state: Any) -> Any:
        """A copy of the state, with which `restore` can go on."""
        ...

    def restore(self, exported: Any) -> Any:
        """The state that was exported."""
        ...


def boundary_specs(
    costs: VaeCosts, latent_shape: Sequence[int], chunk: int, unit: int, dtype: torch.dtype
) -> tuple[TensorSpec, ...]:
    """What travels in front of a unit or behind the last one (`VaeCosts.boundary_shapes`; there uint8)."""
    kind = torch.uint8 if unit == len(costs.decoder) else dtype
    return tuple(TensorSpec(shape, kind) for shape in costs.boundary_shapes(unit, latent_shape, chunk))


@dataclass
class SliceState:
    """One request's decode under way.

    Attributes:
        latents: where they are, [1, C, F', H', W'], ready for the first unit.
        caches: the last frames that each causal convolution of the slice has seen.
    """

    latents: Tensor | None
    caches: list[Tensor | str | None] = field(default_factory=list)


class DecoderSlice:
    """Some units of the VAE's decoder, with no other weights than theirs.

    Args:
        files: the VAE.
        units: numbers of neighbours among the units (`VaeCosts.names`), maybe none; None for all.
        takes_latents: this slice is given the latents (the first one, which may have no units): their way
            into the decoder, `post_quant_conv`, is here.

    Attributes:
        bytes_read: of the weights.
    """

    def __init__(
        self,
        files: VaeFiles,
        units: range | None,
        dtype: torch.dtype,
        device: torch.device,
        takes_latents: bool,
    ) -> None:
        vae, weights = build_vae(files)
        names = VaeCosts.of(vae.config).names
        self.config = vae.config
        self._dtype = dtype
        self._device = device
        self._statistics = statistics(vae.config, dtype, device)
        self._processor = VideoProcessor(vae_scale_factor=vae.config.scale_factor_spatial)
        self._activation = vae.decoder.nonlinearity
        self._modules: dict[str, nn.Module] = {}
        self._units = [names[number] for number in (range(len(names)) if units is None else units)]
        inside = ["post_quant_conv"] if takes_latents else []
        for unit in self._units:
            inside += [f"decoder.{name}" for name in _modules_of(unit)]
        for name in inside:
            module = vae.get_submodule(name)
            weights.load(module, dtype, device, aliases={key: f"{name}.{key}" for key in module.state_dict()})
            self._modules[name.removeprefix("decoder.")] = module
        self._shortcuts = {unit: _shortcut_of(vae.decoder, unit) for unit in self._units}
        self._convolutions = sum(isinstance(module, WanCausalConv3d) for _, module in self.modules())
        self.bytes_read = weights.bytes_read

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """diffusers' modules of the slice and all that is in them, with their names, in the order of its units."""
        for name, module in self._modules.items():
            yield from module.named_modules(prefix=name)

    def start(self, latents: Tensor | None) -> SliceState:
        """Begin a request, with its final latents [1, C, F', H', W'] where the slice takes them."""
        if latents is not None:
            latents = latents.to(self._device, self._dtype)
            mean, inverse_std = self._statistics
            latents = self._modules["post_quant_conv"](latents / inverse_std + mean)
        return SliceState(latents, [None] * self._convolutions)

    def run(self, state: SliceState, chunk: int, received: Tensors = ()) -> Tensors:
        """One chunk through the units; chunks come in order.

        Args:
            received: from the slice before; the first slice takes a frame of its latents.

        Returns:
            what the next slice takes; with the last unit frames uint8 [F, H, W, 3].
        """
        if state.latents is not None:
            received = (state.latents[:, :, chunk : chunk + 1],)
        hidden, shortcut = received[0], received[1] if len(received) > 1 else None
        del received
        place = [0]
        for unit in self._units:
            around = self._shortcuts[unit]
            if unit.endswith("resnets.0") and around is not None:
                shortcut = hidden
            hidden = self._run_unit(unit, hidden, state.caches, place)
            if unit.endswith("upsampler") and around is not None:
                hidden = hidden + around(shortcut, first_chunk=chunk == 0)
                shortcut = None
        return (hidden,) if shortcut is None else (hidden, shortcut)

    def export(self, state: SliceState) -> Any:
        return copied({"latents": state.latents, "caches": state.caches})

    def restore(self, exported: Any) -> SliceState:
        return SliceState(**copied(exported))

    def _run_unit(self, unit: str, hidden: Tensor, caches: list[Tensor | str | None], place: list[int]) -> Tensor:
        """A unit; `place` is that of its first convolution in the caches, moved on to behind its last one."""
        if unit == "head":
            hidden = self._activation(self._modules["norm_out"](hidden))
            return self._to_frames(_convolve(self._modules["conv_out"], hidden, caches, place))
        module = self._modules[unit]
        if unit == "conv_in":
            return _convolve(module, hidden, caches, place)
        if unit.startswith("mid_block.attentions"):
            return module(hidden)  # type: ignore[no-any-return]
        return module(hidden, feat_cache=caches, feat_idx=place)  # type: ignore[no-any-return]

    def _to_frames(self, pixels: Tensor) -> Tensor:
        """As the end of `AutoencoderKLWan._decode`, then `VaeImageProcessor.numpy_to_pil`: uint8 [F, H, W, 3]."""
        if self.config.patch_size is not None:
            pixels = unpatchify(pixels, patch_size=self.config.patch_size)
        return quantise(self._processor, torch.clamp(pixels, min=-1.0, max=1.0))


def _modules_of(unit: str) -> list[str]:
    return ["norm_out", "conv_out"] if unit == "head" else [unit]


def _shortcut_of(decoder: Any, unit: str) -> Any:
    """The residual up block's shortcut around a unit, which has no weights; None where there is none."""
    if not unit.startswith("up_blocks"):
        return None
    return getattr(decoder.up_blocks[int(unit.split(".")[1])], "avg_shortcut", None)


def _convolve(convolution: nn.Module, hidden: Tensor, caches: list[Tensor | str | None], place: list[int]) -> Tensor:
    """A causal convolution that is not inside a block, with its cache (as in `WanDecoder3d.forward`)."""
    (number,) = place
    before = caches[number]
    kept = hidden[:, :, -CACHE_T:].clone()
    if kept.shape[2] < CACHE_T and isinstance(before, Tensor):
        kept = torch.cat([before[:, :, -1:], kept], dim=2)
    caches[number] = kept
    place[0] += 1
    return convolution(hidden, before)  # type: ignore[no-any-return]


class TiledDecoder:
    """The whole decoder on one rank in overlapping tiles, by diffusers' own tiling; a `Decoder`.

    Lossy: tiles do not see each other, and where they overlap they are blended. All frames come with the last
    chunk, none with those before.

    Attributes:
        bytes_read: of the weights.
    """

    def __init__(self, files: VaeFiles, dtype: torch.dtype, device: torch.device) -> None:
        self._vae, self.bytes_read = load_half(files, DECODER, dtype, device)
        self._vae.enable_tiling(TILE, TILE, TILE_STRIDE, TILE_STRIDE)
        self._dtype = dtype
        self._device = device
        self._statistics = statistics(self._vae.config, dtype, device)
        self._processor = VideoProcessor(vae_scale_factor=self._vae.config.scale_factor_spatial)

    def start(self, latents: Tensor | None) -> Tensor:
        assert latents is not None
        latents = latents.to(self._device, self._dtype)
        mean, inverse_std = self._statistics
        return latents / inverse_std + mean

    def run(self, state: Tensor, chunk: int, received: Tensors = ()) -> Tensors:
        frames, height, width = state.shape[2:]
        scale = self._vae.config.scale_factor_spatial
        if chunk + 1 < frames:
            return (torch.empty(0, height * scale, width * scale, 3, dtype=torch.uint8, device=self._device),)
        return (quantise(self._processor, self._vae.decode(state, return_dict=False)[0]),)

    def export(self, state: Tensor) -> Any:
        return state.clone()

    def restore(self, exported: Tensor) -> Tensor:
        return exported.clone()
