"""Bits of cached steps: equal to diffusers with its MagCache and the same ratios, whatever the cut and the company."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import cache_oracle
import lora_files
import numpy as np
import oracle
import pytest
import solver_oracle
import torch
from local_line import LocalLine
from oracle import Checkpoint, assert_equal
from test_axes import BOUND
from test_lora import latents_of
from test_parity import DTYPES, picture

from cineline import CheckpointError, Engine, InvalidRequest, ParallelConfig, VideoRequest
from cineline.bench.calibrate import calibrate
from cineline.cli import main
from cineline.core.config import Dtype
from cineline.core.lora import LoraMode
from cineline.engine.hub import open_model
from cineline.families.wan.convert import convert
from cineline.families.wan.job import WanJob
from cineline.families.wan.mag_cache import MOST_SKIPPED
from cineline.families.wan.random_checkpoint import RandomConfig
from cineline.families.wan.ratios import ratios_of
from cineline.families.wan.shapes import WanKind
from cineline.families.wan.spec import WanSpec
from cineline.families.wan.stages import WanStages


def drawn(seed: int, steps: int) -> list[float]:
    """Ratios close to 1."""
    return [1.0, *(1 + 0.03 * np.random.default_rng(seed).standard_normal(steps - 1)).tolist()]


RATIOS = {
    "transformer": {"cond": drawn(1, 12), "uncond": drawn(2, 12)},
    "transformer_2": {"cond": drawn(3, 7), "uncond": drawn(4, 7)},
}
"""By expert and branch: other numbers of steps than those of any request."""

MEANS = [[(one + other) / 2 for one, other in zip(*RATIOS[name].values(), strict=True)] for name in RATIOS]


def with_ratios(plain: Path, folder: Path, measured: Any = RATIOS) -> Path:
    """The checkpoint, with the file beside it."""
    folder.mkdir()
    for entry in plain.iterdir():
        (folder / entry.name).symlink_to(entry)
    (folder / "cineline-cache.json").write_text(json.dumps({"mag": measured}))
    return folder


def several(kind: WanKind) -> list[VideoRequest]:
    """Thresholds, steps, sizes, guidance by both experts, one or none, images, both ways to switch, and no cache."""
    common: dict[str, Any] = {"height": 64, "width": 64, "num_frames": 5, "guidance_scale": 3.0, "cache": "mag"}
    image = {"image": picture(70, 90, seed=1)} if kind != "t2v" else {}
    required = image if kind == "i2v" else {}
    switch = {"switch_step": 3, "guidance_scale_2": 1.0} if kind != "ti2v" else {}
    own: list[dict[str, Any]] = [
        image | {"num_inference_steps": 10},
        required | {"num_inference_steps": 8, "cache": "mag:0.2", "height": 96, "seed": 3} | switch,
        required | {"num_inference_steps": 6, "guidance_scale": 1.0, "cache": "mag:0.5", "num_frames": 9, "seed": 5},
        required | {"num_inference_steps": 4, "cache": None},
    ]
    return [VideoRequest(prompt=f"{number} cats", **common | fields) for number, fields in enumerate(own)]


@cache
def expected(folder: Path, dtype: Dtype, kind: WanKind) -> list[Any]:
    return [
        cache_oracle.run(folder, dtype, request.model_copy(update={"cache": None}), MEANS, threshold_of(request))
        for request in several(kind)
    ]


def threshold_of(request: VideoRequest) -> float:
    """0 skips nothing."""
    return 0.0 if request.cache is None else float(request.cache.removeprefix("mag:"))


def assert_alike(
    folder: Path, cached: Path, kind: WanKind, dtype: Dtype, parallel: ParallelConfig, requests: Sequence[VideoRequest]
) -> None:
    with Engine(cached, parallel, dtype=dtype, device="cpu", in_flight=3) as engine:
        handles = [engine.submit(request) for request in requests]
        for handle, (one, computed) in zip(handles, expected(folder, dtype, kind), strict=True):
            assert_equal(handle.result(120), one)
            job = handle.job
            assert isinstance(job, WanJob)
            assert sum(computed) == (job.steps - len(job.skipped)) * job.branches
            assert bool(job.skipped) == (job.cache is not None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "parallel"),
    [
        ("ti2v", ParallelConfig()),
        ("t2v", ParallelConfig(pp=2)),
        ("i2v", ParallelConfig(pp=4)),
        ("ti2v", ParallelConfig(pp=2, cfg=2)),
        ("i2v", ParallelConfig(cfg=2)),
        ("t2v", ParallelConfig(pp=3, expert_placement="split")),
        ("i2v", ParallelConfig(pp=3, cfg=2, expert_placement="split")),
    ],
)
def test_skipped_steps_in_company_equal_diffusers(
    kind: WanKind, dtype: Dtype, parallel: ParallelConfig, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = checkpoint(RandomConfig(kind, seed=3))
    assert_alike(folder, with_ratios(folder, tmp_path / "model"), kind, dtype, parallel, several(kind))


def test_shared_tokens_equal_diffusers(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Each rank of the tail embeds its own, and keeps a residual of them; so many that bits are alike (test_axes)."""
    folder = checkpoint(RandomConfig("ti2v", heads=4))
    sizes = {"height": 32, "width": 53 * 32, "num_frames": 1, "num_inference_steps": 6}
    request = VideoRequest(prompt="a cat", guidance_scale=3.0, **sizes)
    expected, computed = cache_oracle.run(folder, "float32", request, MEANS, 0.2)
    assert sum(computed) < 2 * 6
    with Engine(with_ratios(folder, tmp_path / "model"), ParallelConfig(pp=2, ulysses=2), device="cpu") as engine:
        assert_equal(engine.submit(request.model_copy(update={"cache": "mag:0.2"})).result(120), expected)


@pytest.mark.parametrize("axes", [{"pp": 2, "ring": 2}, {"pp": 2, "tp": 2}], ids=str)
def test_other_sums_are_close_to_diffusers(axes: dict[str, Any], checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = checkpoint(RandomConfig("ti2v", heads=4))
    sizes = {"height": 64, "width": 96, "num_frames": 5, "num_inference_steps": 6}
    request = VideoRequest(prompt="a cat", guidance_scale=3.0, **sizes)
    (expected, _), computed = cache_oracle.run(folder, "float32", request, MEANS, 0.2)
    assert sum(computed) < 2 * 6
    with Engine(with_ratios(folder, tmp_path / "model"), ParallelConfig(**axes), device="cpu") as engine:
        found = engine.submit(request.model_copy(update={"cache": "mag:0.2"})).result(120).latents
    assert (found - expected).abs().max() <= BOUND * expected.abs().max()


@pytest.mark.parametrize("mode", ["merge", "runtime"])
def test_a_lora_and_four_steps_beside_a_cache_equal_diffusers(
    mode: LoraMode, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Two experts with two steps each; the second of each is skipped."""
    folder = checkpoint(RandomConfig("t2v", seed=3))
    file = lora_files.write(lora_files.truth(folder, 1, alpha=3), "lightx2v", tmp_path / "style.safetensors")
    common: dict[str, Any] = {"prompt": "a cat", "height": 64, "width": 64, "num_frames": 5, "decode": False}
    wanted = VideoRequest(preset="lightning", cache="mag:0.5", **common)
    loras: dict[str, Any] = {"loras": [f"high:{file}@0.7"], "lora_mode": mode}
    with Engine(with_ratios(folder, tmp_path / "model"), ParallelConfig(pp=2), device="cpu", **loras) as engine:
        handle = engine.submit(wanted)
        found = handle.result(120).latents
    assert isinstance(handle.job, WanJob)
    assert handle.job.skipped == (1, 3)

    fields = {"solver": "euler", "sigmas": (1, 0.75, 0.5, 0.25), "flow_shift": 5, "num_inference_steps": 4}
    by_hand = VideoRequest(guidance_scale=1.0, switch_step=2, **common | fields)
    pipe = lora_files.pipeline_with(folder, "float32", [lora_files.Loaded(file, scale=0.7)], fuse=mode == "merge")
    solver = solver_oracle.bound(solver_oracle.solver_of(pipe.scheduler, by_hand), by_hand)
    solver.set_timesteps(4)
    pipe.register_modules(scheduler=solver)
    pipe.register_to_config(boundary_ratio=solver_oracle.boundary_of(solver, 2))
    with cache_oracle.mag_cached(pipe, [0, 0, 1, 1], MEANS, threshold=0.5) as computed:
        expected = latents_of(pipe, by_hand)
    assert computed == [1, 1]
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("kind", "dtype"), [("ti2v", "float32"), ("i2v", "bfloat16")])
def test_ratios_are_what_diffusers_measures(
    kind: WanKind, dtype: Dtype, checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    """What its hooks print at the end: of each expert first the row of one branch, then that of the other."""
    folder = checkpoint(RandomConfig(kind, seed=3))
    fields: dict[str, Any] = {"height": 64, "width": 64, "num_frames": 5, "num_inference_steps": 6}
    fields |= {"guidance_scale": 3.0, "image": picture(70, 90, seed=1)}
    options = {"dtype": dtype, "device": "cpu"}
    spec = WanSpec.open(folder)
    ours = calibrate(spec, ParallelConfig(pp=2), ["a cat"], fields, options, lambda text: None)
    request = VideoRequest(prompt="a cat", **fields)
    pipeline = oracle._pipeline(folder, dtype, True, "float32")
    capsys.readouterr()
    with cache_oracle.mag_cached(pipeline, cache_oracle.experts_of(pipeline, request), [], calibrate=True):
        solver_oracle._run(folder, dtype, request)
    theirs = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("[1.0")]
    assert [row for branches in ours.values() for row in branches.values()] == theirs
    assert len(theirs) == 2 * len(spec.experts)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_snapshots_are_before_computed_steps_and_go_on_with_the_same_bits(
    every: int, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = with_ratios(checkpoint(RandomConfig("t2v", seed=3)), tmp_path / "model")
    spec, request = WanSpec.open(folder), several("t2v")[1].model_copy(update={"decode": False})
    job = spec.resolve(request, 0)
    parallel = spec.place(ParallelConfig(pp=3, expert_placement="split"))
    line = LocalLine(spec, parallel, None, stages_class=WanStages, snapshot_every=every)
    latents = line.run([request])[0][0]
    steps = [snapshot.step for snapshot in line.snapshots(0)]
    assert steps and not set(steps) & set(job.skipped)
    assert max(after - before for before, after in pairwise([0, *steps, job.steps])) <= every + MOST_SKIPPED
    for snapshot in line.snapshots(0):
        anew = LocalLine(spec, spec.place(ParallelConfig(pp=2)), None, stages_class=WanStages)
        assert torch.equal(anew.run([request], resumed={0: snapshot})[0][0], latents)


def test_a_model_without_ratios_is_refused_in_a_sentence_that_names_the_command(checkpoint: Checkpoint) -> None:
    folder = checkpoint(RandomConfig("ti2v", seed=3))
    spec = WanSpec.open(folder)
    with pytest.raises(InvalidRequest, match=rf"run cineline calibrate-cache --model {folder}, or leave cache out"):
        spec.resolve(VideoRequest(prompt="x", cache="mag"), 0)


@pytest.mark.parametrize(
    "measured",
    [
        None,
        [],
        {},
        {"transformer": {"cond": [1.0]}},
        RATIOS | {"transformer_2": {"cond": [1.0], "uncond": [1.0, 1.0]}},
        RATIOS | {"transformer_2": {"cond": []}},
        RATIOS | {"transformer_2": {"cond": [1.0, "1"]}},
        RATIOS | {"transformer_2": {"cond": [1.0, 0.0]}},
        RATIOS | {"transformer_2": {"other": [1.0]}},
    ],
)
def test_a_file_that_has_no_ratios_is_refused(measured: Any, checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = with_ratios(checkpoint(RandomConfig("t2v", seed=3)), tmp_path / "model", measured)
    with pytest.raises(CheckpointError, match=r"cineline-cache\.json.*remove it and run cineline calibrate-cache"):
        WanSpec.open(folder).resolve(VideoRequest(prompt="x", cache="mag"), 0)


@pytest.mark.parametrize("value", ["", "teacache", "mag:", "mag:0", "mag:-1", "mag:nan", "mag:inf", "mag:x", "mag:1:2"])
def test_other_caches_are_refused(value: str) -> None:
    with pytest.raises(InvalidRequest, match=r"cache=.* cannot be used: it is no cache: give mag, or mag:T"):
        VideoRequest(prompt="x", cache=value)


def test_a_threshold_is_settled(checkpoint: Checkpoint) -> None:
    assert VideoRequest(prompt="x", cache="mag").cache == "mag:0.06"
    assert VideoRequest(prompt="x", cache="mag:0.120").cache == "mag:0.12"
    job = open_model("mini-t2v").resolve(VideoRequest(prompt="x", cache="mag"), 0)
    assert job.own_settings["cache"] == "mag:0.06"
    assert "ratios" not in job.own_settings and "calibrates" not in job.own_settings


def test_a_converted_model_keeps_its_ratios(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = with_ratios(checkpoint(RandomConfig("t2v", seed=3)), tmp_path / "model")
    convert(WanSpec.open(folder), tmp_path / "made", "float32", lambda text: None)
    assert ratios_of(WanSpec.open(tmp_path / "made")) == tuple(map(tuple, MEANS))


def test_no_checkpoint_caches_by_default(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = with_ratios(checkpoint(RandomConfig("t2v", seed=3)), tmp_path / "model")
    (folder / "cineline.json").write_text('{"cache": "mag"}')
    with pytest.raises(CheckpointError, match=r"'cache' cannot have the default 'mag'"):
        WanSpec.open(folder)


@pytest.mark.parametrize("name", ["mini-ti2v", "mini-t2v"])
def test_the_minis_have_ratios(name: str) -> None:
    job = open_model(name).resolve(VideoRequest(prompt="x", cache="mag"), 0)
    assert 0.3 < len(job.skipped) / job.steps < 0.7


def test_the_command_writes_the_file(
    checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = checkpoint(RandomConfig("ti2v", seed=3))
    folder = with_ratios(plain, tmp_path / "model")
    (folder / "cineline-cache.json").unlink()
    words = f"calibrate-cache --model {folder} --prompt a --prompt b --height 64 --width 64 --num-frames 1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["cineline", *words.split(), "--num-inference-steps", "5", "--device", "cpu"])
        with pytest.raises(SystemExit) as ended:
            main()
    assert not ended.value.code
    assert capsys.readouterr().out == f"{folder / 'cineline-cache.json'}\n"
    stored = json.loads((folder / "cineline-cache.json").read_text())
    assert {branch: len(row) for branch, row in stored["mag"]["transformer"].items()} == {"cond": 5, "uncond": 5}
    assert stored["measured"]["prompts"] == ["a", "b"]
    assert WanSpec.open(folder).resolve(VideoRequest(prompt="x", cache="mag:9", num_inference_steps=20), 0).skipped


def test_plan_counts_what_a_cache_skips(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    best = {}
    for name, cached in (("none", []), ("mag", ["--cache", "mag"])):
        file = tmp_path / f"{name}.json"
        command = ["plan", "--devices", "1xRTX4090", "--model", "mini-t2v", "--json", str(file), *cached]
        monkeypatch.setattr(sys, "argv", ["cineline", *command])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        best[name] = json.loads(file.read_text())["best"]
    assert "25 steps, of which 12 are skipped (lossy), 8 requests" in capsys.readouterr().out
    assert best["mag"]["command"].replace(" --cache mag:0.06", "") == best["none"]["command"]
    assert 13 / 25 < best["mag"]["total_s"] / best["none"]["total_s"] < 0.75  # text and decoding are as long as before
