"""Checkpoints as others write them, made from a random one: names, prefixes, scales, pickles, shards, GGUF.

Written without Cineline's own maps: from diffusers' converters backwards, and checked by running those forwards.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from safetensors.torch import load_file, save_file

State = dict[str, torch.Tensor]

PREFIX = "model.diffusion_model."


def state_of(folder: Path, component: str) -> State:
    return {
        name: one
        for file in sorted((folder / component).glob("*.safetensors"))
        for name, one in load_file(file).items()
    }


def original_name(name: str) -> str:
    """A transformer's tensor as Wan's own repository calls it."""
    for ours, theirs in (
        ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
        ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
        ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
        ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
        ("condition_embedder.time_proj", "time_projection.1"),
        ("condition_embedder.image_embedder.norm1", "img_emb.proj.0"),
        ("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
        ("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
        ("condition_embedder.image_embedder.norm2", "img_emb.proj.4"),
        ("attn2.add_k_proj", "attn2.k_img"),
        ("attn2.add_v_proj", "attn2.v_img"),
        ("attn2.norm_added_k", "attn2.norm_k_img"),
        ("attn1", "self_attn"),
        ("attn2", "cross_attn"),
        (".to_out.0.", ".o."),
        (".to_q.", ".q."),
        (".to_k.", ".k."),
        (".to_v.", ".v."),
        ("ffn.net.0.proj", "ffn.0"),
        ("ffn.net.2", "ffn.2"),
        (".norm2.", ".norm3."),
        ("proj_out", "head.head"),
    ):
        name = name.replace(ours, theirs)
    return "head.modulation" if name == "scale_shift_table" else name.replace("scale_shift_table", "modulation")


def original_transformer(state: State) -> State:
    made = {original_name(name): one for name, one in state.items()}
    back = convert_wan_transformer_to_diffusers(dict(made))
    assert back.keys() == state.keys() and all(back[name] is state[name] for name in state)
    return made


RESIDUAL = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}
ENDS = {"conv_in": "conv1", "norm_out": "head.0", "conv_out": "head.2"}


def vae_name(name: str, blocks: int, grouped: bool) -> str:
    """A VAE's tensor as Wan's own repositories call it; `blocks` is its `num_res_blocks`, `grouped` Wan 2.2's way."""
    half, _, rest = name.partition(".")
    if half in ("quant_conv", "post_quant_conv"):
        return f"{'conv1' if half == 'quant_conv' else 'conv2'}.{rest}"
    part, _, leaf = rest.partition(".")
    if part in ENDS:
        return f"{half}.{ENDS[part]}.{leaf}"
    if part == "mid_block":
        kind, number, leaf = leaf.split(".", 2)
        return f"{half}.middle.{1 if kind == 'attentions' else 2 * int(number)}.{_inside(leaf)}"
    way = part.removesuffix("_blocks")
    group, _, leaf = leaf.partition(".")
    in_a_group = blocks + (half == "decoder")
    if found := re.fullmatch(r"resnets\.(\d+)\.(.+)", leaf):
        place, leaf = int(found[1]), _inside(found[2])
    elif found := re.fullmatch(r"(?:down|up)sampler(?:s\.0)?\.(.+)", leaf):
        place, leaf = in_a_group, found[1]
    else:  # Wan 2.1's encoder has all its blocks in a row in diffusers, too
        return f"{half}.{way}samples.{group}.{_inside(leaf)}"
    if grouped:
        return f"{half}.{way}samples.{group}.{way}samples.{place}.{leaf}"
    return f"{half}.{way}samples.{int(group) * (in_a_group + 1) + place}.{leaf}"


def _inside(leaf: str) -> str:
    head, _, rest = leaf.partition(".")
    return f"{RESIDUAL.get(head, head)}.{rest}"


def original_vae(state: State, config: Mapping[str, Any]) -> State:
    blocks, grouped = config.get("num_res_blocks", 2), bool(config.get("is_residual"))
    made = {vae_name(name, blocks, grouped): one for name, one in state.items()}
    if blocks == 2 and not grouped:  # all that diffusers' converter knows
        back = convert_wan_vae_to_diffusers(dict(made))
        assert back.keys() == state.keys() and all(back[name] is state[name] for name in state)
    return made


T5 = {
    "SelfAttention.relative_attention_bias": ("pos_embedding.embedding", "attn_rel_b"),
    "DenseReluDense.wi_0": ("ffn.gate.0", "ffn_gate"),
    "DenseReluDense.wi_1": ("ffn.fc1", "ffn_up"),
    "DenseReluDense.wo": ("ffn.fc2", "ffn_down"),
    **{f"SelfAttention.{part}": (f"attn.{part}", f"attn_{part}") for part in "qkvo"},
}


def text_name(name: str, llama: bool = False) -> str:
    """A text encoder's tensor as Wan's own repository calls it, or llama.cpp."""
    if name == "shared.weight":
        return "token_embd.weight" if llama else "token_embedding.weight"
    if name == "encoder.final_layer_norm.weight":
        return "enc.output_norm.weight" if llama else "norm.weight"
    found = re.fullmatch(r"encoder\.block\.(\d+)\.layer\.([01])\.(.+)\.weight", name)
    assert found, name
    number, half, module = found.groups()
    if module == "layer_norm":
        module = ("attn_norm", "ffn_norm")[int(half)] if llama else f"norm{int(half) + 1}"
    else:
        module = T5[module][llama]
    return f"{'enc.blk' if llama else 'blocks'}.{number}.{module}.weight"


def tied(state: State) -> State:
    """Without the second name of the tokens' embedding."""
    return {name: one for name, one in state.items() if name != "encoder.embed_tokens.weight"}


# Weights in fewer bits: what is stored beside each name, and the numbers that it says.


@dataclass
class Packed:
    """A component's tensors as they are stored, by diffusers' names.

    Attributes:
        scales: by the weight's name, what is stored beside it by its ending.
        says: the numbers in a dtype, where they are others than the tensor's own.
        blocks: bytes in a GGUF file.
    """

    state: State
    scales: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    says: dict[str, Callable[[torch.dtype], torch.Tensor]] = field(default_factory=dict)
    blocks: dict[str, int] = field(default_factory=dict)

    def nbytes(self, name: str) -> int:
        """That must be read for a tensor."""
        scales = [
            one for ending, one in self.scales.get(name, {}).items() if ending in (".scale_weight", ".weight_scale")
        ]
        return sum(one.nbytes for one in scales) + self.blocks.get(name, self.state[name].nbytes)


def is_matrix(name: str, tensor: torch.Tensor) -> bool:
    """Whether converters store it in fewer bits."""
    is_linear = name.startswith(("blocks.", "encoder.block.", "condition_embedder.")) and name.endswith(".weight")
    return is_linear and tensor.ndim == 2 and "relative" not in name


def cast_to_eight(state: State) -> Packed:
    """(a) A plain cast."""
    eights = {name: one.to(torch.float8_e4m3fn) if is_matrix(name, one) else one for name, one in state.items()}
    return Packed(eights, says={name: one.to for name, one in eights.items() if is_matrix(name, one)})


def scaled(state: State, how: str, scale_name: str, scale_dtype: torch.dtype = torch.float32) -> Packed:
    """A scale for the tensor, for each row, or for each block of 16 of a row."""
    packed = Packed(dict(state))
    for name, one in state.items():
        if not is_matrix(name, one):
            continue
        blocks = one.reshape(one.shape[0], -1, 16)
        largest = {
            "tensor": one.abs().max(),
            "rows": one.abs().amax(1, keepdim=True),
            "blocks": blocks.abs().amax(2, True),
        }
        scale = (largest[how].float() / 448).clamp(min=1e-12).to(scale_dtype)
        spread = scale.expand(blocks.shape).reshape(one.shape) if how == "blocks" else scale
        eight = (one.float() / spread.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
        packed.state[name] = eight
        packed.scales[name] = {scale_name: scale}
        packed.says[name] = partial(_times, eight, spread)
    return packed


def _times(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return weight.to(dtype) * scale.to(dtype)


def in_file(packed: Packed, rename: Callable[[str], str]) -> State:
    """All tensors by the names in the file."""
    made = {rename(name): one for name, one in packed.state.items()}
    for name, scales in packed.scales.items():
        made |= {f"{rename(name).removesuffix('.weight')}{ending}": one for ending, one in scales.items()}
    return made


def json_tensor(value: object) -> torch.Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


# GGUF.

BLOCKS = {  # bytes of a block, where its float16 scales stand
    gguf.GGMLQuantizationType.Q4_K: (0, 2),
    gguf.GGMLQuantizationType.Q5_K: (0, 2),
    gguf.GGMLQuantizationType.Q6_K: (208,),
    gguf.GGMLQuantizationType.Q3_K: (108,),
    gguf.GGMLQuantizationType.Q2_K: (80, 82),
    gguf.GGMLQuantizationType.Q8_0: (0,),
    gguf.GGMLQuantizationType.Q4_0: (0,),
    gguf.GGMLQuantizationType.Q5_1: (0, 2),
    gguf.GGMLQuantizationType.IQ4_XS: (0,),
}


def random_blocks(kind: gguf.GGMLQuantizationType, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Rows of random blocks as they are stored, uint8, whose scales are small numbers."""
    size, nbytes = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (rows * columns // size, nbytes), dtype=np.uint8)
    for place in BLOCKS[kind]:
        scales = random.uniform(1e-4, 1e-3, len(blocks)).astype(np.float16)
        blocks[:, place : place + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


def write_gguf(
    file: Path,
    tensors: Mapping[str, tuple[np.ndarray, Any, tuple[int, ...] | None]],
    arrays: Mapping[str, Sequence[Any]] | None = None,
    endianess: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
) -> None:
    """Each tensor's data, type, and original shape where it is said beside it; and arrays, such as a tokenizer's."""
    writer = gguf.GGUFWriter(file, "wan", endianess=endianess)
    for name, values in (arrays or {}).items():
        writer.add_array(name, values)
    for name, (data, kind, shape) in tensors.items():
        if shape is not None:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(shape))
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def as_gguf(file: Path, state: State, rename: Callable[[str], str], kind: gguf.GGMLQuantizationType) -> Packed:
    """Matrices in blocks, as ComfyUI's and llama.cpp's converters write them; small tensors as they are."""
    tensors: dict[str, Any] = {}
    packed = Packed(dict(state))
    for number, (name, one) in enumerate(state.items()):
        values = one.float().numpy()
        if not is_matrix(name, one):
            values = values.reshape(values.shape[1:]) if values.ndim == 3 else values  # leading ones are left out
            tensors[rename(name)] = (values, gguf.GGMLQuantizationType.F32, None)
            continue
        size = gguf.GGML_QUANT_SIZES[kind][0]
        folded = values.size % 256 == 0 and values.shape[1] % size != 0
        rows, columns = (values.size // 256, 256) if folded else values.shape
        try:
            data = gguf.quantize(values.reshape(rows, columns), kind)
        except NotImplementedError:  # the package reads them and does not write them
            data = random_blocks(kind, rows, columns, number)
        tensors[rename(name)] = (data, kind, one.shape if folded else None)
        read = torch.from_numpy(gguf.dequantize(data, kind).copy()).reshape(one.shape)
        packed.says[name] = read.to
        packed.blocks[name] = data.nbytes
    write_gguf(file, tensors)
    return packed


def folder_that_says(folder: Path, out: Path, told: Mapping[str, Packed], dtype: torch.dtype) -> Path:
    """The checkpoint with these components' numbers in place of its own, as they are in this dtype."""
    shutil.copytree(folder, out)
    for component, packed in told.items():
        for file in (out / component).glob("*.safetensors*"):
            file.unlink()
        state = dict(packed.state)
        for name, says in packed.says.items():
            state[name] = says(torch.float32 if "time_embedder" in name else dtype)
        stem = "model" if component == "text_encoder" else "diffusion_pytorch_model"
        save_file(state, out / component / f"{stem}.safetensors", metadata={"format": "pt"})
    return out


# Whole components.

Rename = Callable[[str], str]

EIGHT = {"format": "float8_e4m3fn"}


def renamed(folder: Path, component: str, name: str, how: str) -> str:
    """A tensor as the layout calls it."""
    if how in ("diffusers", "comfy text"):
        return name
    if component == "text_encoder":
        return text_name(name, llama=how.startswith("gguf"))
    if component == "vae":
        config = json.loads((folder / "vae" / "config.json").read_text())
        return vae_name(name, config.get("num_res_blocks", 2), bool(config.get("is_residual")))
    return original_name(name)


def in_eights(how: str, state: State, rename: Rename) -> tuple[Packed, State, dict[str, str] | None]:
    """What is stored of a component in 8 bits, the file's tensors, and the texts in its header."""
    if how == "cast":
        packed = cast_to_eight(state)
        return packed, in_file(packed, rename), None
    if how in ("comfy", "comfy text"):
        packed = scaled(state, "tensor", ".scale_weight")
        for scales in packed.scales.values():
            scales[".scale_input"] = torch.ones(())
        marker = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
        return packed, in_file(packed, rename) | marker, None
    if how == "comfy now":
        packed = scaled(state, "tensor", ".weight_scale")
        for scales in packed.scales.values():
            scales |= {".comfy_quant": json_tensor(EIGHT), ".input_scale": torch.ones(())}
        return packed, in_file(packed, rename), None
    if how == "comfy header":
        packed = scaled(state, "tensor", ".weight_scale")
        layers = {rename(name).removesuffix(".weight"): EIGHT for name in packed.scales}
        return packed, in_file(packed, rename), {"_quantization_metadata": json.dumps({"layers": layers})}
    if how == "lightx2v":
        packed = scaled(state, "rows", ".weight_scale")
        return packed, in_file(packed, rename), None
    packed = scaled(state, how.removeprefix("musubi "), ".scale_weight", torch.bfloat16)
    return packed, in_file(packed, rename) | {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, None


IN_EIGHTS = ("cast", "comfy", "comfy text", "comfy now", "comfy header", "lightx2v", "musubi rows", "musubi blocks")


def write(folder: Path, component: str, how: str, out: Path) -> tuple[Path, Packed]:
    """One component's file (a folder, where it is sharded) in a layout, and what it says."""
    state = state_of(folder, component)
    state = tied(state) if component == "text_encoder" else state
    file = out / f"{component}.safetensors"

    def rename(name: str) -> str:
        return renamed(folder, component, name, how)

    if how.startswith("gguf "):
        file = file.with_suffix(".gguf")
        return file, as_gguf(file, state, rename, getattr(gguf.GGMLQuantizationType, how.removeprefix("gguf ")))
    if how in IN_EIGHTS:
        packed, tensors, texts = in_eights(how, state, rename)
        save_file(tensors, file, texts)
        return file, packed
    if how == "half":
        state = {name: one.half() for name, one in state.items()}
    prefix = {"prefix": PREFIX if component.startswith("transformer") else "model."}.get(how, "")
    tensors = {f"{prefix}{rename(name)}": one for name, one in state.items()}
    if how == "pickle":
        file = file.with_suffix(".pth")
        torch.save(tensors, file)
    elif how == "sharded":
        file = out / component
        write_shards(tensors, file)
    else:
        save_file(tensors, file)
    return file, Packed(state)


def write_shards(tensors: State, folder: Path) -> None:
    """Three files and an index, as the original repositories have them."""
    folder.mkdir()
    names = sorted(tensors)
    places: dict[str, str] = {}
    for number in range(3):
        shard = f"diffusion_pytorch_model-{number + 1:05}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names[number::3]}, folder / shard)
        places |= dict.fromkeys(names[number::3], shard)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
