"""A rank's process: `python -m cineline.rank.worker --parent PID`, or forked (`nursery`); it ends with its parent.

With `--fd N` it has inherited one end of a pipe to the engine; without it finds the engine through torchrun's
rendezvous (`meeting`).
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, NoReturn

from cineline.core import control, streams
from cineline.core.sockets import notice_loss_of_all
from cineline.core.trace import Slice
from cineline.errors import CinelineError, EdgeBroken, InvalidConfig, shown
from cineline.rank.engine_link import EngineLink
from cineline.rank.failure import failure_of
from cineline.rank.meeting import meet_engine

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from cineline.transport.axis import Traffic
    from cineline.transport.channel import Edges
    from cineline.transport.queue import DeviceQueue
from cineline.rank.owner import die_with, end_with


def main() -> None:
    """Find the engine and serve it."""
    streams.secure()  # the engine's may be gone, and a rank that cannot say why it fails must still tell the engine
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the engine's to handle
    parser = argparse.ArgumentParser()
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--bound", action="store_true", help="the parent's main thread has started it")
    parser.add_argument("--fd", type=int)
    options = parser.parse_args()
    (die_with if options.bound else end_with)(options.parent)
    if options.fd is not None:
        serve(Connection(options.fd))
    try:
        store, connection = meet_engine()
    except CinelineError as error:
        print(f"cineline: {error}", file=sys.stderr)
        sys.exit(1)
    serve(connection, store)


def serve(connection: Connection, store: Any = None) -> NoReturn:
    """Serve one engine until it says stop or goes away; the process ends with that.

    Args:
        store: torchrun's rendezvous, where there is one.
    """
    link = EngineLink(connection)
    try:
        _serve(link, store)
    except Exception as error:  # the process's edge: whatever it was, the engine must hear of it
        failure = failure_of(error, link.pulse, link.device)
        details = "" if failure.error else traceback.format_exc()  # of a defect, which its one sentence would not place
        link.fail(failure, details)


def _serve(link: EngineLink, store: Any) -> NoReturn:
    setup = link.first()
    assert isinstance(setup, control.Setup)
    if setup.config.pin_cores:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[setup.local_rank % len(cores)]})

    _check_model(setup)

    # Late, so that the rank is pinned and told its threads before torch starts any.
    import torch

    from cineline.families.pipeline_parallel import PipelineParallelMixin, StagePart
    from cineline.rank.faults import with_faults
    from cineline.rank.loop import StageLoop
    from cineline.rank.rehearsal import rehearse
    from cineline.transport import mesh
    from cineline.transport.axis import Traffic
    from cineline.transport.queue import queue_of

    if setup.config.device == "cpu":
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    parallel = setup.parallel
    device = queue_of(mesh.pick_device(setup.config.device, setup.local_rank))
    link.device = str(device.device)
    traffic = Traffic()
    edges, device_mesh = _meet_others(link, setup, store, device, traffic)
    place = parallel.place(setup.rank)
    part = StagePart(place, parallel, setup.cut[place.pp], device.device, setup.config, device_mesh, traffic)
    module, name = setup.spec.stages_class.split(":")
    family = getattr(importlib.import_module(module), name)(setup.spec)
    if not isinstance(family, PipelineParallelMixin):
        raise InvalidConfig(f"stages_class={setup.spec.stages_class!r} is no PipelineParallelMixin: give one that is.")
    family = with_faults(family, setup.faults, setup.rank, setup.start, link.connection)
    with torch.no_grad():
        bytes_read = family.load(part)
    if device.prepares:
        rehearse(family, part, device)
        traffic.clear()
    gc.collect()
    gc.freeze()  # what is loaded stays: a collection that went through it all would stop the rank for 0.1 s
    link.say(control.Ready(bytes_read))
    slices: list[Slice] = []
    record = _all_of([slices.append] * setup.trace + [link.computed] * setup.live)
    ends = edges, device, link.inbox, link.say, link.keep, link.pulse
    StageLoop(family, part, *ends, record, setup.snapshot_every).run()
    edges.settle()
    link.leave(control.Timeline(tuple(slices), dict(traffic)))


def _all_of(takers: Sequence[Callable[[Slice], None]]) -> Callable[[Slice], None] | None:
    """What hands a slice to each of them; None where there are none."""

    def record(piece: Slice) -> None:
        for take in takers:
            take(piece)

    return record if takers else None


def _check_model(setup: control.Setup) -> None:
    """On each host but rank 0's, one of the ranks."""
    if setup.identity is not None and setup.rank and not setup.local_rank:
        from cineline.families.identity import check_same

        who = f"Rank {setup.rank} on {shown(socket.gethostname())}"
        check_same(setup.spec, setup.identity, setup.config.compare_weights == "content", who)


def _meet_others(
    link: EngineLink, setup: control.Setup, store: Any, device: DeviceQueue, traffic: Traffic
) -> tuple[Edges, DeviceMesh | None]:
    """As `mesh.join`, by torchrun's store or, without one, by that of the ranks of this host."""
    from cineline.transport import mesh

    under_torchrun = store is not None
    if setup.parallel.ranks > 1 and store is None:
        store = mesh.open_store(setup.store_port, setup.parallel.ranks)
        if setup.store_port is None:
            link.say(control.StoreOpen(store.port))
    if setup.address is not None:
        mesh.choose_interface(setup.rank, setup.address)
    try:
        joined = mesh.join(store, setup.rank, setup.parallel, device, traffic)
    except RuntimeError as error:
        raise EdgeBroken(f"the other ranks could not be met ({error})") from None
    if under_torchrun:  # the others may be on other hosts
        notice_loss_of_all()
    return joined


if __name__ == "__main__":
    main()
