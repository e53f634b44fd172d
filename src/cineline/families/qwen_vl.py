"""Qwen2.5-VL's language layers, cut over the stages: the text encoder of several families (transformers' modules).

Legend: T tokens, D its width.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

from cineline.errors import CheckpointError, reason, shown
from cineline.families.pipeline_parallel import StagePart
from cineline.weights.files import Weights
from cineline.weights.sources import open_source

PREFIXES = ("model.language_model.", "language_model.model.", "model.", "")
"""Before the names of the language layers, as different versions of transformers have written them."""

PARTS = ("embed_tokens", "layers", "norm")


class QwenLayers:
    """This stage's layers, with no other weights than theirs; the whole model's other halves are not read.

    Args:
        folder: of the component. config: its text config.
        count: of the layers that are run, from the first one on.
        last_norm: whether the norm behind all of them is run.

    Attributes:
        device: where it runs. bytes_read: of the weights, so far.
    """

    def __init__(
        self, folder: Path, variant: str | None, config: Mapping[str, Any], count: int, last_norm: bool, part: StagePart
    ) -> None:
        self._folder, self._variant, self._config = folder, variant, config
        self._count, self._norm, self._part = count, last_norm and part.is_tail, part
        self._dtype = getattr(torch, part.config.dtype)
        self.device = torch.device("cpu") if part.config.text_encoder == "cpu" else part.device
        self.bytes_read = 0
        self._model: Any = None
        self._load()
        self.release()

    def run(self, states: Tensor, mask: Tensor | None, starts: bool) -> Tensor:
        """Its layers over hidden states [1, T, D], or where it `starts` token numbers [1, T]; [1, T, D]."""
        if self._model is None:
            self._load()
        given = {"input_ids" if starts else "inputs_embeds": states.to(self.device)}
        seen = None if mask is None else mask.to(self.device)
        made: Tensor = self._model(attention_mask=seen, use_cache=False, **given).last_hidden_state
        return made.to(self._part.device)

    def release(self) -> None:
        """No prompt is left for now: free the weights where they are loaded anew for the next one."""
        if self._part.config.text_encoder == "reload":
            self._model = None

    def _load(self) -> None:
        source = open_source(self._folder, self._variant)
        prefix = next((each for each in PREFIXES if f"{each}embed_tokens.weight" in source.stored), "")
        own = {name.removeprefix(prefix): name for name in source.stored if name.startswith(prefix)}
        weights = Weights(source, {name: stored for name, stored in own.items() if name.split(".")[0] in PARTS})
        with torch.device("meta"):
            model = Qwen2_5_VLTextModel(config_of(self._folder, self._config))
        weights.check_names(model.state_dict())
        layers = list(self._part.cut.text)
        assert all(layer < self._count for layer in layers)
        model.layers = nn.ModuleList(model.layers[layer] for layer in layers)
        if not self._part.is_head:
            del model.embed_tokens
        if not self._norm:
            model.norm = nn.Identity()
        numbers = {str(here): str(there) for here, there in enumerate(layers)}
        stored = {name: _renumbered(name, numbers) for name in model.state_dict()}
        weights.load(model, self._dtype, self.device, aliases=stored)
        model.rotary_emb = type(model.rotary_emb)(config=model.config).to(self.device)  # its buffers are not stored
        self.bytes_read += weights.bytes_read
        self._model = model


def config_of(folder: Path, config: Mapping[str, Any]) -> Any:
    """The language half's config, as transformers has it.

    Raises:
        CheckpointError: it takes none from what is there.
    """
    try:
        if config.get("model_type") == "qwen2_5_vl":  # with a half for pictures beside it
            return Qwen2_5_VLConfig.from_dict(dict(config)).text_config
        return Qwen2_5_VLTextConfig.from_dict(dict(config))
    except Exception as error:  # of a config that is broken it raises anything
        raise CheckpointError(
            f"{shown(folder)}: the text encoder cannot be loaded ({reason(error)}): download it again."
        ) from None


def _renumbered(name: str, numbers: Mapping[str, str]) -> str:
    """Layers are numbered from 0 here, and through the whole encoder there."""
    part, _, rest = name.partition(".")
    if part != "layers":
        return name
    number, _, rest = rest.partition(".")
    return f"layers.{numbers[number]}.{rest}"
