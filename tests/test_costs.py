"""Costs from configs alone, against diffusers' and transformers' own modules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from hypothesis import given, settings
from hypothesis import strategies as st
from live_tensors import LiveTensors
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from cineline.core.config import ParallelConfig, Place
from cineline.core.request import VideoRequest
from cineline.core.work import Parameters
from cineline.families.wan.constants import TEXT_TOKENS
from cineline.families.wan.costs.clip import ClipCosts
from cineline.families.wan.costs.model import ModelCosts
from cineline.families.wan.costs.text import TextCosts
from cineline.families.wan.costs.transformer import TransformerCosts
from cineline.families.wan.known import KNOWN
from cineline.families.wan_vae.costs import VaeCosts
from cineline.planning.cut import default_cut

TI2V, T2V, I2V, *WAN_21 = KNOWN.values()

_SMALL = {"num_attention_heads": 4, "attention_head_dim": 64, "ffn_dim": 1024, "num_layers": 30, "text_dim": 256}

EQUAL_THIRDS = replace(
    T2V,
    experts=("transformer",),
    transformer={**T2V.transformer, **_SMALL},
    text={"num_layers": 24, "d_model": 256, "d_kv": 64, "d_ff": 1400, "num_heads": 4, "vocab_size": 1000},
    vae={"base_dim": 64, "z_dim": 16},
)
"""A model whose components are equally heavy."""

TINY_VAES: list[dict[str, Any]] = [
    {"base_dim": 8, "z_dim": 16},
    {
        "base_dim": 8,
        "z_dim": 16,
        "decoder_base_dim": 16,
        "is_residual": True,
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
        "scale_factor_spatial": 16,
    },
]


def on_meta(module: Any, *args: Any, **kwargs: Any) -> Any:
    with torch.device("meta"):
        return module(*args, **kwargs).eval()


def counted(module: torch.nn.Module, kept: tuple[str, ...] = ()) -> Parameters:
    """Numbers of a module's weights, those apart that keep float32."""
    sizes = {name: tensor.numel() for name, tensor in module.state_dict().items()}
    stays = sum(size for name, size in sizes.items() if set(name.split(".")) & set(kept))
    return Parameters(sum(sizes.values()) - stays, stays)


def check_transformer(config: dict[str, Any]) -> None:
    model = on_meta(WanTransformer3DModel, **config)
    costs, kept = TransformerCosts.of(config), tuple(WanTransformer3DModel._keep_in_fp32_modules)
    assert costs.block == counted(model.blocks[0], kept)
    assert costs.patch_embedding == counted(model.patch_embedding, kept)
    assert costs.condition_embedder == counted(model.condition_embedder, kept)
    assert costs.whole == counted(model, kept)
    assert costs.block_shard(1) == costs.block


def check_vae(config: dict[str, Any]) -> None:
    vae, costs = on_meta(AutoencoderKLWan, **config), VaeCosts.of(config)
    assert costs.whole == counted(vae)
    assert costs.encoder_parameters == counted(vae.encoder) + counted(vae.quant_conv)
    assert costs.before_decoder == counted(vae.post_quant_conv)
    for unit in costs.decoder[:-1]:
        assert unit.parameters == counted(vae.decoder.get_submodule(unit.name)), unit.name
    assert costs.decoder[-1].parameters == counted(vae.decoder.norm_out) + counted(vae.decoder.conv_out)


def check_text(config: dict[str, Any]) -> None:
    model, costs = on_meta(UMT5EncoderModel, UMT5Config(**config)), TextCosts.of(config)
    assert costs.whole == counted(model.encoder)
    assert costs.layer == counted(model.encoder.block[0])
    half = TextCosts.of(config, "float16")
    assert half.whole == counted(model.encoder, tuple(UMT5EncoderModel._keep_in_fp32_modules))


@pytest.mark.parametrize("spec", KNOWN.values(), ids=list(KNOWN))
def test_weights_of_the_real_models(spec: Any) -> None:
    check_transformer(dict(spec.transformer))
    check_vae(dict(spec.vae))
    if spec.image:
        model = on_meta(CLIPVisionModel, CLIPVisionConfig(**spec.image))
        seen = ClipCosts.of(spec.image, spec.picture_rows, spec.pictures)
        unused = counted(model.encoder.layers[-1]) + counted(model.post_layernorm)
        assert seen.parameters + unused == counted(model)


def test_weights_of_the_real_text_encoder() -> None:
    check_text(dict(TI2V.text))


@given(
    heads=st.integers(1, 4),
    layers=st.integers(1, 3),
    head_dim=st.sampled_from([12, 24]),
    ffn=st.integers(8, 64),
    channels=st.integers(1, 8),
    norm=st.booleans(),
)
@settings(max_examples=15, deadline=None)
def test_weights_of_random_transformers(
    heads: int, layers: int, head_dim: int, ffn: int, channels: int, norm: bool
) -> None:
    check_transformer(
        {
            "num_attention_heads": heads,
            "num_layers": layers,
            "attention_head_dim": head_dim,
            "ffn_dim": ffn,
            "in_channels": 2 * channels,
            "out_channels": channels,
            "text_dim": 8,
            "freq_dim": 16,
            "cross_attn_norm": norm,
        }
    )


@given(
    base=st.sampled_from([4, 8]),
    residual=st.booleans(),
    blocks=st.integers(1, 3),
    downsamples=st.lists(st.booleans(), min_size=1, max_size=3),
)
@settings(max_examples=15, deadline=None)
def test_weights_of_random_vaes(base: int, residual: bool, blocks: int, downsamples: list[bool]) -> None:
    multipliers = [1, 2, 4][: len(downsamples)]
    multipliers.append(multipliers[-1])
    if not residual:  # diffusers halves the width at each upsampler: the widths must double, or end alike
        multipliers, downsamples = [1, 2, 4, 4], [False, True, True]
    check_vae(
        {
            "base_dim": base,
            "z_dim": 4,
            "is_residual": residual,
            "num_res_blocks": blocks,
            "dim_mult": multipliers,
            "temperal_downsample": downsamples,
        }
    )


@given(heads=st.integers(1, 4), layers=st.integers(1, 3), gated=st.booleans(), vocabulary=st.integers(10, 99))
@settings(max_examples=10, deadline=None)
def test_weights_of_random_text_encoders(heads: int, layers: int, gated: bool, vocabulary: int) -> None:
    check_text(
        {
            "num_heads": heads,
            "num_layers": layers,
            "d_model": 16,
            "d_kv": 4,
            "d_ff": 24,
            "vocab_size": vocabulary,
            "feed_forward_proj": "gated-gelu" if gated else "gelu",
        }
    )


def test_sizes_that_are_published() -> None:
    sizes = [ModelCosts.of(spec, "bfloat16", "float32") for spec in (TI2V, T2V, *WAN_21)]
    billions = [round(costs.transformer.whole.count / 1e9, 2) for costs in sizes]
    assert billions == [5.00, 14.29, 1.42, 14.29, 16.39, 16.39, 16.40]
    assert [round(costs.vae.whole.count / 1e6, 1) for costs in sizes[:2]] == [704.7, 126.9]
    assert [round(costs.transformer.block.nbytes("bfloat16") / 1e9, 3) for costs in sizes[:2]] == [0.327, 0.703]


@pytest.mark.parametrize(
    ("spec", "size", "tokens", "petaflop", "attention"),
    [
        (TI2V, (704, 1280, 121), 27_280, 0.517, 0.54),
        (T2V, (720, 1280, 81), 75_600, 6.52, 0.72),
        (T2V, (480, 832, 81), 32_760, 1.68, 0.53),
    ],
)
def test_flop_of_a_forward_that_are_published(
    spec: Any, size: tuple[int, int, int], tokens: int, petaflop: float, attention: float
) -> None:
    costs = TransformerCosts.of(spec.transformer)
    height, width, frames = size
    job = spec.resolve(VideoRequest(prompt="a", height=height, width=width, num_frames=frames), 0)
    shape = spec.latent_shape(job)
    assert shape[2] * shape[3] * shape[4] // costs.patch == tokens
    work = costs.block_work(tokens, 2) * costs.layers + costs.embed_work(tokens, 2) + costs.predict_work(tokens, 2)
    assert work.flop / 1e15 == pytest.approx(petaflop, rel=0.01)
    assert work.attention / work.flop == pytest.approx(attention, abs=0.01)


@pytest.mark.parametrize("spec", [TI2V, T2V, WAN_21[-1]], ids=["ti2v", "a14b", "of images"])
def test_flop_of_a_block_are_what_torch_counts(spec: Any) -> None:
    costs, tokens = TransformerCosts.of(spec.transformer, spec.image_rows), 300
    added = {"added_kv_proj_dim": spec.transformer.get("added_kv_proj_dim")}
    block = on_meta(WanTransformerBlock, costs.width, costs.ffn, costs.heads, cross_attn_norm=True, **added)
    with torch.device("meta"):
        hidden = torch.empty(1, tokens, costs.width)
        text = torch.empty(1, costs.image_rows + TEXT_TOKENS, costs.width)
        rotary = (torch.empty(1, tokens, 1, costs.width // costs.heads),) * 2
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            block(hidden, text, torch.empty(1, 6, costs.width), rotary)
    assert counter.get_total_flops() == costs.block_work(tokens, 4).flop


@pytest.mark.parametrize("spec", [TI2V, T2V], ids=["ti2v", "a14b"])
def test_flop_of_a_vae_are_what_torch_counts(spec: Any) -> None:
    vae, costs = on_meta(AutoencoderKLWan, **spec.vae), VaeCosts.of(spec.vae)
    cache: list[Any] = [None] * vae._cached_conv_counts["decoder"]
    for chunk in range(3):
        latents = torch.empty(1, costs.latents, 1, 6, 10, device="meta")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            first = {"first_chunk": True} if chunk == 0 else {}
            given = vae.decoder(latents, feat_cache=cache, feat_idx=[0], **first)
        assert counter.get_total_flops() == sum(unit.flop(60, chunk == 0) for unit in costs.decoder)
        assert given.numel() == costs.boundary_bytes(len(costs.decoder), 60, chunk == 0, 4)
    kept = sum(tensor.numel() for tensor in cache if isinstance(tensor, torch.Tensor))
    assert kept * 4 == sum(unit.cache_bytes(60, 4) for unit in costs.decoder)
    clip = torch.empty(1, 3, 9, 6 * spec.vae_scale, 10 * spec.vae_scale, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vae.encode(clip)
    quantised = 2 * 3 * 60 * (2 * costs.latents) ** 2
    assert counter.get_total_flops() == costs.encode_work(60, 3, 4).flop + quantised


@pytest.mark.parametrize("spec", [TI2V, T2V], ids=["ti2v", "a14b"])
def test_text_layer_flop_are_what_torch_counts(spec: Any) -> None:
    config = {**spec.text, "num_layers": 1, "vocab_size": 10}
    model, costs = on_meta(UMT5EncoderModel, UMT5Config(**config)), TextCosts.of(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, TEXT_TOKENS, dtype=torch.int64, device="meta"))
    assert counter.get_total_flops() == costs.layer_work(4).flop


@pytest.mark.parametrize("ffn", [1152, 704])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_token", [False, True])
def test_activations_of_a_block_are_what_is_alive(ffn: int, dtype: torch.dtype, per_token: bool) -> None:
    tokens, width, heads = 2048, 256, 4
    block = WanTransformerBlock(width, ffn, heads, cross_attn_norm=True).to(dtype).eval()
    for name, weight in block.named_parameters():
        if {"scale_shift_table", "norm2"} & set(name.split(".")):
            weight.data = weight.data.float()
    hidden, text = torch.randn(1, tokens, width, dtype=dtype), torch.randn(1, TEXT_TOKENS, width, dtype=dtype)
    modulation = torch.randn(1, tokens, 6, width, dtype=dtype) if per_token else torch.randn(1, 6, width, dtype=dtype)
    rotary = torch.randn(1, tokens, 1, width // heads), torch.randn(1, tokens, 1, width // heads)
    held = [hidden, text, modulation, *rotary, *block.parameters()]
    with LiveTensors(held) as live, torch.no_grad():
        block(hidden, text, modulation, rotary)
    costs = TransformerCosts(1, width, ffn, heads, 4, 16, 16, 32, 64, True)
    assert live.peak == pytest.approx(costs.block_workspace(tokens, dtype.itemsize, per_token), rel=0.1)
    assert live.moved == pytest.approx(costs.block_work(tokens, dtype.itemsize, per_token).moved, rel=0.1)


@pytest.mark.parametrize("config", TINY_VAES, ids=["wan 2.1", "wan 2.2"])
def test_memory_of_a_decode_is_what_is_alive(config: dict[str, Any]) -> None:
    """The whole decoder holds a little more than its units: each block keeps its input while its units run."""
    vae, costs = AutoencoderKLWan(**config).eval(), VaeCosts.of(config)
    latents, cache = torch.randn(1, 16, 3, 16, 16), [None] * vae._cached_conv_counts["decoder"]
    with LiveTensors([latents, *vae.parameters()]) as live, torch.no_grad():
        for chunk in range(3):
            first = {"first_chunk": True} if chunk == 0 else {}
            vae.decoder(latents[:, :, chunk : chunk + 1], feat_cache=cache, feat_idx=[0], **first)
    predicted = max(unit.workspace(256, False, 4) for unit in costs.decoder)
    predicted += sum(unit.cache_bytes(256, 4) for unit in costs.decoder)
    assert live.peak == pytest.approx(predicted, rel=0.15)


def test_expert_steps_that_are_published() -> None:
    def high(spec: Any, **fields: Any) -> int:
        job = spec.resolve(VideoRequest(prompt="a", num_inference_steps=40, **fields), 0)
        return int(spec.high_steps(job))

    assert (high(T2V), high(T2V, flow_shift=3.0)) == (26, 13)


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("spec", KNOWN.values(), ids=list(KNOWN))
def test_default_cut_is_near_an_even_share(spec: Any, stages: int) -> None:
    costs = ModelCosts.of(spec, "bfloat16", "float32")
    cut = default_cut(costs, spec.place(ParallelConfig(pp=stages)))
    held = [costs.held(cut, Place(pp=stage)).total for stage in range(stages)]
    again = costs.experts * costs.transformer.patch_embedding.nbytes("bfloat16")  # the tail has it, too
    assert sum(held) == costs.whole.total + (again if stages > 1 else 0)
    assert cut.text_split is not None
    assert cut.vae_split is not None
    assert sum(cut.text_split) == costs.text.layers
    assert sum(cut.vae_split) == len(costs.vae.decoder)
    # The head's embedding, embedders and image encoder cannot be cut: on eight stages they are above a share.
    assert max(held) <= (1.15 if stages < 8 else 1.6 if spec.image else 1.4) * costs.whole.total / stages


@pytest.mark.parametrize("stages", [2, 4])
def test_default_cut_where_every_component_is_as_heavy(stages: int) -> None:
    """Text encoder and VAE as heavy as the transformer, all in float32."""
    shapes = EQUAL_THIRDS
    costs = ModelCosts.of(shapes, "float32", "float32")
    whole = costs.whole
    assert max(whole.transformer, whole.text, whole.vae) < 1.1 * min(whole.transformer, whole.text, whole.vae)
    cut = default_cut(costs, ParallelConfig(pp=stages))
    held = [costs.held(cut, Place(pp=stage)).total for stage in range(stages)]
    assert max(held) <= 1.15 * whole.total / stages
