"""The transformer and the text encoder, trained together on latents by rectified flow.

A training-only loss tells the transformer where its tokens are: Wan's rope is relative, so that at high noise
all tokens look alike, and a picture with several blobs comes of it. Linear heads on the hidden states after two
early blocks predict each token's row and column; they are thrown away afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from numpy.random import Generator
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import UMT5EncoderModel

from training.clips import caption
from training.loop import Schedule, device, fit
from training.scenes import Scene
from training.text import make_text_encoder, make_tokenizer, tokenize

TEXT_ROWS = 24
"""Tokens of a caption; all captions are shorter."""

PROMPT_ROWS = 512
"""Rows that the pipelines pad a prompt to, with zeros, which are attended to like the others."""

POSITION_WEIGHT = 0.1
SHIFT = 3.0
"""Of the noise levels, in training and by default in sampling."""


@dataclass(frozen=True)
class Batch:
    """A kind of batch.

    Attributes:
        task: text (to video), image (and text to video), picture (text to one frame).
        samples: how many.
    """

    task: str
    samples: int


@dataclass(frozen=True)
class Latents:
    """Clips as the transformer sees them: normalised latents [N, C, F', H', W'], and what each one shows."""

    values: Tensor
    scenes: Sequence[Scene]


class Student(nn.Module):
    """What is trained together.

    Args:
        transformer: config of the WanTransformer3DModel.
        grid: rows and columns of tokens.
    """

    def __init__(self, transformer: Mapping[str, Any], grid: int) -> None:
        super().__init__()
        self.tokenizer = make_tokenizer()
        self.text_encoder: UMT5EncoderModel = make_text_encoder(len(self.tokenizer))
        self.transformer = WanTransformer3DModel(**transformer)
        nn.init.zeros_(self.transformer.proj_out.weight)
        nn.init.zeros_(self.transformer.proj_out.bias)
        self.grid = grid
        dim = self.transformer.config.num_attention_heads * self.transformer.config.attention_head_dim
        self.position_heads = nn.ModuleDict({name: nn.Linear(dim, 2 * grid) for name in ("1", "3")})

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Text embeddings [B, TEXT_ROWS + 1, D]; the last row is zero and stands for all padding."""
        tokens = {name: value.to(device()) for name, value in tokenize(self.tokenizer, captions, TEXT_ROWS).items()}
        rows = self.text_encoder(**tokens).last_hidden_state * tokens["attention_mask"].unsqueeze(-1)
        return F.pad(rows, (0, 0, 0, 1))


class TrainingAttention:
    """Attention as `WanAttnProcessor`'s, in float32 under autocast, with one key for all padded text rows.

    N equal keys weigh as much as one of them with log(N) added to its score.
    """

    def __init__(self) -> None:
        weight = torch.zeros(1, TEXT_ROWS + 1)
        weight[:, -1] = math.log(PROMPT_ROWS - TEXT_ROWS)
        self.weight = weight.to(device())

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(context))
        heads = [part.unflatten(2, (attn.heads, -1)).float() for part in (query, key, attn.to_v(context))]
        if rotary_emb is not None:
            heads[:2] = [_rotate(part, *rotary_emb) for part in heads[:2]]
        query, key, value = (part.transpose(1, 2) for part in heads)
        bias = None if encoder_hidden_states is None else self.weight
        with torch.autocast(query.device.type, enabled=False):
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return attn.to_out[0](mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def _rotate(hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = hidden[..., 0::2], hidden[..., 1::2]
    cos, sin = cos[..., 0::2].float(), sin[..., 1::2].float()
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def prepare(student: Student) -> dict[str, Tensor]:
    """Make the student's transformer fast to train; returns where its inner hidden states will appear.

    Blocks run compiled, with bfloat16 products; what is small or decides the precision stays in float32.
    """
    transformer = student.transformer
    kind = device().type
    for part in (transformer.condition_embedder, transformer.patch_embedding, transformer.proj_out):
        part.forward = torch.autocast(kind, enabled=False)(part.forward)
    hidden: dict[str, Tensor] = {}
    attention = TrainingAttention()
    for number, block in enumerate(transformer.blocks):
        block.attn1.processor = block.attn2.processor = attention
        block.forward = torch.compile(block.forward, dynamic=False)
        if str(number) in student.position_heads:
            block.register_forward_hook(lambda _, __, output, name=str(number): hidden.update({name: output}))
    return hidden


def train_transformer(
    student: Student,
    latents: Latents,
    batches: Sequence[Batch],
    noise: tuple[float, float],
    stage: int,
    schedule: Schedule,
    checkpoint: Path,
) -> dict[str, Tensor]:
    """Train a student on these kinds of batch; returns the averaged weights.

    Args:
        student: spoilt for inference by it (see `prepare`).
        noise: lowest and highest share of noise.
        stage: number that its choice of clips and captions follows from; noise follows from the step alone.
    """
    hidden = prepare(student.to(device()))

    def loss(step: int) -> Tensor:
        random = np.random.default_rng((10 + stage, step))
        batch = batches[int(random.integers(len(batches)))]
        chosen = random.integers(len(latents.scenes), size=batch.samples)
        clean = latents.values[chosen].float()
        if batch.task == "picture":
            clean = clean[:, :, :1]
        clean = clean.to(device())
        captions = [caption(latents.scenes[number], random) for number in chosen]
        return _loss(student, hidden, clean, captions, batch.task, noise, random, step)

    return fit(student, schedule, loss, checkpoint, _is_matrix)


def _loss(
    student: Student,
    hidden: dict[str, Tensor],
    clean: Tensor,
    captions: Sequence[str],
    task: str,
    noise: tuple[float, float],
    random: Generator,
    step: int,
) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    samples = clean.shape[0]
    # Evenly spread over the batch, which makes for less noise in the loss than independent draws.
    level = (torch.arange(samples) + torch.rand(samples, generator=generator)) / samples
    low, high = (share / (SHIFT - (SHIFT - 1) * share) for share in noise)
    level = low + (high - low) * level
    share = (SHIFT * level / (1 + (SHIFT - 1) * level)).to(device())
    grain = torch.randn(clean.shape, generator=generator).to(device())
    mixed = torch.lerp(clean, grain, share.view(-1, 1, 1, 1, 1))
    timestep = share * 1000
    if task == "image":
        mixed[:, :, 0] = clean[:, :, 0]
        tokens = student.grid**2
        timestep = timestep[:, None].repeat(1, tokens * clean.shape[2])
        timestep[:, :tokens] = 0
    text = student.encode(captions)
    with torch.autocast(clean.device.type, torch.bfloat16):
        flow = student.transformer(mixed, timestep, text, return_dict=False)[0]
    error = (flow - (grain - clean)) ** 2
    if task == "image":
        error = error[:, :, 1:]
    total: Tensor = error.mean() + POSITION_WEIGHT * _position_loss(student, hidden)
    return total


def _position_loss(student: Student, hidden: dict[str, Tensor]) -> Tensor:
    """Cross entropy of each token's row and column, told from its hidden states."""
    grid = student.grid
    place = torch.arange(grid, device=device())
    rows, columns = place.repeat_interleave(grid), place.repeat(grid)
    losses = []
    for name, head in student.position_heads.items():
        states = F.layer_norm(hidden[name].float(), hidden[name].shape[-1:])
        guess = head(states).unflatten(1, (-1, grid * grid))  # [B, F', tokens of a frame, 2 grid]
        for part, target in zip(guess.split(grid, -1), (rows, columns), strict=True):
            losses.append(F.cross_entropy(part.flatten(0, 2), target.repeat(part.shape[0] * part.shape[1])))
    return torch.stack(losses).mean()


def _is_matrix(name: str) -> bool:
    """Muon is for the blocks; embeddings, heads and the text encoder's tables are AdamW's."""
    return name.endswith("weight") and ".blocks." in name
