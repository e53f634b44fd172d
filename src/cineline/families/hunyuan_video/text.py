"""Prompts of HunyuanVideo 1.5: a conversation for Qwen2.5-VL, cut over the stages, and the words that the video is to
show for ByT5, which is small and on the head alone."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5 import (
    HunyuanVideo15Pipeline,
    extract_glyph_texts,
    format_text_input,
)
from torch import Tensor
from transformers import AutoTokenizer, T5Config, T5EncoderModel

from cineline.errors import CheckpointError, reason, shown
from cineline.families.hunyuan_video.constants import DROPPED, GLYPH_ROWS, TEXT_ROWS
from cineline.families.hunyuan_video.spec import HunyuanVideoSpec
from cineline.weights.files import Weights
from cineline.weights.sources import open_source

SYSTEM: str = signature(HunyuanVideo15Pipeline._get_mllm_prompt_embeds).parameters["system_message"].default
"""The conversation's first message, which is the pipeline's own."""


class Conversation:
    """Prompts to token numbers int64 [1, T] and their mask, padded."""

    def __init__(self, spec: HunyuanVideoSpec) -> None:
        self._tokenizer = _tokenizer(spec, "tokenizer")

    def __call__(self, prompt: str) -> tuple[Tensor, Tensor]:
        made = self._tokenizer.apply_chat_template(
            format_text_input([prompt], SYSTEM),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            padding="max_length",
            max_length=TEXT_ROWS + DROPPED,
            truncation=True,
            return_tensors="pt",
        )
        return made.input_ids, made.attention_mask


class Glyphs:
    """The words in quotation marks that a prompt has, encoded.

    Attributes:
        bytes_read: of the encoder's weights.
    """

    def __init__(self, spec: HunyuanVideoSpec, dtype: torch.dtype, device: torch.device) -> None:
        self._tokenizer, self._device, self._dtype = _tokenizer(spec, "tokenizer_2"), device, dtype
        weights = Weights(open_source(spec.folder / "text_encoder_2", spec.variant))
        with torch.device("meta"):
            whole = T5EncoderModel(T5Config.from_dict(dict(spec.configs["text_encoder_2"])))
        del whole.shared  # the encoder has its own reference to the embedding
        own, tied = "encoder.embed_tokens.weight", "shared.weight"
        aliases = {} if own in weights else {own: tied}
        weights.check_names({aliases.get(name, name) for name in whole.state_dict()}, ignored=["shared"])
        keep = T5EncoderModel._keep_in_fp32_modules if dtype is torch.float16 else ()  # as transformers does
        weights.load(whole, dtype, device, fp32=keep, aliases=aliases)
        self._encoder, self.bytes_read = whole.encoder, weights.bytes_read

    def __call__(self, prompt: str) -> tuple[Tensor, Tensor]:
        """[1, 256, width] and a mask int64 [1, 256]; of a prompt without such words zeros."""
        words = extract_glyph_texts(prompt)
        if words is None:
            width = self._encoder.config.d_model
            nothing = torch.zeros(1, GLYPH_ROWS, width, dtype=self._dtype, device=self._device)
            return nothing, torch.zeros(1, GLYPH_ROWS, dtype=torch.int64, device=self._device)
        made = self._tokenizer(
            words,
            padding="max_length",
            max_length=GLYPH_ROWS,
            truncation=True,
            add_special_tokens=True,
            return_tensors="pt",
        ).to(self._device)
        states = self._encoder(input_ids=made.input_ids, attention_mask=made.attention_mask.float())[0]
        return states, made.attention_mask


def _tokenizer(spec: HunyuanVideoSpec, name: str) -> Any:
    home = spec.folder / name
    try:
        return AutoTokenizer.from_pretrained(home, local_files_only=True)
    except Exception as error:  # of files that are broken it raises anything
        raise CheckpointError(f"{shown(home)} cannot be loaded ({reason(error)}): download it again.") from None
