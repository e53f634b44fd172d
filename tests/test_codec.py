"""Messages as data: what is written is read, and nothing else is."""

from __future__ import annotations

import importlib
import os
import pickle
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faulty_family import FaultySpec
from hypothesis import given
from hypothesis import strategies as st
from oracle import Checkpoint
from PIL import Image

from cineline import errors
from cineline.core import control
from cineline.core.codec import Codec
from cineline.core.config import Cut, DeviceConfig, ParallelConfig
from cineline.core.control import FROM_ENGINE, FROM_RANK
from cineline.core.faults import Fault
from cineline.core.image import KeyFrames
from cineline.core.request import Branch, Group, Job, Kind, Remembered, VideoRequest, WorkItem
from cineline.core.trace import Slice
from cineline.engine.hub import open_model
from cineline.errors import CinelineError, NotFinite, OutOfMemory, RankFailed
from cineline.families import registry
from cineline.families.wan.random_checkpoint import RandomConfig

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(max_size=99)
    | st.builds(range, st.integers(0, 9), st.integers(0, 9), st.integers(1, 3))
    | st.sampled_from([Path("/a/b"), Kind.DECODE, Branch.UNCOND, Cut(range(2)), WorkItem(Kind.TEXT, 2**40)]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(PLAIN)
def test_what_is_written_is_read(value: Any) -> None:
    read = FROM_ENGINE.decode(FROM_ENGINE.encode(value))
    assert read == value and type(read) is type(value)
    assert repr(read) == repr(value)  # tuples within are tuples, and 1.0 is no 1


@pytest.mark.parametrize("dtype", ["float32", "uint8", "int64", "bool", ">f4", "complex64"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3, 4)])
def test_arrays_are_read_as_they_are(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    for one in (array, array.T):
        read = FROM_RANK.decode(FROM_RANK.encode({"a": one, "b": b"x"}))
        assert read["a"].dtype == one.dtype and read["a"].shape == one.shape and read["b"] == b"x"
        assert np.array_equal(read["a"], one)
        read["a"][...] = 1  # its own memory


def test_a_floats_bits_are_kept() -> None:
    numbers = [float("inf"), -0.0, 1e-320, 0.1, float(np.float32(0.1)), float("nan")]
    read = FROM_RANK.decode(FROM_RANK.encode(numbers))
    assert np.array(read).tobytes() == np.array(numbers).tobytes()


JOB = Job(7, "a cat \udc80 ☂", "", 8, 8, 5, 4, 2, 2, 5, 3.5, 2**64 - 1, 8, True, unguided=(1,))
GROUP = Group(Kind.DENOISE, 7, 3, 2)
FROM_RANKS: list[control.Message] = [
    control.StoreOpen(7),
    control.Ready(2**40),
    control.Begun(GROUP),
    control.Spoiled(WorkItem(Kind.DECODE, 7, 3), 1),
    control.Piece(7, 3, 0, 0, 4, b"abcd"),
    control.Unkept(7, "x"),
    control.Beat("denoise 3", 1.5, None, 7, 2.25),
    control.Failed("x", None, 7, True),
    control.Timeline((Slice(1, WorkItem(Kind.DENOISE, 7, 3, Branch.UNCOND), 10, 20, 3),), {"hidden": 2**40}),
    GROUP,
]
FROM_ENGINES: list[control.Message] = [
    control.Setup(
        FaultySpec(layers=9), 1, ParallelConfig(pp=2, split=(5, 4)), (Cut(range(5)), Cut(range(5, 9), range(2))),
        DeviceConfig("cpu"), 0, None, True, (Fault(do="delay", rank=1, at="load", seconds=0.5),), 2, 1, "::1", "ab",
    ),
    control.Admit(replace(JOB, prompts=Remembered((0,), ((0, "a"),))), None, b"state"),
    control.Stop(),
]  # fmt: skip


@pytest.mark.parametrize("message", [*FROM_RANKS, *FROM_ENGINES], ids=lambda one: type(one).__name__)
def test_every_message_travels(message: control.Message) -> None:
    packed = control.pack(message)
    assert b"\x80" not in packed[:1] and packed[:1] in (b"g", b"d")
    if isinstance(message, Group):
        return
    assert FROM_ENGINE.decode(packed[1:]) == message
    if message in FROM_RANKS:
        assert FROM_RANK.decode(packed[1:]) == message
        return
    with pytest.raises(ValueError, match="is no class that is read here"):  # no rank may say it
        FROM_RANK.decode(packed[1:])


def test_a_result_and_an_image_travel_whole() -> None:
    frames = np.random.default_rng(0).integers(0, 255, (5, 8, 8, 3), dtype=np.uint8)
    done = FROM_RANK.decode(FROM_RANK.encode(control.Done(GROUP, frames, moves=True)))
    assert done.group == GROUP and done.moves and np.array_equal(done.result, frames)
    first = Image.fromarray(frames[0])
    admit = FROM_ENGINE.decode(FROM_ENGINE.encode(control.Admit(JOB, KeyFrames(first, Image.fromarray(frames[1])))))
    assert admit.job == JOB
    assert np.array_equal(np.asarray(admit.image.first), frames[0])
    assert np.array_equal(np.asarray(admit.image.last), frames[1])


@pytest.mark.parametrize("kind", ["ti2v", "t2v", "i2v"])
def test_a_models_spec_travels(checkpoint: Checkpoint, kind: Any) -> None:
    spec = open_model(str(checkpoint(RandomConfig(kind))))
    read = FROM_ENGINE.decode(FROM_ENGINE.encode(spec))
    assert read == spec and repr(read) == repr(spec)
    image = Image.new("RGB", (64, 64)) if kind == "i2v" else None
    job = spec.resolve(VideoRequest(prompt="x", image=image), 3)
    assert FROM_ENGINE.decode(FROM_ENGINE.encode(job)) == job


def test_the_specs_of_all_known_models_travel() -> None:
    known = [spec for module in registry.KNOWN for spec in importlib.import_module(module).KNOWN.values()]
    assert len(known) > 5 and len({type(spec) for spec in known}) == 3
    for spec in known:
        assert FROM_ENGINE.decode(FROM_ENGINE.encode(spec)) == spec


class Foreign(RankFailed):
    """Of somebody's own."""


def test_errors_keep_their_class_and_words() -> None:
    plain = [
        kind("some words: do this.")
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, CinelineError) and not issubclass(kind, RankFailed | NotFinite)
    ]
    assert len(plain) > 10
    for error in [*plain, RankFailed(1, "x", 2), OutOfMemory(3, "y"), NotFinite(1, None, "denoise", 4)]:
        read = FROM_RANK.decode(FROM_RANK.encode(error))
        assert type(read) is type(error) and str(read) == str(error) and vars(read) == vars(error)
    other = FROM_RANK.decode(FROM_RANK.encode(Foreign(1, "x")))
    assert type(other) is CinelineError and str(other) == "Rank 1 failed: x"


# What is not read.


@given(st.binary(max_size=200) | st.text(max_size=99).map(lambda text: headed(text)))
def test_no_bytes_are_a_message_that_were_not_written(body: bytes) -> None:
    """They may be a number."""
    value = None
    with suppress(Exception):
        value = FROM_RANK.decode(body)
    assert not isinstance(value, control.Message)


@given(st.sampled_from(FROM_RANKS[:-1]), st.data())
def test_a_message_that_is_cut_or_longer_is_none(message: control.Message, data: st.DataObject) -> None:
    body = control.pack(message)[1:]
    with pytest.raises(Exception):  # noqa: B017
        FROM_RANK.decode(body[: data.draw(st.integers(0, len(body) - 1))])
    with pytest.raises(ValueError, match="bytes are left over"):
        FROM_RANK.decode(body + b"x")


def headed(header: str, blob: bytes = b"") -> bytes:
    return len(header).to_bytes(4, "little") + header.encode() + blob


@dataclass
class Counted:
    """Must not be made by what a rank says."""

    made = 0

    def __post_init__(self) -> None:
        type(self).made += 1


def test_nothing_is_run_by_what_is_read() -> None:
    own = f'{{"of":["{__name__}:Counted",[],[]]}}'
    for codec, header in (
        (FROM_RANK, own),
        (FROM_RANK, '{"of":["os:system",["command"],["true"]]}'),
        (FROM_ENGINE, '{"of":["os:system",["command"],["true"]]}'),
        (FROM_ENGINE, '{"of":["subprocess:Popen",["args"],[["true"]]]}'),
        (FROM_ENGINE, '{"enum":["subprocess:Popen",["true"]]}'),
        (FROM_RANK, '{"error":["SystemExit",[1]]}'),
        (FROM_RANK, '{"error":["reason",[1]]}'),
        (FROM_RANK, '{"array":["O",[1]]}'),
        (FROM_RANK, '{"array":["<f4",[1000000000000]]}'),
        (FROM_RANK, '{"array":["<f4",[-1]]}'),
        (FROM_RANK, '{"image":[100000,100000]}'),
        (FROM_RANK, '{"bytes":-1}'),
        (FROM_RANK, '{"pickle":1}'),
        (FROM_RANK, '{"map":[],"tuple":[]}'),
        (FROM_RANK, "{}"),
        (FROM_RANK, "[" * 100_000),
    ):
        with pytest.raises((ValueError, TypeError, RecursionError)):
            codec.decode(headed(header, b"\0" * 8 if "array" in header else b""))
    assert Counted.made == 0
    with pytest.raises(ValueError):
        FROM_RANK.decode(pickle.dumps(print))


def test_what_cannot_travel_is_refused_where_it_is_written() -> None:
    for value in (object(), np.float32(1), {1, 2}, os.environ.get, np.array([object()]), Image.new("L", (1, 1))):
        with pytest.raises(TypeError, match="cannot travel"):
            Codec([]).encode([value])
