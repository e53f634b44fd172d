"""Which backend ranks talk over: by the devices that they have, not by the numbers that they see them by."""

from __future__ import annotations

import logging
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]

from cineline.core.config import ParallelConfig
from cineline.errors import InvalidConfig
from cineline.transport.channel import WAIT_LIMIT
from cineline.transport.mesh import EDGE_CTAS, choose_backend, edge_options, identity, pick_backend

FIRST = torch.device("cuda", 0)


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if torch had NCCL."""
    monkeypatch.setattr(dist, "is_backend_available", lambda backend: True)


def see(monkeypatch: pytest.MonkeyPatch, uuids: dict[int, str]) -> None:
    """A thread's rank is its name; each sees one device, number 0, which has this UUID."""

    def properties(device: torch.device) -> SimpleNamespace:
        assert device == FIRST
        return SimpleNamespace(uuid=uuids[int(threading.current_thread().name)])

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)


def choices(parallel: ParallelConfig) -> dict[int, tuple[str, bool] | Exception]:
    store = HashStore()
    found: dict[int, tuple[str, bool] | Exception] = {}

    def choose(rank: int) -> None:
        try:
            found[rank] = choose_backend(store, rank, parallel, FIRST)
        except InvalidConfig as error:
            found[rank] = error

    threads = [threading.Thread(target=choose, args=(rank,), name=str(rank)) for rank in range(parallel.ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return found


def test_ranks_that_see_one_gpu_each_do_not_share_it(
    monkeypatch: pytest.MonkeyPatch, nccl: None, caplog: pytest.LogCaptureFixture
) -> None:
    see(monkeypatch, {0: "GPU-a", 1: "GPU-b"})
    with caplog.at_level(logging.INFO, "cineline.transport.mesh"):
        assert choices(ParallelConfig(pp=2)) == dict.fromkeys(range(2), ("nccl", False))
    assert [record.getMessage() for record in caplog.records] == ["2 ranks on 2 devices talk over nccl."]


def test_ranks_that_share_a_gpu_go_through_host_memory(
    monkeypatch: pytest.MonkeyPatch, nccl: None, caplog: pytest.LogCaptureFixture
) -> None:
    see(monkeypatch, {0: "GPU-a", 1: "GPU-a", 2: "GPU-b"})
    assert choices(ParallelConfig(pp=3)) == dict.fromkeys(range(3), ("gloo", True))
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "3 ranks on 2 devices" in record.getMessage()


def test_lanes_that_share_a_gpu_are_refused(monkeypatch: pytest.MonkeyPatch, nccl: None) -> None:
    see(monkeypatch, {0: "GPU-a", 1: "GPU-a"})
    for error in choices(ParallelConfig(ulysses=2)).values():
        assert isinstance(error, InvalidConfig)
        assert "2 ranks have 1 here, and talk over gloo, where only pp and cfg work" in str(error)


def test_a_device_that_torch_has_no_backend_for_goes_through_host_memory() -> None:
    with pytest.raises(ValueError):
        dist.get_default_backend_for_device("mtia")
    assert pick_backend(torch.device("mtia"), shared=False) == ("gloo", True)
    assert pick_backend(torch.device("mps"), shared=False) == ("gloo", True)


def test_an_edge_of_nccl_holds_few_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [edge_options(backend) for backend in ("gloo", "xccl")] == [None, None]
    options = SimpleNamespace(config=SimpleNamespace(max_ctas=32))
    monkeypatch.setattr(dist, "ProcessGroupNCCL", SimpleNamespace(Options=lambda: options), raising=False)
    assert edge_options("nccl") is options
    assert options.config.max_ctas == EDGE_CTAS and options._timeout == WAIT_LIMIT


def test_a_device_without_a_uuid_is_known_by_host_and_number() -> None:
    assert identity(torch.device("mps", 1)) != identity(torch.device("mps", 0)) == identity(torch.device("mps", 0))
