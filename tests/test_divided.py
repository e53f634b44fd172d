"""Text encoder and VAE cut over the stages: bits of diffusers' where that is promised, else a bound."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import av
import numpy as np
import pytest
import torch
from oracle import Checkpoint, Oracle, assert_equal
from test_parity import mixed_requests
from transformers import AutoTokenizer, UMT5EncoderModel

from cineline import Engine, InvalidConfig, ParallelConfig, RequestHandle, Video, VideoRequest
from cineline.core.config import TextEncoder
from cineline.engine.sink import Sink
from cineline.families.wan.constants import TEXT_TOKENS
from cineline.families.wan.random_checkpoint import RandomConfig
from cineline.families.wan.shapes import WanKind
from cineline.families.wan.spec import WanSpec
from cineline.families.wan.text import TextSlice, Tokenizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cuts", [[2], [1, 1], [0, 2], [2, 0, 0], [0, 1, 0, 1]])
def test_text_slices_give_the_encoders_bits(cuts: list[int], dtype: torch.dtype, checkpoint: Checkpoint) -> None:
    folder = checkpoint(RandomConfig())
    whole = UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    cpu, last = torch.device("cpu"), len(cuts) - 1
    starts = [sum(cuts[:stage]) for stage in range(len(cuts))]
    slices = [
        TextSlice(
            WanSpec.open(folder).component("text_encoder"),
            range(start, start + size),
            stage == 0,
            stage == last,
            dtype,
            cpu,
        )
        for stage, (start, size) in enumerate(zip(starts, cuts, strict=True))
    ]
    for prompt in ("a cat", "", "x" * 700):
        states, mask = Tokenizer(folder / "tokenizer", whole.config.to_dict())(prompt)
        with torch.no_grad():
            for part in slices:
                states = part.run(states, mask)
            given = tokenizer(
                [prompt], padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt"
            )
            expected = whole(given.input_ids, given.attention_mask).last_hidden_state
        length = int(given.attention_mask.sum())
        assert torch.equal(states[:, :length], expected[:, :length])
        assert not states[:, length:].any()
    assert sum(part.bytes_read for part in slices) == sum(4 * tensor.numel() for tensor in whole.parameters())


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("ti2v", {"pp": 3, "text_split": [0, 2, 0], "vae_split": [9, 7, 0]}),
        ("i2v", {"pp": 2, "vae_decode": "tail"}),
        ("t2v", {"pp": 2, "expert_placement": "split"}),
        ("t2v", {"pp": 2, "expert_placement": "split", "cfg": 2, "vae_decode": "tail"}),
    ],
    ids=str,
)
def test_other_cuts_equal_diffusers(
    kind: WanKind, options: dict[str, Any], checkpoint: Checkpoint, oracle: Oracle
) -> None:
    folder = checkpoint(RandomConfig(kind, seed=3))
    with Engine(folder, ParallelConfig(**options), device="cpu", in_flight=2) as engine:
        videos = [handle.result(120) for handle in [engine.submit(request) for request in mixed_requests(kind)]]
    for request, video in zip(mixed_requests(kind), videos, strict=True):
        assert_equal(video, oracle.run(folder, "float32", request))


@pytest.mark.parametrize("kind", ["ti2v", "t2v"])
def test_rows_give_frames_close_to_diffusers(kind: WanKind, checkpoint: Checkpoint, oracle: Oracle) -> None:
    folder = checkpoint(RandomConfig(kind, seed=3))
    with Engine(folder, ParallelConfig(pp=3, vae_decode="rows"), device="cpu") as engine:
        videos = [handle.result(120) for handle in [engine.submit(request) for request in mixed_requests(kind)]]
    for request, video in zip(mixed_requests(kind), videos, strict=True):
        latents, frames = oracle.run(folder, "float32", request)
        assert torch.equal(video.latents, latents)
        assert video.frames is not None
        difference = np.abs(video.frames.astype(int) - frames)
        assert difference.max() <= 1
        assert (difference == 0).mean() >= 0.999


@pytest.mark.parametrize("way", ["reload", "cpu"])
def test_a_text_encoder_that_is_not_resident_gives_the_same_bits(
    way: TextEncoder, checkpoint: Checkpoint, oracle: Oracle
) -> None:
    folder = checkpoint(RandomConfig("t2v", seed=3))
    with Engine(folder, ParallelConfig(pp=2), device="cpu", text_encoder=way) as engine:
        videos = [handle.result(120) for handle in [engine.submit(request) for request in mixed_requests("t2v")[:2]]]
    for request, video in zip(mixed_requests("t2v")[:2], videos, strict=True):
        assert_equal(video, oracle.run(folder, "float32", request))


def test_tiles_are_lossy_only_where_the_picture_is_larger_than_one(checkpoint: Checkpoint, oracle: Oracle) -> None:
    folder = checkpoint(RandomConfig("t2v", seed=3))
    size = {"num_frames": 5, "num_inference_steps": 1, "guidance_scale": 1, "guidance_scale_2": 1}
    small, large = (VideoRequest(prompt="a", height=64, width=width, **size) for width in (64, 512))
    with Engine(folder, ParallelConfig(vae_decode="tiled"), device="cpu") as engine:
        assert_equal(engine.submit(small).result(60), oracle.run(folder, "float32", small))
        video, (latents, frames) = engine.submit(large).result(60), oracle.run(folder, "float32", large)
    assert torch.equal(video.latents, latents)
    assert video.frames is not None
    assert video.frames.shape == frames.shape


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"vae_decode": "columns"}, "use one of layers, rows, tail, tiled"),
        ({"pp": 2, "text_split": [1, 2]}, "the model has 2 layers of the text encoder"),
        ({"pp": 2, "vae_split": [1, -1]}, "below 0"),
        ({"pp": 2, "vae_split": [1, 1], "vae_decode": "tail"}, "is for vae_decode='layers'"),
        ({"pp": 2, "text_split": [2]}, "1 entries for pp=2"),
    ],
)
def test_cuts_that_cannot_be_are_refused(options: dict[str, Any], rule: str, checkpoint: Checkpoint) -> None:
    with pytest.raises(InvalidConfig, match=rule):
        Engine(checkpoint(RandomConfig("t2v")), ParallelConfig(**options), device="cpu")


def test_frames_can_be_taken_as_they_come(checkpoint: Checkpoint, oracle: Oracle) -> None:
    folder = checkpoint(RandomConfig(seed=3))
    request = mixed_requests("ti2v")[0]
    with Engine(folder, device="cpu") as engine:
        handle = engine.submit(request)
        taken: list[np.ndarray] = []
        while not handle.done:
            taken += handle.take_frames()
        video = handle.result()
    rest = [] if video.frames is None else [video.frames]
    assert len(taken) > 1
    assert np.array_equal(np.concatenate([*taken, *rest]), oracle.run(folder, "float32", request)[1])


class DecodingHandle:
    """A request whose chunks come when the test says so."""

    def __init__(self) -> None:
        self.job = SimpleNamespace(fps=8, preview=None)
        self.describe = None
        self.chunks: list[np.ndarray] = []

    def take_frames(self) -> list[np.ndarray]:
        taken, self.chunks = self.chunks, []
        return taken

    def take_previews(self) -> list[np.ndarray]:
        return []

    def result(self, timeout: float) -> Video:
        frames = self.take_frames()
        return Video(torch.zeros(1), np.concatenate(frames) if frames else None, 8)


def test_a_sink_writes_as_frames_come_and_leaves_nothing_when_it_is_given_up(tmp_path: Path) -> None:
    chunk = np.zeros((40, 32, 32, 3), np.uint8)  # more than the encoder looks ahead
    handles = DecodingHandle(), DecodingHandle()
    whole, given_up = (
        Sink(cast(RequestHandle, handle), tmp_path / name, None)
        for handle, name in zip(handles, ("a.mp4", "b.mp4"), strict=True)
    )
    for _ in range(2):
        for handle, sink in zip(handles, (whole, given_up), strict=True):
            handle.chunks.append(chunk)
            sink.update()
    assert len(list(tmp_path.iterdir())) == 2, "frames are written before the end"
    handles[0].chunks.append(chunk)  # decoded since the last update
    assert whole.finish() == [tmp_path / "a.mp4"]
    given_up.give_up(KeyboardInterrupt())
    assert list(tmp_path.iterdir()) == [tmp_path / "a.mp4"]
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert len(list(container.decode(video=0))) == 120
