"""Files that others write: from each layout every stage reads its own tensors, with the bits of diffusers' folder."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from foreign import Packed, folder_that_says, state_of, write
from oracle import Checkpoint, Oracle, assert_equal
from safetensors.torch import load_file
from test_parity import mixed_requests
from test_weights import VAE_ENCODER, owners

from cineline import Engine, ModelFiles, ParallelConfig
from cineline.core.config import DeviceConfig, Dtype, Place
from cineline.core.request import Kind
from cineline.engine.hub import open_model
from cineline.families.pipeline_parallel import StagePart
from cineline.families.wan.convert import convert
from cineline.families.wan.random_checkpoint import RandomConfig
from cineline.families.wan.shapes import WanKind
from cineline.families.wan.spec import WanSpec
from cineline.families.wan.stages import WanStages
from cineline.families.wan.weights import weights_of
from cineline.families.wan_vae.costs import VaeCosts

KINDS: tuple[WanKind, ...] = ("ti2v", "t2v", "i2v")
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")

LAYOUTS = {  # of the transformers, the VAE, the text encoder
    "original": ("original", "original", "pickle"),
    "with prefix": ("prefix", "prefix", "original"),
    "diffusers": ("diffusers", "diffusers", "diffusers"),
    "half": ("half", "half", "half"),
    "sharded, pickled": ("sharded", "pickle", "original"),
    "pickled": ("pickle", "original", "pickle"),
    "cast": ("cast", "original", "cast"),
    "comfy": ("comfy", "original", "comfy text"),
    "comfy now": ("comfy now", "diffusers", "comfy now"),
    "comfy header": ("comfy header", "original", "comfy header"),
    "musubi rows": ("musubi rows", "original", "musubi rows"),
    "musubi blocks": ("musubi blocks", "original", "original"),
    "lightx2v": ("lightx2v", "original", "lightx2v"),
    "gguf Q8_0": ("gguf Q8_0", "original", "gguf Q8_0"),
    "gguf Q4_0": ("gguf Q4_0", "original", "gguf BF16"),
    "gguf Q4_K": ("gguf Q4_K", "original", "gguf Q5_K"),
}


def shapes(kind: WanKind) -> RandomConfig:
    return RandomConfig(kind, heads=2, head_dim=32, ffn_dim=96, text_width=32, seed=5)


@dataclass(frozen=True)
class Written:
    """A model in a layout. `says`: by component the numbers; `folder`: the checkpoint that it is made of."""

    files: ModelFiles
    says: dict[str, Packed]
    folder: Path


Layout = Callable[[str, WanKind], Written]
Same = Callable[[str, WanKind, Dtype], Path]


@pytest.fixture(scope="module")
def layout(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """The files of a layout, written once."""

    @cache
    def make(name: str, kind: WanKind) -> Written:
        folder, out = checkpoint(shapes(kind)), tmp_path_factory.mktemp("files")
        transformer, vae, text = LAYOUTS[name]
        ways = {"transformer": transformer, "vae": vae, "text_encoder": text}
        if kind != "ti2v":
            ways["transformer_2"] = transformer
        made = {component: write(folder, component, how, out) for component, how in ways.items()}
        paths = {component: path for component, (path, _) in made.items()}
        files = ModelFiles(
            paths["transformer"], paths.get("transformer_2"), paths["vae"], text_encoder_file=paths["text_encoder"]
        )
        return Written(files, {component: packed for component, (_, packed) in made.items()}, folder)

    return make


@pytest.fixture(scope="module")
def same(layout: Layout, tmp_path_factory: pytest.TempPathFactory) -> Same:
    """The folder in diffusers format whose tensors a layout's files say."""

    @cache
    def make(name: str, kind: WanKind, dtype: Dtype) -> Path:
        written = layout(name, kind)
        out = tmp_path_factory.mktemp("same") / "model"
        return folder_that_says(written.folder, out, written.says, getattr(torch, dtype))

    return make


def loaded(spec: WanSpec, stage: int, stages: int, dtype: Dtype) -> tuple[dict[str, torch.Tensor], int]:
    """All tensors of a stage, and the bytes that it read."""
    config = DeviceConfig(dtype=dtype)
    parallel = spec.place(ParallelConfig(pp=stages))
    part = StagePart(Place(pp=stage), parallel, spec.cut(parallel, config)[stage], torch.device("cpu"), config)
    family = WanStages(spec)
    with torch.no_grad():
        nbytes = family.load(part)
    modules = {f"expert {number}": model for number, model in enumerate(family._experts.models)}
    modules["text"] = family._parts[Kind.TEXT]._slice._stack  # type: ignore[attr-defined]
    if family._decoder._decoder is not None:
        modules |= family._decoder._decoder._modules  # type: ignore[attr-defined]
    if family._conditioner._images is not None:
        modules["images"] = family._conditioner._images._vae
    tensors = {f"{name}.{key}": one for name, module in modules.items() for key, one in module.state_dict().items()}
    return tensors, nbytes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_tensor_is_that_of_diffusers_folder(name: str, kind: WanKind, layout: Layout, same: Same) -> None:
    written = layout(name, kind)
    found = open_model(written.folder, files=written.files)
    assert isinstance(found, WanSpec)
    assert found.kind == kind
    keep = set(WanTransformer3DModel._keep_in_fp32_modules)
    for dtype in DTYPES:
        expected = WanSpec.open(same(name, kind, dtype))
        for component in (*expected.experts, "vae", "text_encoder"):
            ours, theirs = weights_of(found.component(component)), weights_of(expected.component(component))
            assert set(ours.names) == {one for one in theirs.names if one != "encoder.embed_tokens.weight"}
            for key in ours.names:
                wanted = torch.float32 if component == "vae" or keep & set(key.split(".")) else getattr(torch, dtype)
                arguments = theirs.stored(key).shape, wanted, torch.device("cpu")
                assert torch.equal(ours.read(key, *arguments), theirs.read(key, *arguments)), f"{component}: {key}"


ROTATED = [
    (name, stages, KINDS[(row + stages) % 3], DTYPES[(row // 3 + stages) % 2])
    for row, name in enumerate(LAYOUTS)
    for stages in (1, 2, 3)
]
"""Each layout on one stage to three, with kinds and dtypes in turn."""


@pytest.mark.parametrize(("name", "stages", "kind", "dtype"), ROTATED)
def test_each_stage_reads_its_own_tensors_alone_out_of_one_file(
    name: str, stages: int, kind: WanKind, dtype: Dtype, layout: Layout, same: Same
) -> None:
    written, expected = layout(name, kind), WanSpec.open(same(name, kind, dtype))
    found = open_model(written.folder, files=written.files)
    assert isinstance(found, WanSpec)
    cuts = found.cut(found.place(ParallelConfig(pp=stages)), DeviceConfig(dtype=dtype))
    units = VaeCosts.of(found.vae).names
    for stage in range(stages):
        (tensors, nbytes), (wanted, _) = (loaded(spec, stage, stages, dtype) for spec in (found, expected))
        assert tensors.keys() == wanted.keys()
        for key, one in tensors.items():
            assert one.dtype == wanted[key].dtype
            assert torch.equal(one, wanted[key]), key
        assert nbytes == sum(
            packed.nbytes(key)
            for component, packed in written.says.items()
            for key in packed.state
            if stage in owners(component, key, cuts, units)
            and not (kind == "t2v" and component == "vae" and key.startswith(VAE_ENCODER))
        )


COMBINATIONS = list(product(KINDS, DTYPES, (1, 2, 3)))
RUNS = [(list(LAYOUTS)[number % len(LAYOUTS)], *one, 2) for number, one in enumerate(COMBINATIONS)]
RUNS += [(name, *COMBINATIONS[(number + 10) % len(COMBINATIONS)], 1) for number, name in enumerate(LAYOUTS)]
"""Each combination, and each layout with two kinds, both dtypes and two numbers of stages; requests at once."""


@pytest.mark.parametrize(("name", "kind", "dtype", "stages", "count"), RUNS)
def test_latents_and_frames_equal_diffusers(
    name: str, kind: WanKind, dtype: Dtype, stages: int, count: int, layout: Layout, same: Same, oracle: Oracle
) -> None:
    written, folder = layout(name, kind), same(name, kind, dtype)
    requests = mixed_requests(kind)[:count]
    with Engine(written.folder, ParallelConfig(pp=stages), files=written.files, dtype=dtype, device="cpu") as engine:
        handles = [engine.submit(request) for request in requests]
        expected = [oracle.run(folder, dtype, request) for request in requests]  # while the ranks are at work
        for handle, one in zip(handles, expected, strict=True):
            assert_equal(handle.result(120), one)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("number", "name"), list(enumerate(LAYOUTS)))
def test_what_is_converted_is_what_the_files_say(
    number: int,
    name: str,
    dtype: Dtype,
    layout: Layout,
    same: Same,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cineline.families.wan.convert.PIECE_BYTES", 3000)  # some rows of most tensors
    kind = KINDS[number % 3]
    written, expected = layout(name, kind), same(name, kind, dtype)
    spec = open_model(written.folder, files=written.files)
    assert isinstance(spec, WanSpec)
    told: list[str] = []
    convert(spec, tmp_path / "model", dtype, told.append, limit=40_000)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert len(told) == len(spec.experts) + 2
    made = WanSpec.open(tmp_path / "model")
    assert replace(made, folder=expected, vae={}) == replace(WanSpec.open(expected), vae={})
    assert (made.vae, made.scheduler) == (spec.vae, spec.scheduler)
    for component in (*made.experts, "vae", "text_encoder"):
        found, wanted = state_of(tmp_path / "model", component), state_of(expected, component)
        assert found.keys() == wanted.keys()
        for key, one in found.items():
            assert one.dtype in (wanted[key].dtype, torch.bfloat16)  # GGUF's BF16 stays that
            assert torch.equal(one.float(), wanted[key].float())
        for file in (tmp_path / "model" / component).glob("*.safetensors"):
            sizes = [one.nbytes for one in load_file(file).values()]
            assert sum(sizes) <= 40_000 or len(sizes) == 1


@pytest.mark.parametrize("name", ["sharded, pickled", "pickled", "comfy", "musubi rows", "musubi blocks", "gguf Q8_0"])
def test_pieces_of_a_tensor_are_the_whole_of_it_and_no_larger_than_asked(name: str, layout: Layout) -> None:
    """Of each are read only its own rows: what is in memory is bounded, however large the embedding is."""
    spec = open_model(layout(name, "ti2v").folder, files=layout(name, "ti2v").files)
    assert isinstance(spec, WanSpec)
    cut = 0
    for component in ("transformer", "vae", "text_encoder"):
        weights = weights_of(spec.component(component))
        for key in sorted(weights.names, key=lambda key: -math.prod(weights.stored(key).shape))[:20]:
            stored = weights.stored(key)
            wanted = weights.read(key, stored.shape, torch.bfloat16, torch.device("cpu"))
            before, pieces = weights.bytes_read, []
            for piece in weights.pieces(key, stored.shape, torch.bfloat16, 5000):
                assert 4 * piece.numel() <= 5000 or len(piece) == 1
                assert weights.bytes_read - before <= max(5000, stored.nbytes / len(wanted)) + 4 * len(wanted)
                before = weights.bytes_read
                pieces.append(piece)
            assert torch.equal(torch.cat(pieces), wanted)
            cut += len(pieces) > 1
    assert cut > 30


def test_diffusers_makes_the_same_of_what_is_converted(layout: Layout, oracle: Oracle, tmp_path: Path) -> None:
    written = layout("comfy", "i2v")
    spec = open_model(written.folder, files=written.files)
    assert isinstance(spec, WanSpec)
    convert(spec, tmp_path / "model", "bfloat16")
    request = mixed_requests("i2v")[1]
    with Engine(spec, ParallelConfig(pp=2), dtype="bfloat16", device="cpu") as engine:
        assert_equal(engine.submit(request).result(120), oracle.run(tmp_path / "model", "bfloat16", request))


@pytest.mark.parametrize("name", ["sharded, pickled", "musubi blocks", "gguf Q4_K"])
def test_blocks_that_are_shared_give_the_folders_bits(name: str, layout: Layout, same: Same) -> None:
    """Each rank cuts its part of a tensor out of what the file says of all of it."""
    written, parallel = layout(name, "ti2v"), ParallelConfig(pp=2, tp=2)
    request = mixed_requests("ti2v")[0]
    with (
        Engine(written.folder, parallel, files=written.files, device="cpu") as ours,
        Engine(same(name, "ti2v", "float32"), parallel, device="cpu") as theirs,
    ):
        found, expected = [engine.submit(request) for engine in (ours, theirs)]
        assert found.result(120).latents.equal(expected.result(120).latents)
