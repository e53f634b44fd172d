"""Weights: every stage reads its own tensors and no others, and a file that is wrong is named with its tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import WanTransformer3DModel
from oracle import Checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cineline import CheckpointError, ParallelConfig
from cineline.core.config import Cut, DeviceConfig, Place
from cineline.families.pipeline_parallel import StagePart
from cineline.families.wan.random_checkpoint import RandomConfig
from cineline.families.wan.shapes import WanKind
from cineline.families.wan.spec import WanSpec
from cineline.families.wan.stages import WanStages
from cineline.families.wan.weights import weights_of
from cineline.families.wan_vae.costs import VaeCosts
from cineline.weights import sources

COMPONENTS = ("transformer", "transformer_2", "text_encoder", "vae")

VAE_ENCODER = ("encoder.", "quant_conv.")


def load(folder: Path, stage: int = 0, stages: int = 1, variant: str | None = None) -> int:
    """Bytes that one stage reads."""
    spec = WanSpec.open(folder, variant)
    parallel = spec.place(ParallelConfig(pp=stages))
    part = StagePart(
        Place(pp=stage), parallel, spec.cut(parallel, DeviceConfig())[stage], torch.device("cpu"), DeviceConfig()
    )
    with torch.no_grad():
        return WanStages(spec).load(part)


def stored(folder: Path) -> dict[tuple[str, str], int]:
    """Bytes of every tensor by component and name, read without our own code."""
    sizes: dict[tuple[str, str], int] = {}
    for component in COMPONENTS:
        for file in (folder / component).glob("*.safetensors"):
            with safe_open(file, "pt") as opened:
                sizes |= {(component, name): opened.get_tensor(name).nbytes for name in opened.keys()}  # noqa: SIM118
    return sizes


def owners(component: str, name: str, cuts: Sequence[Cut], units: list[str]) -> set[int]:
    """The stages that must read a tensor."""
    if component.startswith("transformer") and name.startswith("patch_embedding."):
        return {0, len(cuts) - 1}  # the last one embeds where a step is skipped
    return {owner(component, name, cuts, units)}


def owner(component: str, name: str, cuts: Sequence[Cut], units: list[str]) -> int:
    """The one stage that must read any other."""
    last = len(cuts) - 1

    def holder(stack: str, number: int) -> int:
        return next(stage for stage, cut in enumerate(cuts) if number in getattr(cut, stack))

    if component == "text_encoder":
        if name.startswith("encoder.block."):
            return holder("text", int(name.split(".")[2]))
        return last if "final_layer_norm" in name else 0
    if component == "vae":
        if name.startswith((*VAE_ENCODER, "post_quant_conv.")):
            return 0
        inside = name.removeprefix("decoder.")
        unit = next((unit for unit in units if inside.startswith(f"{unit}.")), "head")
        return holder("decoder", units.index(unit))
    if name.startswith("blocks."):
        return holder("blocks", int(name.split(".")[1]))
    return 0 if name.startswith("condition_embedder.") else last


@pytest.mark.parametrize("kind", ["ti2v", "t2v", "i2v"])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_each_stage_reads_its_own_tensors_once_and_no_others(
    kind: WanKind, stages: int, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(RandomConfig(kind, seed=3))
    read: list[tuple[int, str, str]] = []

    @contextmanager
    def recording(file: Path, framework: str) -> Iterator[SimpleNamespace]:
        """What is taken out of a file, whoever asks."""
        with safe_open(file, framework) as opened:

            def get_tensor(name: str) -> torch.Tensor:
                read.append((stage, file.parent.name, name))
                tensor: torch.Tensor = opened.get_tensor(name)
                return tensor

            yield SimpleNamespace(get_tensor=get_tensor)

    monkeypatch.setattr(sources, "safe_open", recording)
    sizes = stored(folder)
    if kind == "t2v":  # it takes no image
        sizes = {key: size for key, size in sizes.items() if not (key[0] == "vae" and key[1].startswith(VAE_ENCODER))}
    spec = WanSpec.open(folder)
    cuts, units = spec.cut(spec.place(ParallelConfig(pp=stages)), DeviceConfig()), VaeCosts.of(spec.vae).names
    for stage in range(stages):
        expected = {key: size for key, size in sizes.items() if stage in owners(*key, cuts, units)}
        assert load(folder, stage, stages) == sum(expected.values())
        assert sorted((component, name) for at, component, name in read if at == stage) == sorted(expected)


Change = Callable[[dict[str, torch.Tensor]], object]
Broken = Callable[[str, Change], Path]


@pytest.fixture
def broken(checkpoint: Checkpoint, tmp_path: Path) -> Broken:
    """A copy of a checkpoint with one component's tensors changed."""

    def make(component: str, change: Change) -> Path:
        folder = tmp_path / "broken"
        shutil.copytree(checkpoint(RandomConfig("i2v", seed=3)), folder)
        (file,) = (folder / component).glob("*.safetensors")
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
        return folder

    return make


@pytest.mark.parametrize(
    ("component", "name"),
    [
        ("transformer", "blocks.1.attn1.to_q.weight"),
        ("transformer_2", "proj_out.bias"),
        ("text_encoder", "encoder.block.0.layer.0.SelfAttention.q.weight"),
        ("vae", "decoder.conv_in.weight"),
    ],
)
def test_a_tensor_that_is_missing_extra_or_misshapen_is_named(
    component: str, name: str, broken: Broken, tmp_path: Path
) -> None:
    def misshape(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = torch.zeros(3, 5)

    changes: list[tuple[Change, str]] = [
        (lambda tensors: tensors.pop(name), "lacks tensor"),
        (lambda tensors: tensors.update({f"{name}.more": torch.zeros(1)}), "has tensor"),
        (misshape, "has shape [3, 5]"),
    ]
    for change, rule in changes:
        folder = broken(component, change)
        with pytest.raises(CheckpointError) as refused:
            load(folder)
        assert name in str(refused.value)
        assert rule in str(refused.value)
        assert component in str(refused.value)
        shutil.rmtree(tmp_path / "broken")


def test_a_truncated_file_names_its_first_lost_tensor(broken: Broken) -> None:
    folder = broken("vae", lambda tensors: None)
    (file,) = (folder / "vae").glob("*.safetensors")
    length = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8 : 8 + length])
    ends = {name: entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
    last = max(ends, key=lambda name: ends[name])
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"tensor '{last}' is truncated"):
        load(folder)
    file.write_bytes(file.read_bytes()[: 8 + length // 2])
    with pytest.raises(CheckpointError, match="header is truncated"):
        load(folder)
    file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="header is truncated"):
        load(folder)


def test_a_variant_beside_the_plain_file_is_left_alone(broken: Broken) -> None:
    folder = broken("vae", lambda tensors: None)
    expected = load(folder)
    (folder / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"")
    assert load(folder) == expected


@pytest.mark.parametrize("shard", ["50KB", "1GB"])
def test_the_variant_that_is_asked_for_is_read_as_diffusers_writes_it(
    shard: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint(RandomConfig("ti2v", seed=3)), folder)
    plain = load(folder)
    model = WanTransformer3DModel.from_pretrained(folder / "transformer").half()
    model.save_pretrained(folder / "transformer", variant="fp16", max_shard_size=shard)
    halves = [path for path in (folder / "transformer").glob("*.safetensors") if "fp16" in path.name]
    assert (len(halves) > 2) == (shard == "50KB")
    assert load(folder) == plain
    transformer = sum(
        size
        for (component, _), size in stored(checkpoint(RandomConfig("ti2v", seed=3))).items()
        if component == "transformer"
    )
    assert load(folder, variant="fp16") == plain - transformer // 2  # of the other components there are plain ones
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    assert load(folder) == plain - transformer // 2  # the only one that there is
    model.save_pretrained(folder / "transformer", variant="bf16", max_shard_size=shard)
    with pytest.raises(CheckpointError, match="choose one, such as --variant 'bf16'"):
        load(folder)
    assert load(folder, variant="fp16") == plain - transformer // 2


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.pt"])
def test_pickled_weights_are_refused_with_the_remedy(name: str, broken: Broken) -> None:
    folder = broken("vae", lambda tensors: None)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").rename(folder / "vae" / name)
    with pytest.raises(CheckpointError, match="may run any code when they are loaded: use safetensors"):
        load(folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_of_eight_bits_are_the_numbers_that_they_say(dtype: torch.dtype, broken: Broken) -> None:
    name = "blocks.1.attn1.to_q.weight"
    told = {}

    def cast(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = told[name] = tensors[name].to(dtype)

    folder = broken("transformer", cast)
    load(folder)
    weights = weights_of(WanSpec.open(folder).component("transformer"))
    read = weights.read(name, tuple(told[name].shape), torch.bfloat16, torch.device("cpu"))
    assert read.dtype == torch.bfloat16
    assert torch.equal(read, told[name].to(torch.bfloat16))
    assert weights.bytes_read == told[name].numel()


def test_files_that_do_not_belong_together_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    shutil.copytree(checkpoint(RandomConfig(seed=3, max_shard_size="50KB")), folder)
    transformer = folder / "transformer"
    files = sorted(transformer.glob("*.safetensors"))
    assert len(files) > 2
    assert load(folder) > 0
    files[1].rename(tmp_path / "away")
    with pytest.raises(CheckpointError, match=f"{files[1].name}' does not exist, but the index names it"):
        load(folder)
    (tmp_path / "away").rename(files[1])
    (index,) = transformer.glob("*.index.json")
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(folder)
    index.unlink()
    with pytest.raises(CheckpointError, match="and no index"):
        load(folder)
