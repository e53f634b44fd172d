"""Ranks of several hosts under torchrun: how they are met, what is refused, and that results are one process's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from oracle import Checkpoint, Oracle
from safetensors.torch import load_file, save_file
from served import SMALL, small_model
from torch.distributed import HashStore  # type: ignore[attr-defined]
from two_hosts import names, two_hosts

from cineline import CheckpointError, InvalidConfig, RankFailed, VideoRequest
from cineline.cli import main
from cineline.core.key import KEY, KEY_FILE, given_key
from cineline.engine import hosts
from cineline.engine.hosts import addresses_of, check_versions, gather, meet
from cineline.engine.hub import open_model
from cineline.families.identity import check_same, identity_of
from cineline.families.wan.random_checkpoint import RandomConfig
from cineline.rank import meeting
from cineline.transport.mesh import INTERFACES, choose_interface
from cineline.transport.rendezvous import Farewell, Hello, Rendezvous

LIMIT_S = 120
SIZE = {"height": 32, "width": 64, "num_frames": 5, "num_inference_steps": 3, "seed": 5}
A_KEY = "a key of more than sixteen characters"
VERSIONS = {"cineline": "1", "torch": "2"}


class Runs:
    """A process that does, or has ended with a code."""

    pid = 0

    def __init__(self, code: int | None = None) -> None:
        self.code = code

    def poll(self) -> int | None:
        return self.code

    def wait(self, timeout: float | None = None) -> int:
        raise AssertionError

    def kill(self) -> None:
        raise AssertionError


def hello(rank: int, **fields: Any) -> Hello:
    given = {"host": f"host{rank}", "dials": "127.0.0.1", "address": "127.0.0.1", "versions": VERSIONS}
    return Hello(rank=rank, local_rank=0, **given | fields)


@pytest.fixture
def rendezvous(monkeypatch: pytest.MonkeyPatch) -> Rendezvous:
    """One of this process."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    return Rendezvous(HashStore())


# What is said in the store.


def test_ranks_that_do_not_come_are_named(rendezvous: Rendezvous) -> None:
    rendezvous.say(hello(1))
    with pytest.raises(InvalidConfig, match=r"Ranks \[0, 2\] did not come within 0 s: see what torchrun says"):
        gather(rendezvous, 3, Runs(), 0.3)


def test_a_rank_that_fails_before_it_is_heard_is_not_waited_for(rendezvous: Rendezvous) -> None:
    rendezvous.give_up(Farewell(rank=2, cause="there is no disk."))
    started = time.monotonic()
    with pytest.raises(RankFailed, match=r"Rank 2 failed: there is no disk$"):
        gather(rendezvous, 3, Runs(), LIMIT_S)
    with pytest.raises(InvalidConfig, match="Rank 1 is not asked for any more: there is no disk"):
        rendezvous.invited(1)
    assert time.monotonic() - started < 5


def test_a_rank_whose_process_ends_before_it_is_heard_is_not_waited_for(rendezvous: Rendezvous) -> None:
    with pytest.raises(RankFailed, match="exit code 9 before it called the engine"):
        gather(rendezvous, 2, Runs(9), LIMIT_S)


def test_another_version_on_another_host_is_named() -> None:
    check_versions([hello(0), hello(1)])
    others: list[tuple[dict[str, str], str]] = [
        ({**VERSIONS, "torch": "2.1"}, "has torch '2.1', and rank 0 on 'host0' has '2'"),
        ({"torch": "2"}, "has cineline None"),
    ]
    for versions, words in others:
        with pytest.raises(InvalidConfig, match=f"Rank 1 on 'host1' {words}"):
            check_versions([hello(0), hello(1, versions=versions)])


@pytest.mark.parametrize("left", ["", "{}", "[1]", '{"rank": -1, "cause": "x"}', '{"rank": 0, "cause": "x", "y": 1}'])
def test_what_others_leave_in_the_store_is_refused(rendezvous: Rendezvous, left: str) -> None:
    rendezvous.store.set("farewell", left)
    with pytest.raises(InvalidConfig, match="torchrun's store has no farewell at 'farewell'"):
        rendezvous.farewell()


def test_on_rank_0s_host_the_address_is_the_one_that_other_hosts_call() -> None:
    here, there = hello(0, dials="127.0.1.1"), hello(1, dials="198.51.100.1", address="198.51.100.2")
    assert addresses_of([here, hello(1)]) == {0: "127.0.0.1", 1: "127.0.0.1"}
    assert addresses_of([here, there, hello(2)]) == {0: "198.51.100.1", 1: "198.51.100.2", 2: "198.51.100.1"}


def test_the_interface_is_that_of_the_address_unless_one_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(INTERFACES, "")
    choose_interface(0, "198.51.100.1")  # nobody's
    assert os.environ[INTERFACES] == ""
    choose_interface(0, "127.0.0.1")
    assert os.environ[INTERFACES] == "lo"
    monkeypatch.setenv(INTERFACES, "eth7")
    choose_interface(0, "127.0.0.1")
    assert os.environ[INTERFACES] == "eth7"


def test_a_rank_leaves_word_whatever_keeps_it_from_coming(
    rendezvous: Rendezvous, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Rendezvous, "join", lambda: rendezvous)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    with pytest.raises(InvalidConfig, match=r"MASTER_ADDR='no-such-host\.invalid' is no host that can be found"):
        meeting.meet_engine()
    with pytest.raises(RankFailed, match=r"Rank 1 failed: MASTER_ADDR='no-such-host\.invalid' is no host"):
        gather(rendezvous, 2, Runs(), LIMIT_S)
    monkeypatch.setattr(meeting, "address_of_master", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        meeting.meet_engine()
    with pytest.raises(RankFailed, match="Rank 1 failed: ZeroDivisionError: division by zero"):
        gather(rendezvous, 2, Runs(), LIMIT_S)


def test_a_rank_says_what_it_is(rendezvous: Rendezvous, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    rendezvous.say(meeting._hello(5, "127.0.1.1"))
    (said,) = rendezvous.hellos([4, 5]).values()
    assert (said.rank, said.local_rank, said.dials, said.address) == (5, 3, "127.0.1.1", "127.0.0.1")
    assert said.versions["torch"] == torch.__version__.partition("+")[0] or "+" in said.versions["torch"]


# The key.


def call_all(rendezvous: Rendezvous, hellos: Sequence[Hello]) -> tuple[threading.Thread, list[object]]:
    """Ranks of this process, each as its own would be met."""
    came: list[object] = []

    def call() -> None:
        for one in hellos:
            try:
                came.append(meeting._call(one.rank, one.dials, rendezvous.invited(one.rank)))
            except InvalidConfig as error:
                rendezvous.give_up(Farewell(rank=one.rank, cause=str(error)))
                came.append(str(error))

    thread = threading.Thread(target=call)
    thread.start()
    return thread, came


def test_ranks_are_met_where_they_call(rendezvous: Rendezvous, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, A_KEY)
    hellos = [hello(0, dials="127.0.1.1"), hello(1)]
    thread, came = call_all(rendezvous, hellos)
    connections = meet(rendezvous, hellos, Runs(), LIMIT_S)
    thread.join()
    assert sorted(connections) == [0, 1]
    for rank, end in enumerate(came):
        connections[rank].send_bytes(b"welcome")
        assert end.recv_bytes() == b"welcome"  # type: ignore[attr-defined]
        end.close()  # type: ignore[attr-defined]
        connections[rank].close()


def test_a_rank_without_the_key_is_not_met(rendezvous: Rendezvous, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, A_KEY)
    monkeypatch.setattr(meeting, "key_of", lambda secret: secret)  # which is in the store for all to read
    thread, came = call_all(rendezvous, [hello(0)])
    with pytest.raises(RankFailed, match=f"Rank 0 failed: .* have not one key .*give all hosts the same {KEY}"):
        meet(rendezvous, [hello(0)], Runs(), LIMIT_S)
    thread.join()
    assert "have not one key" in str(came[0])


def test_an_engine_without_the_key_is_not_served(rendezvous: Rendezvous, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, A_KEY)
    monkeypatch.setattr(hosts, "key_of", lambda secret: secret)
    thread, came = call_all(rendezvous, [hello(0)])
    with pytest.raises(RankFailed, match="have not one key"):
        meet(rendezvous, [hello(0)], Runs(), LIMIT_S)
    thread.join()
    assert "have not one key" in str(came[0])


def test_a_key_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    short = tmp_path / "key"
    short.write_text(" secret \n")
    for key, path, words in (
        ("secret", "", f"{KEY} has a key of 6 characters, and 16 are the least"),
        ("", str(short), f"{KEY_FILE} has a key of 6 characters"),
        ("", str(tmp_path / "none"), "cannot be read"),
        (A_KEY, str(short), f"Both {KEY} and {KEY_FILE}="),
    ):
        monkeypatch.setenv(KEY, key)
        monkeypatch.setenv(KEY_FILE, path)
        with pytest.raises(InvalidConfig, match=words) as refused:
            given_key()
        assert "secret" not in str(refused.value)
    short.write_text(f"\n{A_KEY}\n")
    monkeypatch.setenv(KEY, "")
    monkeypatch.setenv(KEY_FILE, str(short))
    assert given_key() == A_KEY.encode()


# The model.


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> Path:
    return checkpoint(RandomConfig("ti2v", seed=3))


def changed(model: Path, folder: Path, at: int) -> Path:
    """A copy with another value of one weight: the n-th of the largest tensor of the transformer."""
    copy = Path(shutil.copytree(model, folder / "changed"))
    path = max((copy / "transformer").glob("*.safetensors"), key=lambda file: file.stat().st_size)
    tensors = load_file(path)
    largest = max(tensors, key=lambda name: tensors[name].numel())
    assert tensors[largest].nbytes > 3 * 4096
    tensors[largest].view(-1)[at] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    return copy


def test_another_model_on_another_host_is_found(model: Path, tmp_path: Path) -> None:
    spec = open_model(str(model))
    check_same(open_model(str(shutil.copytree(model, tmp_path / "copy"))), identity_of(spec), False, "Rank 1")
    other = open_model(str(changed(model, tmp_path, at=0)))  # which no sample sees
    check_same(other, identity_of(spec), False, "Rank 1")
    check_same(spec, identity_of(spec, whole=True), True, "Rank 1")
    with pytest.raises(CheckpointError, match=r"Rank 1 has another model in .*changed.* than rank 0's host"):
        check_same(other, identity_of(spec, whole=True), True, "Rank 1")
    shutil.rmtree(tmp_path / "changed")
    with pytest.raises(CheckpointError, match=r"Rank 1 has no .*changed"):
        check_same(other, identity_of(spec), False, "Rank 1")


# Two hosts.


def words_of(model: Path, latents: Path) -> str:
    fields = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in SIZE.items())
    return f"-m cineline generate cat --model {model} {fields} --save-latents {latents} --device cpu"


def ended(hosts: subprocess.Popen[str]) -> tuple[str, str]:
    said, errors = hosts.communicate(timeout=LIMIT_S)
    return said, errors


def test_unequal_hosts_make_the_bits_of_one_where_a_name_is_a_loopback_address_on_the_first(
    model: Path, tmp_path: Path, oracle: Oracle
) -> None:
    latents = tmp_path / "a.safetensors"
    with two_hosts(
        words_of(model, latents),
        processes="$((2 - NODE))",
        master="front",
        before=names(tmp_path, "127.0.1.1 front", "10.9.0.1 front"),
        environment={KEY: A_KEY},
    ) as both:
        said, errors = ended(both)
    assert "ended with" not in said, errors
    wanted, _ = oracle.run(model, "float32", VideoRequest(prompt="cat", **SIZE))
    assert load_file(latents)["latents"].equal(wanted)
    assert "on 3 ranks (pp=3)" in errors
    for rank, where in enumerate(("va (10.9.0.1)", "va (10.9.0.1)", "vb (10.9.0.2)")):
        assert f"Rank {rank} talks to the others over {where}; GLOO_SOCKET_IFNAME would name another." in errors
    assert KEY not in errors


def frames(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_a_service_over_two_hosts_makes_the_videos_of_one_process(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, made, wanted = small_model(model, tmp_path), tmp_path / "made.mp4", tmp_path / "wanted.mp4"
    program = Path(__file__).parent / "torchrun_served.py"
    with two_hosts(f"{program} {made} --model {small} --data-dir {tmp_path}/data --device cpu") as both:
        said, errors = ended(both)
    assert "ended with" not in said, errors
    assert f"No {KEY} and no {KEY_FILE}: whoever can reach 10.9.0.1 could join this line as a rank" in errors
    command = ["cineline", "generate", "a cat", "--model", str(small), "--seed", "5", "--output", str(wanted)]
    monkeypatch.setattr("sys.argv", [*command, "--device", "cpu", "--quiet"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    assert len(frames(wanted)) == SMALL["num_frames"]
    assert all(np.array_equal(*pair) for pair in zip(frames(made), frames(wanted), strict=True))


def test_what_differs_between_hosts_is_said_on_the_first(model: Path, tmp_path: Path) -> None:
    small = small_model(model, tmp_path)
    (tmp_path / "other").mkdir()
    other = small_model(model, tmp_path / "other")
    (other / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(json.loads((small / "scheduler" / "scheduler_config.json").read_text()) | {"flow_shift": 7.0})
    )
    mounted = f"if [ $NODE = 1 ]; then mount --bind {other} {small}; fi"
    keys = f"export {KEY}=a-key-that-is-one-hosts-alone-$NODE"
    for before, words in (
        (mounted, f"has another model in '{small}' than rank 0's host"),
        (keys, f"have not one key (digest sent was rejected): give all hosts the same {KEY}"),
    ):
        with two_hosts(words_of(small, tmp_path / "a.safetensors"), before=before) as both:
            said, errors = ended(both)
        assert said.splitlines() == ["host 0 ended with 1", "host 1 ended with 1"]
        assert [line for line in errors.splitlines() if line.startswith("cineline: ") and words in line], errors
    assert not (tmp_path / "a.safetensors").exists()


def test_a_world_that_is_no_product_of_the_axes_is_refused(model: Path, tmp_path: Path) -> None:
    with two_hosts(f"{words_of(model, tmp_path / 'a.safetensors')} --pp 3") as both:
        said, errors = ended(both)
    assert said.splitlines() == ["host 0 ended with 1", "host 1 ended with 1"]
    assert "cineline: torchrun started 2 processes, but pp=3 is 3 ranks: pp=2" in errors
