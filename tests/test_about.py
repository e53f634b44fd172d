"""What a file says of itself: the request that made it runs again, with the same bits; nothing of the machine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from cineline import OutputError, Video, VideoRequest
from cineline.cli.show import show
from cineline.core.lora import Lora
from cineline.core.output import STILL_SUFFIXES, VIDEO_SUFFIXES
from cineline.engine.about import _given, line_of
from cineline.engine.hub import open_model, public_name
from cineline.families.wan.known import KNOWN
from cineline.media.about import picture_options, read_about
from cineline.media.result import save_latents

FRAMES = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
SUFFIXES = [*VIDEO_SUFFIXES, *STILL_SUFFIXES]


def about(prompt: str) -> str:
    return json.dumps({"request": {"prompt": prompt}})


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(deadline=None, max_examples=20)
@given(prompt=st.text(max_size=200) | st.just("x" * 10_000))
def test_every_container_keeps_what_is_said(suffix: str, prompt: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / f"a{suffix}"
    Video(torch.zeros(1), FRAMES, 8, lambda: about(prompt)).save(path)
    assert read_about(path) == {"request": {"prompt": prompt}}


def test_latents_and_each_picture_of_a_folder_say_it_too(tmp_path: Path) -> None:
    save_latents(torch.ones(2), tmp_path / "a.safetensors", about("a cat"))
    assert read_about(tmp_path / "a.safetensors") == {"request": {"prompt": "a cat"}}
    assert load_file(tmp_path / "a.safetensors")["latents"].equal(torch.ones(2))
    Video(torch.zeros(1), FRAMES, 8, lambda: about("a cat")).save(f"{tmp_path}/shots/")
    assert read_about(tmp_path / "shots" / "0001.png") == {"request": {"prompt": "a cat"}}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_without_metadata_a_file_says_nothing_and_shows_the_same(suffix: str, tmp_path: Path) -> None:
    video = Video(torch.zeros(1), FRAMES, 8, lambda: about("a secret cat"))
    video.save(tmp_path / f"a{suffix}", metadata=False)
    assert b"secret" not in (tmp_path / f"a{suffix}").read_bytes()
    with pytest.raises(OutputError, match="does not say what made it"):
        read_about(tmp_path / f"a{suffix}")
    if suffix in (".png", ".webp"):
        video.save(tmp_path / f"b{suffix}")
        one, other = (np.asarray(Image.open(tmp_path / f"{name}{suffix}").convert("RGB")) for name in "ab")
        assert np.array_equal(one, FRAMES[0]) and np.array_equal(other, FRAMES[0])


@pytest.mark.parametrize("text", ["", "[1]", '{"request": 1}', "no JSON", "[" * 50_000])
def test_another_programs_words_are_none_of_ours(text: str, tmp_path: Path) -> None:
    Video(torch.zeros(1), FRAMES, 8, lambda: text).save(tmp_path / "a.png")
    with pytest.raises(OutputError, match="does not say what made it"):
        read_about(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["no.mp4", "a.mp4", "a.png", "a.safetensors", "a.txt"])
def test_what_cannot_be_read_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name.replace("no", "other")).write_text("none")
    with pytest.raises(OutputError, match=r"cannot be read|ends in '.txt': give a file in .mp4"):
        read_about(tmp_path / name)


@settings(deadline=None)
@given(
    fields=st.fixed_dictionaries(
        {"prompt": st.text(min_size=1, max_size=20).filter(str.strip)},
        optional={
            "negative_prompt": st.text(max_size=9),
            "seed": st.integers(0, 2**64 - 1),
            "guidance_scale": st.floats(-3, 30),
            "guidance_scale_2": st.floats(-3, 30),
            "flow_shift": st.floats(0.01, 50),
            "num_inference_steps": st.integers(1, 99),
            "solver": st.sampled_from(["unipc", "euler", "dpm++", "lcm"]),
            "preset": st.just("lightning"),
            "skip_guidance_at_one": st.booleans(),
            "num_frames": st.sampled_from([1, 5, 81]),
            "fps": st.integers(1, 99),
            "timeout_s": st.just(5.0),
        },
    ),
    switch=st.sampled_from([{}, {"boundary_ratio": 0.5}, {"switch_step": 1}]),
    loras=st.sampled_from([{}, {"loras": []}, {"loras": ["b@0.25", "a"]}]),
)
def test_a_line_resolves_to_the_job_that_it_tells_of(
    fields: dict[str, Any], switch: dict[str, Any], loras: dict[str, Any]
) -> None:
    given = tuple(Lora.of(text) for text in ("a=one", "b=high:two@0.5"))
    spec = replace(KNOWN["Wan-AI/Wan2.2-T2V-A14B-Diffusers"], loras=given, lora_mode="runtime")
    request = VideoRequest(**fields, **switch, **loras)
    job = spec.resolve(request, 0)
    line = json.loads(json.dumps(line_of(request, job)))
    assert spec.resolve(VideoRequest(**line), 0) == job
    assert not line.keys() & {"timeout_s", "decode", "num_videos", "image", "preset"}


def test_levels_of_ones_own_are_in_the_line_whose_model_has_others() -> None:
    spec = KNOWN["Wan-AI/Wan2.2-T2V-A14B-Diffusers"]
    sparse = replace(spec, defaults={**spec.defaults, "sigmas": (1.0, 0.5), "skip_guidance_at_one": True})
    for request in (
        VideoRequest(prompt="x", guidance_scale_2=1.0),
        VideoRequest(prompt="x", num_inference_steps=3),
        VideoRequest(prompt="x", sigmas=(0.9, 0.3, 0.1)),
        VideoRequest(prompt="x", guidance_scale_2=1.0, skip_guidance_at_one=False),
    ):
        job = sparse.resolve(request, 0)
        again = VideoRequest(**json.loads(json.dumps(line_of(request, job))))
        assert sparse.resolve(again, 0) == job


def test_loras_and_files_are_told_without_their_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cached = f"models--lightx2v--Lightning/snapshots/{'0' * 40}/v1/high.safetensors"
    loras = (Lora.of(f"a=low:{tmp_path}/secret.pt@0.5"), Lora.of(f"b={tmp_path}/{cached}"))
    spec = replace(KNOWN["Wan-AI/Wan2.2-T2V-A14B-Diffusers"], loras=loras, files={"vae": tmp_path / "secret.vae"})
    model = _given(spec)
    assert model == {
        "files": ["vae"],
        "loras": ["low:FILE@0.5", "lightx2v/Lightning/v1/high.safetensors@1.0"],
        "lora_mode": "merge",
    }
    model = _given(replace(spec, lora_mode="runtime"))  # where requests name them
    path = tmp_path / "a.png"
    Video(torch.zeros(1), FRAMES, 8, lambda: json.dumps({"request": {"prompt": "x"}, "model": model})).save(path)
    show(path)
    out, said = capsys.readouterr()
    assert out == '{"prompt": "x"}\n'
    assert "It needs files of the model: --vae\n" in said
    assert (
        "It needs LoRAs: --lora a=low:FILE@0.5 --lora b=lightx2v/Lightning/v1/high.safetensors@1.0 --lora-mode runtime"
    ) in said


def test_only_a_public_name_is_told() -> None:
    assert public_name(open_model("mini-t2v")) == "mini-t2v"
    assert public_name(KNOWN["Wan-AI/Wan2.2-T2V-A14B-Diffusers"]) is None  # here a folder of that name


@pytest.mark.parametrize(
    "about",
    [
        {"request": {}, "model": ["a"]},
        {"request": {}, "images": [1]},
        {"request": {}, "model": {"files": 5}},
        {"request": {}, "model": {"loras": [1]}},
    ],
)
def test_what_others_have_written_is_not_cinelines(about: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(file, **picture_options(file, json.dumps(about)))
    with pytest.raises(OutputError, match="does not say what made it"):
        read_about(file)


def test_a_strangers_file_says_nothing_to_the_terminal_and_names_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.png"
    about = {"cineline": "\x1b[2J", "request": {"prompt": "a", "image": "/etc/passwd"}, "model": {"name": "[red]x\x1b"}}
    Image.new("RGB", (8, 8)).save(file, **picture_options(file, json.dumps(about)))
    show(file)
    out, err = capsys.readouterr()
    assert json.loads(out) == {"prompt": "a"}
    assert "\x1b" not in err
    assert "[red]x?" in err
