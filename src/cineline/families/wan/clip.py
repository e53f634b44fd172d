"""Wan 2.1's image encoder, CLIP's vision half (Radford et al. 2021, arXiv 2103.00020): images to what prompts stand
beside."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from cineline.errors import CheckpointError, reason, shown
from cineline.families.wan.spec import WanSpec
from cineline.weights.files import Weights
from cineline.weights.sources import open_source

PREFIX = "vision_model."
"""Before all names of the files that transformers wrote before its version 5."""

UNUSED = ("position_ids", "visual_projection")
"""In old files numbers from 0 on; a projection behind the last layer, which the official folders' class has."""


class ClipEncoder:
    """All but its last layer, as diffusers takes `hidden_states[-2]`; the last one's weights are not read.

    Attributes:
        bytes_read: of the weights.

    Raises:
        CheckpointError: weights or the image processor cannot be loaded.
    """

    def __init__(self, spec: WanSpec, dtype: torch.dtype, device: torch.device) -> None:
        component, home = spec.component("image_encoder"), spec.folder / "image_processor"
        self._dtype, self._device = dtype, device
        try:
            self._processor = CLIPImageProcessor.from_pretrained(home, local_files_only=True)
        except Exception as error:  # of files that are broken it raises anything
            raise CheckpointError(f"{shown(home)} cannot be loaded ({reason(error)}): download it again.") from None
        source = open_source(component.path, component.variant)
        weights = Weights(source, {name.removeprefix(PREFIX): name for name in source.stored})
        with torch.device("meta"):
            model = CLIPVisionModel(CLIPVisionConfig.from_dict(dict(component.config)))
        weights.check_names(model.state_dict(), ignored=UNUSED)
        del model.encoder.layers[-1]
        model.post_layernorm = nn.Identity()
        weights.load(model, dtype, device)
        positions = torch.arange(spec.picture_rows, device=device).unsqueeze(0)
        model.embeddings.register_buffer("position_ids", positions, persistent=False)
        self._model, self.bytes_read = model, weights.bytes_read

    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """[images, rows, width] of images in any shape."""
        pixels = self._processor(images=list(images), return_tensors="pt").pixel_values
        model = self._model
        hidden = model.pre_layrnorm(model.embeddings(pixels.to(self._device)))
        for layer in model.encoder.layers:
            hidden = layer(hidden, None)
        return hidden  # type: ignore[no-any-return]
