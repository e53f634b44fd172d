"""Small checkpoints with random weights of the families beside Wan, in diffusers format."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

TEXT_WIDTH = 32

STATISTICS = {
    "latents_mean": [0.1 * (channel % 5 - 2) for channel in range(16)],
    "latents_std": [0.5 + 0.1 * (channel % 7) for channel in range(16)],
}


@cache
def tokenizer() -> Qwen2Tokenizer:
    """Byte by byte."""
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet())]
    made = Qwen2Tokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[])
    made.add_tokens(words[:3], special_tokens=True)
    return made


def text_config(layers: int) -> dict[str, Any]:
    """Of Qwen2.5-VL's language half."""
    return {
        "vocab_size": len(tokenizer()),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def save_qwen_image(folder: Path, layers: int = 4, **transformer: Any) -> Path:
    """A Qwen-Image."""
    torch.manual_seed(5)
    eyes = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": TEXT_WIDTH}
    text = Qwen2_5_VLConfig(text_config=text_config(3), vision_config=eyes)
    shapes: dict[str, Any] = {"in_channels": 64, "out_channels": 16, "num_attention_heads": 4, "attention_head_dim": 16}
    shapes |= {"joint_attention_dim": TEXT_WIDTH, "axes_dims_rope": (4, 6, 6), "num_layers": layers}
    QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
        vae=AutoencoderKLQwenImage(base_dim=4, z_dim=16, num_res_blocks=1, **STATISTICS),
        text_encoder=Qwen2_5_VLForConditionalGeneration(text),
        tokenizer=tokenizer(),
        transformer=QwenImageTransformer2DModel(**shapes | transformer),
    ).save_pretrained(folder)
    return folder
