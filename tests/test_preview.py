"""Previews: pictures of what is coming, which change nothing of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from oracle import Checkpoint, Oracle, assert_equal
from PIL import Image
from plans import job
from torch.nn.functional import avg_pool2d

from cineline import Engine, InvalidRequest, ParallelConfig, RequestHandle, Video, VideoRequest
from cineline.core.config import Cut, DeviceConfig
from cineline.core.control import Done
from cineline.core.request import Branch, Group, Kind, WorkItem
from cineline.engine.handle import MOST_PREVIEWS, Ticket
from cineline.engine.hub import folder_of
from cineline.engine.sink import Sink
from cineline.families.pipeline_parallel import StagePart
from cineline.families.wan.preview import Previewer
from cineline.families.wan.random_checkpoint import RandomConfig
from cineline.families.wan.spec import WanSpec
from cineline.families.wan_vae.halves import statistics

ONE = ParallelConfig()


@pytest.mark.parametrize(
    ("kind", "parallel"),
    [("ti2v", ParallelConfig(pp=2)), ("t2v", ParallelConfig(pp=2, expert_placement="split"))],
)
def test_previews_come_every_few_steps_and_change_no_bits(
    kind: Any, parallel: ParallelConfig, checkpoint: Checkpoint, oracle: Oracle
) -> None:
    folder = checkpoint(RandomConfig(kind, seed=3))
    fields: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 6}
    scales = {"guidance_scale": 3.0} | ({"guidance_scale_2": 2.0} if kind == "t2v" else {})
    request = VideoRequest(prompt="a cat", **fields, **scales)
    with Engine(folder, parallel, device="cpu") as engine:
        handle = engine.submit(request.model_copy(update={"preview": 2}))
        plain = engine.submit(request)
        for each in (handle, plain):
            assert_equal(each.result(60), oracle.run(folder, "float32", request))
        previews = handle.take_previews()
        side = 32 // WanSpec.open(folder).vae_scale
        assert [(each.shape, each.dtype) for each in previews] == [((2, side, side, 3), np.dtype(np.uint8))] * 2
        assert (plain.take_previews(), handle.take_previews()) == ([], [])


def test_a_preview_is_due_after_so_many_steps_but_the_last() -> None:
    def due(steps: int, preview: int | None) -> list[int]:
        own = job(0, steps=steps).__class__(**{**vars(job(0, steps=steps)), "preview": preview})
        return [step for step in range(steps) if own.previews(WorkItem(Kind.DENOISE, 0, step, Branch.COND))]

    assert due(6, 2) == [1, 3]
    assert due(3, 1) == [0, 1]
    assert due(6, None) == due(4, 9) == []
    assert not job(0).previews(WorkItem(Kind.DECODE, 0, 1))


@pytest.mark.parametrize(
    ("value", "words"),
    [(0, "it is not from 1 to 10000: give"), (10**5, "it is not from 1 to"), ("2", "it is no number")],
)
def test_what_is_no_number_of_steps_is_refused(value: object, words: str) -> None:
    with pytest.raises(InvalidRequest, match=f"preview={value!r} cannot be used: {words}"):
        VideoRequest(prompt="x", preview=value)


def picture(value: int) -> np.ndarray:
    return np.full((2, 4, 6, 3), value, np.uint8)


def test_the_newest_previews_wait_and_are_taken_once() -> None:
    ticket = Ticket(job(0, steps=99))
    for step in range(20):
        ticket.take(Done(Group(Kind.DENOISE, 0, step), picture(step)))
    assert [int(each.max()) for each in ticket.take_previews()] == list(range(20))[-MOST_PREVIEWS:]
    assert ticket.take_previews() == []
    latents = np.ones((1, 2), np.float32)
    ticket.take(Done(Group(Kind.DENOISE, 0, 98), latents))
    assert ticket.take_previews() == []


def test_a_preview_stands_beside_the_file_until_that_is_there(tmp_path: Path) -> None:
    video = tmp_path / "cat.mp4"
    ticket = Ticket(replace(job(0, steps=9), preview=2), outputs={"video": video})
    sink = Sink(RequestHandle(ticket, lambda *_: False), video, None)
    for step in (1, 3):
        ticket.take(Done(Group(Kind.DENOISE, 0, step), picture(step)))
        sink.update()
        (file,) = tmp_path.iterdir()
        assert file.name == "cat.preview.webp"
        with Image.open(file) as shown:
            assert shown.size == (24, 16)
            assert np.asarray(shown.convert("RGB")).max() == step
    ticket.future.set_result(Video(torch.zeros(1), np.zeros((1, 32, 32, 3), np.uint8), 8))
    sink.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["cat.mp4"]


def test_a_preview_goes_with_a_request_that_fails_and_no_file_of_others_does(tmp_path: Path) -> None:
    video, mine = tmp_path / "cat.mp4", tmp_path / "dog.preview.webp"
    ticket = Ticket(replace(job(0, steps=9), preview=2), outputs={"video": video})
    sink = Sink(RequestHandle(ticket, lambda *_: False), video, None)
    ticket.take(Done(Group(Kind.DENOISE, 0, 1), picture(1)))
    sink.update()
    sink.give_up(KeyboardInterrupt())
    mine.write_text("mine")
    plain = Ticket(job(1, steps=9), outputs={"video": tmp_path / "dog.mp4"})
    Sink(RequestHandle(plain, lambda *_: False), tmp_path / "dog.mp4", None).give_up(KeyboardInterrupt())
    assert [path.name for path in tmp_path.iterdir()] == ["dog.preview.webp"]


@pytest.mark.parametrize("mini", ["mini-ti2v", "mini-t2v"])
def test_colours_are_those_of_the_video(mini: str) -> None:
    """A red square moves over blue; of what the encoder makes of it, the preview has the colours at their places."""
    spec = WanSpec.open(folder_of(mini))
    scale = spec.vae_scale
    clip = torch.zeros(3, 17, 8 * scale, 8 * scale)
    clip[2] = 1
    for frame in range(17):
        at = scale * 2 + frame * scale // 8
        clip[:, frame, 3 * scale : 6 * scale, at : at + 3 * scale] = torch.tensor([1.0, 0, 0])[:, None, None]
    vae = AutoencoderKLWan.from_pretrained(spec.folder, subfolder="vae")
    mean, inverse_std = statistics(vae.config, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        latents = (vae.encode(clip[None] * 2 - 1).latent_dist.mode() - mean) * inverse_std
        part = StagePart(ONE.place(0), ONE, Cut(range(1)), torch.device("cpu"), DeviceConfig())
        made = Previewer(spec, part).picture(latents).double()
    small = avg_pool2d(clip.transpose(0, 1), scale)
    wanted = torch.cat([small[:1], small[1:].view(4, 4, *small.shape[1:]).mean(dim=1)]).movedim(1, 3).double() * 255
    alike = torch.corrcoef(torch.stack([made.flatten(), wanted.flatten()]))[0, 1]
    assert alike > 0.9
