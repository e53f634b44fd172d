"""Small checkpoints with random weights of the families beside Wan, in diffusers format."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLQwenImage,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    ByT5Tokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
)

TEXT_WIDTH = 32

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

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


def save_hunyuan_video(folder: Path, layers: int = 3, **transformer: Any) -> Path:
    """A HunyuanVideo 1.5."""
    torch.manual_seed(6)
    talks = tokenizer()
    talks.chat_template = CHAT
    shapes: dict[str, Any] = {"in_channels": 9, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16}
    shapes |= {"num_layers": layers, "num_refiner_layers": 1, "mlp_ratio": 2.0, "rope_axes_dim": (4, 6, 6)}
    shapes |= {"text_embed_dim": TEXT_WIDTH, "text_embed_2_dim": 24, "image_embed_dim": 20, "target_size": 64}
    glyphs = {"d_model": 24, "d_kv": 6, "d_ff": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 384}
    text = Qwen2_5_VLTextConfig(**text_config(5))
    HunyuanVideo15Pipeline(
        text_encoder=Qwen2_5_VLTextModel(text),
        tokenizer=talks,
        transformer=HunyuanVideo15Transformer3DModel(**shapes | transformer),
        vae=AutoencoderKLHunyuanVideo15(
            latent_channels=4,
            block_out_channels=(8, 16, 16),
            layers_per_block=1,
            spatial_compression_ratio=4,
            temporal_compression_ratio=4,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        text_encoder_2=T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **glyphs)),
        tokenizer_2=ByT5Tokenizer(),
        guider=ClassifierFreeGuidance(guidance_scale=4.0),
    ).save_pretrained(folder)
    return folder
