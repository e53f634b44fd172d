"""Prompts to embeddings, as diffusers' Wan pipelines make them."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

from cineline.errors import CheckpointError
from cineline.models.weights import Weights

log = logging.getLogger(__name__)

TOKENS = 512
"""Rows of a prompt's embedding; shorter prompts are padded with zeros, longer ones cut off."""


class TextEncoder:
    """Tokenizer and UMT5 encoder.

    Args:
        folder: the checkpoint's, with `tokenizer` and `text_encoder`.
        dtype, device: of the weights.

    Attributes:
        bytes_read: of the weights.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
            config = UMT5Config.from_pretrained(folder / "text_encoder", local_files_only=True)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder}: tokenizer or text encoder cannot be loaded ({error}).") from None
        with torch.device("meta"):
            self._model = UMT5EncoderModel(config)
        # The encoder has its own reference to the embedding; the outer one is not used in a forward.
        del self._model.shared
        weights = Weights(folder / "text_encoder")
        own, tied = "encoder.embed_tokens.weight", "shared.weight"
        aliases = {} if own in weights else {own: tied}
        names = {aliases.get(name, name) for name in self._model.state_dict()}
        weights.check_names(names, ignored=["shared"])
        weights.load(self._model, dtype, device, aliases=aliases)
        self.bytes_read = weights.bytes_read
        self._device = device

    def encode(self, prompt: str) -> torch.Tensor:
        """Embedding [1, 512, D] of one prompt (D the encoder's width), zero behind its last token."""
        cleaned = prompt_clean(prompt)
        count = len(self._tokenizer(cleaned).input_ids)
        if count > TOKENS:
            log.warning("A prompt of %d tokens is cut off after %d: %r...", count, TOKENS, cleaned[:40])
        tokens = self._tokenizer(
            [cleaned],
            padding="max_length",
            max_length=TOKENS,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        mask = tokens.attention_mask
        length = int(mask.gt(0).sum())
        output = self._model(tokens.input_ids.to(self._device), mask.to(self._device))
        embedding: torch.Tensor = output.last_hidden_state
        embedding[:, length:] = 0
        return embedding
