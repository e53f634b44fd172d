"""The models that ship: they load by name, equal diffusers, draw what is asked, and are in the wheel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from oracle import Oracle, assert_equal
from PIL import Image

from cineline import Engine, ParallelConfig, VideoRequest
from cineline.cli import run
from cineline.core.config import Dtype
from cineline.core.extras import EXTRAS
from cineline.engine.hub import MINIS, open_model
from cineline.families.wan.spec import WanSpec
from training.__main__ import app
from training.judge import judge
from training.scenes import Scene, first_frame, held_out_scenes
from training.score import Shown, show, tally

REPOSITORY = Path(__file__).parent.parent
SIZE_LIMIT = 30e6


def folder_of(name: str | None) -> Path:
    spec = open_model(name)
    assert isinstance(spec, WanSpec)
    return spec.folder


def test_minis_go_by_name_and_the_first_is_the_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert MINIS == ("mini-ti2v", "mini-t2v")
    assert folder_of(None) == folder_of("mini-ti2v") != folder_of("mini-t2v")
    Path("mini-ti2v").mkdir()  # a folder of that name here does not hide it
    assert folder_of("mini-ti2v") == folder_of(None)


def test_minis_are_small_and_have_a_card_and_a_licence() -> None:
    folders = [folder_of(name) for name in MINIS]
    assert sum(file.stat().st_size for folder in folders for file in folder.rglob("*")) <= SIZE_LIMIT
    for folder in folders:
        assert "license: apache-2.0" in (folder / "README.md").read_text()
        assert "Apache License" in (folder / "LICENSE").read_text()


@pytest.mark.parametrize(("name", "with_image"), [("mini-ti2v", False), ("mini-ti2v", True), ("mini-t2v", False)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_minis_equal_diffusers(name: str, with_image: bool, dtype: Dtype, oracle: Oracle) -> None:
    spec = WanSpec.open(folder_of(name))
    scene = Scene("orange", "triangle", "up", "purple")
    request = VideoRequest(
        prompt=scene.prompt,
        image=Image.fromarray(first_frame(scene, 128)) if with_image else None,
        **{field: spec.defaults[field] for field in ("height", "width", "num_frames")},
        guidance_scale=3,
        guidance_scale_2=None if name == "mini-ti2v" else 2.5,
        num_inference_steps=3,  # one of the first of two experts, two of the other
        seed=3,
    )
    with Engine(name, ParallelConfig(pp=2), dtype=dtype) as engine:
        videos = [engine.submit(request) for _ in range(2)]
        expected = oracle.run(spec.folder, dtype, request)  # while the ranks are at work
        for video in videos:
            assert_equal(video.result(120), expected)


@pytest.mark.parametrize(("name", "with_image"), [("mini-ti2v", False), ("mini-ti2v", True), ("mini-t2v", False)])
def test_a_few_held_out_prompts_are_drawn(name: str, with_image: bool) -> None:
    """A glance: `python -m training score` has the figures."""
    with Engine(name, ParallelConfig(pp=2)) as engine:
        shown: list[Shown] = show(engine, held_out_scenes()[64:68], 100, with_image, lambda text: None)
    right = {key: good for key, (good, _) in tally(shown).items()}
    assert right["colour"] == 4
    assert right["background"] == 4
    assert right["motion"] >= 3
    assert right["shape"] >= 3
    assert not with_image or min(one.first_frame_psnr or 0 for one in shown) >= 22


def test_unknown_words_do_no_harm() -> None:
    """Also a full stop, and a long negative prompt that has some words that are known."""
    negative = "red, overexposed, static, blurry details, subtitles, worst quality, a cluttered background, three legs"
    prompts = [
        "a cinematic red circle moving up on a black background, 8k, masterpiece",
        "a red circle moving up on a black background.",
        "a red circle moving up on a black background",
        "quagga zirkus 42 ümläut 猫",
    ]
    with Engine(None, ParallelConfig(pp=2)) as engine:
        handles = [
            engine.submit(VideoRequest(prompt=prompt, negative_prompt=negative if number == 2 else "blurry, ugly"))
            for number, prompt in enumerate(prompts)
        ]
        *drawn, other = [handle.result(60).frames for handle in handles]
    for frames in drawn:
        assert frames is not None
        seen = judge(frames)
        assert (seen.colour, seen.motion, seen.background) == ("red", "up", "black")
    assert other is not None
    assert other.std() > 5  # something is drawn


def test_the_wheel_holds_the_models_and_works_elsewhere(tmp_path: Path) -> None:
    """Without the libraries that only some commands need."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=REPOSITORY, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True, timeout=120)
    assert (site / "cineline/server/page/index.html").exists()
    assert not (site / "training").exists() and not (site / "benchmarks").exists()
    absent = [*EXTRAS, "peft"]  # which needs one of them
    hidden = f"import sys; sys.modules.update(dict.fromkeys({absent}))"
    (site / "sitecustomize.py").write_text(hidden)  # for the ranks' processes too
    environment = os.environ | {"PYTHONPATH": str(site)}
    where = subprocess.run(
        [sys.executable, "-c", "import cineline, sys; assert not sys.modules['accelerate']; print(cineline.__file__)"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(where.stdout.strip()).is_relative_to(site)
    for command in (
        ["generate", "a red square", "--num-inference-steps", "2", "--quiet"],
        ["plan", "--model", "Wan-AI/Wan2.2-TI2V-5B-Diffusers", "--devices", "4xL40S"],
    ):
        subprocess.run(
            [sys.executable, "-m", "cineline", *command], env=environment, cwd=tmp_path, check=True, timeout=120
        )
    assert (tmp_path / "out.mp4").stat().st_size > 1000


def test_the_score_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def score(*options: str) -> object:
        monkeypatch.setattr(sys, "argv", ["training", "score", *options])
        with pytest.raises(SystemExit) as ended:
            run(app)
        return ended.value.code

    files = ["--json", str(tmp_path / "score.json"), "--sheet", str(tmp_path / "sheet.png")]
    assert not score("--prompts", "2", "--image-to-video", "--pp", "2", *files)
    found = json.loads((tmp_path / "score.json").read_text())
    assert found["counts"]["background"][1] == len(found["videos"]) == 2
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 5 * 128
    assert score("--prompts", "129") == 2
    assert "use less" in capsys.readouterr().err
