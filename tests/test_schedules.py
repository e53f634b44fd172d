"""The fields of a request that say how its steps are made: what they mean, what is refused, what a preset fills in."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import solver_oracle
import torch
from oracle import Checkpoint
from PIL import Image
from safetensors.torch import load_file

from cineline import InvalidRequest, VideoRequest
from cineline.errors import CheckpointError
from cineline.families.wan.denoise import make_solver, make_steps
from cineline.families.wan.job import WanJob
from cineline.families.wan.known import KNOWN
from cineline.families.wan.random_checkpoint import RandomConfig, save_random_checkpoint
from cineline.families.wan.schedules import CLASSES, solver_of
from cineline.families.wan.spec import DEFAULTS_FILE, WanSpec

TI2V, T2V, I2V = list(KNOWN.values())[:3]


def resolved(spec: WanSpec = T2V, **fields: Any) -> WanJob:
    image = Image.new("RGB", (8, 8)) if spec.kind == "i2v" else None
    sizes = {"height": 64, "width": 64} if spec.kind == "i2v" else {}
    return spec.resolve(VideoRequest(prompt="x", image=image, **sizes, **fields), 0)


def steps_of(spec: WanSpec, job: WanJob) -> tuple[list[float], list[int]]:
    """Timesteps and experts."""
    solver = make_solver(*solver_of(spec, job.solver), job, torch.device("cpu"))
    steps = make_steps(solver, job)
    return [float(step.timestep) for step in steps], [step.expert for step in steps]


# What they mean.


@pytest.mark.parametrize("spec", [T2V, I2V])
def test_the_preset_is_the_published_schedule_of_four_steps(spec: WanSpec) -> None:
    job = resolved(spec, preset="lightning")
    times, experts = steps_of(spec, job)
    assert times == pytest.approx([1000, 937.5, 833.3333, 625], abs=1e-3)
    assert experts == [0, 0, 1, 1]
    assert (job.steps, job.branches, job.flow_shift, job.boundary_ratio) == (4, 1, 5.0, None)
    assert spec.high_steps(job) == 2


def test_the_preset_says_what_it_set() -> None:
    job = resolved(preset="lightning")
    assert job.own_settings == {
        "flow_shift": "5",
        "switch_step": "2",
        "solver": "euler",
        "sigmas": "1,0.75,0.5,0.25",
    }


def test_with_one_expert_the_preset_has_no_switch() -> None:
    job = resolved(TI2V, preset="lightning")
    assert (job.switch_step, job.boundary_ratio, job.solver) == (None, None, "euler")
    assert steps_of(TI2V, job)[0] == pytest.approx([1000, 937.5, 833.3333, 625], abs=1e-3)


@pytest.mark.parametrize(
    ("beside", "expected"),
    [
        ({"num_inference_steps": 8}, {"steps": 8, "switch_step": 4, "sigmas": tuple(1 - i / 8 for i in range(8))}),
        ({"sigmas": [1, 0.6, 0.2]}, {"steps": 3, "switch_step": 1, "sigmas": (1.0, 0.6, 0.2)}),
        ({"solver": "lcm"}, {"solver": "lcm", "sigmas": (1.0, 0.75, 0.5, 0.25)}),
        ({"solver": "dpm++"}, {"solver": "dpm++", "sigmas": None, "steps": 4}),
        ({"flow_shift": 8}, {"flow_shift": 8.0, "steps": 4}),
        ({"boundary_ratio": 0.5}, {"boundary_ratio": 0.5, "switch_step": None}),
        ({"switch_step": 1}, {"switch_step": 1}),
        ({"guidance_scale": 3.5}, {"guidance_scale": 3.5, "guidance_scale_2": 3.5, "branches": 2}),
        ({"guidance_scale": 3.5, "guidance_scale_2": 1}, {"guidance_scale": 3.5, "guidance_scale_2": 1.0}),
    ],
)
def test_options_beside_the_preset_win(beside: dict[str, Any], expected: dict[str, Any]) -> None:
    job = resolved(preset="lightning", **beside)
    assert {name: getattr(job, name) for name in expected} == expected


def test_twenty_steps_change_experts_at_the_tenth() -> None:
    job = resolved(preset="lightning", num_inference_steps=20, guidance_scale=3.5)
    times, experts = steps_of(T2V, job)
    assert experts == [0] * 10 + [1] * 10
    assert times == pytest.approx([1000 * 5 * u / (1 + 4 * u) for u in (1 - step / 20 for step in range(20))], abs=1e-3)


@pytest.mark.parametrize(("switch", "high"), [(0, 0), (1, 1), (3, 3), (4, 4)])
def test_a_switch_by_number_splits_the_steps_there(switch: int, high: int) -> None:
    job = resolved(switch_step=switch, num_inference_steps=4)
    assert steps_of(T2V, job)[1] == [0] * high + [1] * (4 - high)
    assert T2V.high_steps(job) == high


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 20, 40])
@pytest.mark.parametrize("solver", [None, *CLASSES])
def test_the_planner_knows_whose_steps_they_are(solver: Any, steps: int) -> None:
    own = replace(T2V, scheduler_class="FlowMatchEulerDiscreteScheduler", scheduler={"shift": 12.0})
    for spec in (T2V, own) if solver is None else (T2V,):
        for boundary in (0.5, 0.875, 0.9):
            job = resolved(spec, solver=solver, num_inference_steps=steps, boundary_ratio=boundary)
            assert spec.high_steps(job) == steps_of(spec, job)[1].count(0)


def test_a_models_own_switch_is_one_of_its_own_steps() -> None:
    own = replace(T2V, defaults={**T2V.defaults, "num_inference_steps": 4, "switch_step": 2})
    assert resolved(own).switch_step == 2
    assert resolved(own, num_inference_steps=40).switch_step is None


@pytest.mark.parametrize(
    ("defaults", "words"),
    [
        ({"sigmas": [1, 0.5], "num_inference_steps": 4}, "'sigmas': .* 'num_inference_steps': 4} do not go together"),
        ({"boundary_ratio": 0.9, "switch_step": 2}, "'boundary_ratio': 0.9, 'switch_step': 2} do not go together"),
    ],
)
def test_defaults_that_contradict_each_other_are_the_models(
    defaults: dict[str, Any], words: str, tmp_path: Path
) -> None:
    folder = save_random_checkpoint(tmp_path / "model", RandomConfig("t2v"))
    (folder / DEFAULTS_FILE).write_text(json.dumps(defaults))
    with pytest.raises(CheckpointError, match=words):
        WanSpec.open(folder)


def test_a_schedulers_own_levels_are_named() -> None:
    karras = replace(T2V, scheduler={**T2V.scheduler, "use_karras_sigmas": True})
    with pytest.raises(
        InvalidRequest, match=r"has 'use_karras_sigmas', which makes its own: .* leave sigmas and preset"
    ):
        resolved(karras, preset="lightning")


def test_a_shift_that_nobody_says_is_refused(tmp_path: Path) -> None:
    folder = save_random_checkpoint(tmp_path / "model", RandomConfig("t2v"))
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dynamic_shifting": True}))
    with pytest.raises(CheckpointError, match="use_dynamic_shifting"):
        WanSpec.open(folder)


def test_a_second_scale_that_does_nothing_is_told(caplog: pytest.LogCaptureFixture) -> None:
    resolved(preset="lightning", guidance_scale_2=3.5)
    assert "guidance_scale_2=3.5 has no effect" in caplog.text


@pytest.mark.parametrize("solver", CLASSES)
def test_another_solver_keeps_the_checkpoints_shift(solver: str) -> None:
    """12 for T2V-A14B: `from_config` alone would make it 1 where the parameter has another name."""
    for spec in (T2V, replace(T2V, scheduler_class="FlowMatchEulerDiscreteScheduler", scheduler={"shift": 12.0})):
        made = make_solver(*solver_of(spec, solver), resolved(num_inference_steps=3), torch.device("cpu"))  # type: ignore[arg-type]
        assert type(made).__name__ == CLASSES[solver]  # type: ignore[index]
        assert (made.config.get("flow_shift") or made.config.get("shift")) == 12.0


@pytest.mark.parametrize("solver", ["unipc", "euler", "lcm"])
def test_noise_levels_are_taken_before_the_shift(solver: str) -> None:
    job = resolved(solver=solver, sigmas=[0.9, 0.5, 0.1], flow_shift=2.0, boundary_ratio=0.6)
    times, experts = steps_of(T2V, job)
    expected = [1000 * 2 * u / (1 + u) for u in (0.9, 0.5, 0.1)]
    assert times == pytest.approx([int(time) for time in expected] if solver == "unipc" else expected)
    assert experts == [0, 0, 1]
    assert (job.steps, T2V.high_steps(job)) == (3, 2)


def test_a_text_of_numbers_is_a_row_of_them() -> None:
    assert resolved(sigmas="1, 0.75,0.5").sigmas == resolved(sigmas=[1, 0.75, 0.5]).sigmas == (1.0, 0.75, 0.5)


def test_only_a_scale_of_exactly_one_beside_guidance_is_skipped() -> None:
    scales = {(4.0, 1.0): (1,), (4.0, 0.99): (), (4.0, 3.0): (), (1.0, 1.0): (), (4.0, None): ()}
    for (first, second), unguided in scales.items():
        job = resolved(guidance_scale=first, guidance_scale_2=second, skip_guidance_at_one=True)
        assert job.unguided == job.shape.unguided == unguided
        assert resolved(guidance_scale=first, guidance_scale_2=second).unguided == ()
    assert (
        "skip_guidance_at_one" in resolved(guidance_scale=4, guidance_scale_2=1, skip_guidance_at_one=True).own_settings
    )


# What is refused.


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sigmas": []}, "sigmas=() do not fall"),
        ({"sigmas": [1, 0.5, 0.5]}, "do not fall from 1 at most to above 0"),
        ({"sigmas": [0.5, 0.75]}, "do not fall"),
        ({"sigmas": [1.1, 0.5]}, "do not fall"),
        ({"sigmas": [1, 0]}, "do not fall"),
        ({"sigmas": [1, float("nan"), 0.5]}, "do not fall"),
        ({"sigmas": [float("nan")]}, "do not fall"),
        ({"sigmas": [1, 0.5], "num_inference_steps": 4}, "are 2 steps and num_inference_steps=4"),
        ({"sigmas": [1, 0.5], "solver": "dpm++"}, "cannot be given to solver='dpm++'"),
        ({"sigmas": "1,a"}, "it is no row of numbers"),
        ({"sigmas": ["1"]}, "it is no number"),
        ({"sigmas": 1}, "cannot be used"),
        ({"solver": "ddim"}, "solver='ddim' is not known: use 'unipc', 'euler', 'dpm++' or 'lcm'"),
        ({"preset": "thunder"}, "preset='thunder' is not known: use 'lightning'"),
        ({"switch_step": 5, "num_inference_steps": 4}, "switch_step=5 is no step of 4: use 0"),
        ({"switch_step": -1}, "switch_step=-1 is no step of 40"),
        ({"switch_step": 2, "boundary_ratio": 0.9}, "both say where the second expert takes over"),
        ({"switch_step": 2, "boundary_ratio": 0.9, "preset": "lightning"}, "both say"),
        ({"num_inference_steps": 0, "preset": "lightning"}, "num_inference_steps=0 is below 1"),
        ({"num_inference_steps": 10**9, "preset": "lightning"}, "is above 10000"),
    ],
)
def test_what_breaks_a_rule_is_refused_in_one_sentence(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        resolved(**fields)
    assert words in str(refused.value)
    assert str(refused.value).endswith(".") and "\n" not in str(refused.value)


def test_one_expert_has_no_switch() -> None:
    with pytest.raises(InvalidRequest, match="switch_step=2 needs a model with two experts"):
        resolved(TI2V, switch_step=2)


@pytest.mark.parametrize("own", [{"use_karras_sigmas": True}, {"use_flow_sigmas": False}, {"use_beta_sigmas": True}])
def test_levels_that_the_checkpoints_scheduler_would_not_keep_are_refused(own: dict[str, Any]) -> None:
    spec = replace(T2V, scheduler={**T2V.scheduler, **own})
    with pytest.raises(
        InvalidRequest, match=r"cannot be given to (the checkpoint's 'UniPC|a checkpoint whose scheduler)"
    ):
        resolved(spec, sigmas=[1, 0.5])


# A checkpoint's own defaults.


def with_defaults(folder: Path, plain: Path, **own: Any) -> WanSpec:
    shutil.copytree(plain, folder)
    (folder / "cineline.json").write_text(json.dumps(own))
    return WanSpec.open(folder)


def test_a_checkpoints_defaults_give_way_to_what_they_do_not_go_with(checkpoint: Checkpoint, tmp_path: Path) -> None:
    plain = checkpoint(RandomConfig("t2v", seed=3))
    spec = with_defaults(tmp_path / "a", plain, solver="euler", sigmas=[1, 0.5], switch_step=1)
    assert (resolved(spec).steps, resolved(spec).solver, resolved(spec).switch_step) == (2, "euler", 1)
    assert resolved(spec, num_inference_steps=3).sigmas is None
    assert resolved(spec, solver="dpm++").sigmas is None
    assert resolved(spec, boundary_ratio=0.5).switch_step is None
    preset = resolved(spec, preset="lightning")
    assert (preset.steps, preset.switch_step) == (4, 2)


def test_a_checkpoint_has_no_preset(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'preset' cannot have the default 'lightning'"):
        with_defaults(tmp_path / "b", checkpoint(RandomConfig("t2v", seed=3)), preset="lightning")


# The command line.

SMALL = ["--height", "32", "--width", "64", "--num-frames", "5"]


def generate(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cineline", "generate", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_preset_end_to_end_equals_diffusers(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder, file = checkpoint(RandomConfig("t2v", seed=3)), tmp_path / "a.safetensors"
    options = ["--preset", "lightning", "--seed", "5", "--pp", "2", "--save-latents", str(file)]
    done = generate("a cat", "--model", str(folder), *SMALL, *options)
    assert done.returncode == 0, done.stderr
    words = "4 steps, no guidance, flow shift 5, switch step 2, solver euler, sigmas 1,0.75,0.5,0.25, seed 5"
    assert words in done.stderr
    request = VideoRequest(
        prompt="a cat",
        height=32,
        width=64,
        num_frames=5,
        seed=5,
        guidance_scale=1,
        flow_shift=5,
        solver="euler",
        sigmas=(1, 0.75, 0.5, 0.25),
        switch_step=2,
    )
    assert torch.equal(load_file(file)["latents"], solver_oracle.run(folder, "float32", request)[0])


def test_a_file_of_requests_has_schedules_of_its_own(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Options beside it are the lines' defaults."""
    lines: list[dict[str, Any]] = [
        {"sigmas": [1, 0.5]},
        {"preset": "lightning", "solver": "lcm", "sigmas": None},
        {"sigmas": "1,0.9,0.4"},
    ]
    file = tmp_path / "requests.jsonl"
    (tmp_path / "all").mkdir()
    file.write_text("\n".join(json.dumps({"prompt": "x", **line}) for line in lines))
    common = ["--model", str(checkpoint(RandomConfig("t2v", seed=3))), *SMALL, "--save-latents", str(tmp_path / "all")]
    done = generate("--requests", str(file), *common, "--sigmas", "1,0.8", "--guidance-scale", "4")
    assert done.returncode == 0, done.stderr
    first, second, third = (line for line in done.stderr.splitlines() if " frames at " in line)
    assert "2 steps, guidance 4" in first and "sigmas 1,0.5," in first and "solver" not in first
    assert "2 steps, guidance 4" in second and "switch step 1, solver lcm, sigmas 1,0.8," in second
    assert "3 steps" in third and "sigmas 1,0.9,0.4," in third
    assert len(list((tmp_path / "all").iterdir())) == 3


def test_a_flag_that_is_not_there_does_not_hide_a_checkpoints_default(checkpoint: Checkpoint, tmp_path: Path) -> None:
    own = {"guidance_scale": 4, "guidance_scale_2": 1, "skip_guidance_at_one": True, "num_inference_steps": 2}
    spec = with_defaults(tmp_path / "model", checkpoint(RandomConfig("t2v", seed=3)), **own)
    done = generate("x", "--model", str(spec.folder), *SMALL, "--save-latents", str(tmp_path / "a.safetensors"))
    assert done.returncode == 0, done.stderr
    assert "skip guidance at one, seed" in done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sigmas", "0.5,1"], "do not fall"),
        (["--solver", "heun"], "use 'unipc', 'euler', 'dpm++' or 'lcm'"),
        (["--switch-step", "9", "--num-inference-steps", "4"], "switch_step=9 is no step of 4"),
    ],
)
def test_an_option_that_breaks_a_rule_is_refused_before_anything_runs(
    options: list[str], words: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    model = ["--model", str(checkpoint(RandomConfig("t2v", seed=3)))]
    done = generate("x", *model, *SMALL, *options, "--output", str(tmp_path / "a.mp4"))
    assert done.returncode == 2
    assert words in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fields", "steps", "scales", "switch"),
    [
        ({}, 4, (1.0, 1.0), 2),
        ({"num_inference_steps": 20, "guidance_scale": 3.5, "flow_shift": 8}, 20, (3.5, 3.5), 10),
        ({"num_inference_steps": 6, "switch_step": 2, "guidance_scale": 3.5, "guidance_scale_2": 1}, 6, (3.5, 1.0), 2),
    ],
)
def test_comfyuis_numbers(fields: dict[str, Any], steps: int, scales: tuple[float, float], switch: int) -> None:
    """Its "simple" scheduler takes each (1000 / steps)th of a thousand levels from above, shifted."""
    job = resolved(preset="lightning", skip_guidance_at_one=True, **fields)
    times, experts = steps_of(T2V, job)
    shift = job.flow_shift or 0.0
    table = [shift * u / (1 + (shift - 1) * u) for u in (number / 1000 for number in range(1, 1001))]
    simple = [1000 * table[-(1 + int(step * 1000 / steps))] for step in range(steps)]
    assert times == pytest.approx(simple, rel=2e-3)  # a level is 0.001 off where steps do not divide 1000
    assert (job.steps, job.guidance_scale, job.guidance_scale_2) == (steps, *scales)
    assert experts == [0] * switch + [1] * (steps - switch)
