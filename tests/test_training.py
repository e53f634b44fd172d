"""How the mini models are made: clips, the training's forward against diffusers' own, resuming, export."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import Oracle, assert_equal
from torch import nn

from cineline import Engine, ParallelConfig, VideoRequest
from training import making
from training.clips import TRAINING_SCENES, caption, draw_clip, place, render, render_windows, vocabulary
from training.judge import judge
from training.loop import Schedule, fit
from training.recipes import RECIPES
from training.scenes import all_scenes, held_out_scenes
from training.text import make_tokenizer
from training.transformer import PROMPT_ROWS, TEXT_ROWS, Batch, Student, prepare
from training.vae import Phase, Windows


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without compiling, which takes longer than these tests, and on the CPU."""
    for module in ("loop", "vae", "latents", "transformer"):
        monkeypatch.setattr(f"training.{module}.device", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch, "compile", lambda forward, **options: forward)


def test_held_out_scenes_are_never_drawn_for_training() -> None:
    assert len(held_out_scenes()) == len(set(held_out_scenes())) == 128
    assert not set(held_out_scenes()) & set(TRAINING_SCENES)
    assert set(held_out_scenes()) | set(TRAINING_SCENES) == set(all_scenes())
    for name in ("colour", "shape", "motion", "background"):  # every word has been taught
        assert {getattr(scene, name) for scene in held_out_scenes()} <= {
            getattr(scene, name) for scene in TRAINING_SCENES
        }


def test_a_clip_follows_from_its_seed_and_its_object_stays_inside() -> None:
    for number, scene in enumerate(all_scenes()[::7]):
        clip = place(scene, np.random.default_rng(number), 17)
        pixels = render(clip, 64)
        assert np.array_equal(pixels, render(place(scene, np.random.default_rng(number), 17), 64))
        edge = np.concatenate([pixels[:, :, [0, -1]].reshape(3, -1), pixels[:, :, :, [0, -1]].reshape(3, -1)], axis=1)
        assert np.allclose(edge, (clip.background * 2 - 1)[:, None], atol=1e-5), scene


def test_the_judge_sees_what_was_drawn() -> None:
    random = np.random.default_rng(0)
    for scene in all_scenes()[::25]:
        frames = ((render(place(scene, random, 17), 64) + 1) * 127.5).round().astype(np.uint8).transpose(1, 2, 3, 0)
        assert all(judge(frames).matches(scene).values()), scene
        backwards = judge(frames[::-1])
        assert backwards.motion != scene.motion
        assert backwards.shape == scene.shape


def test_a_window_is_a_part_of_the_picture() -> None:
    clip = draw_clip(np.random.default_rng(0), 5)
    assert np.array_equal(render(clip, 64)[:, :, 10:42, 20:52], render(clip, 64, (10, 20, 32)))
    assert render_windows([clip], 64, 32, np.random.default_rng(1)).shape == (1, 3, 5, 32, 32)


def test_captions_fit_and_unknown_words_are_one_token() -> None:
    random, tokenizer = np.random.default_rng(0), make_tokenizer()
    for _ in range(300):
        scene = TRAINING_SCENES[random.integers(len(TRAINING_SCENES))]
        assert len(tokenizer(caption(scene, random)).input_ids) <= TEXT_ROWS
    assert tokenizer("Zebra, QUAGGA").input_ids[:1] == tokenizer("quagga").input_ids[:1] == [2]
    assert tokenizer(" ".join(vocabulary())).input_ids.count(2) == 0


def test_the_trainings_forward_is_diffusers_on_a_padded_prompt() -> None:
    torch.manual_seed(0)
    student = Student(RECIPES["mini-t2v"].transformer, 4)
    nn.init.normal_(student.transformer.proj_out.weight)
    theirs = copy.deepcopy(student.transformer)
    prepare(student)
    latents = torch.randn(2, 16, 3, 8, 8)
    with torch.no_grad():
        text = student.encode(["a red square moving left", "on a violet background, a ball is rising"])
        padded = torch.cat([text[:, :TEXT_ROWS], torch.zeros(2, PROMPT_ROWS - TEXT_ROWS, text.shape[2])], 1)
        for timestep in (torch.tensor([300.0, 800.0]), torch.rand(2, 48) * 1000):
            expected = theirs(latents, timestep, padded, return_dict=False)[0]
            found = student.transformer(latents, timestep, text, return_dict=False)[0]
            assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_resumed_stage_ends_where_an_uninterrupted_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.loop.SAVE_EVERY_S", 0.0)

    def run(file: Path, stop: int | None = None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 1))

        def loss(step: int) -> torch.Tensor:
            if step == stop:
                raise KeyboardInterrupt
            inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
            error: torch.Tensor = module(inputs) - inputs.sum(1, keepdim=True)
            return (error**2).mean()

        return fit(module, Schedule(steps=6, matrices=1e-2), loss, file, lambda name: "0" in name)

    whole = run(tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts.pt", stop=4)
    resumed = run(tmp_path / "parts.pt")
    again = run(tmp_path / "parts.pt", stop=0)  # done already: nothing is computed
    for name, weight in whole.items():
        assert torch.equal(weight, resumed[name])
        assert torch.equal(weight, again[name])


@pytest.mark.parametrize("name", ["mini-ti2v", "mini-t2v"])
def test_all_stages_make_a_model_that_diffusers_loads(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, oracle: Oracle
) -> None:
    few = Schedule(steps=2, matrices=1e-3)
    recipe = RECIPES[name]
    windows = [Phase(1.0, [Windows(clips=2, frames=5, size=32)])]
    small = replace(
        recipe,
        vae_phases=windows,
        batches=[Batch("image" if recipe.boundary_ratio is None else "text", 2)],
        transformer={**recipe.transformer, "num_layers": 4},
        vae_schedule=few,
        pictures=few,
        video=few,
        polish=few if recipe.polish else None,
        high=few if recipe.high else None,
        low=few if recipe.low else None,
    )
    monkeypatch.setitem(RECIPES, name, small)
    for module, constant, value in (
        (making, "WORK", tmp_path),
        (making, "MODELS", tmp_path),
        (making, "CLIPS", 12),
        (making, "FRAMES", 5),
        (making, "PICTURE", Batch("picture", 2)),
        (making, "POLISH", [Batch("image", 2)]),
    ):
        monkeypatch.setattr(module, constant, value)
    monkeypatch.setattr("training.export.FRAMES", 5)
    folder = tmp_path / "made"
    making.Making(name).export()
    (tmp_path / name).rename(folder)
    request = VideoRequest(
        prompt="a red square", height=64, width=64, num_frames=5, num_inference_steps=3, guidance_scale=3
    )
    with Engine(folder, ParallelConfig(pp=2)) as engine:
        assert_equal(engine.submit(request).result(60), oracle.run(folder, "float32", request))
