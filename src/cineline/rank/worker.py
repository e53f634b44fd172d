"""A rank's process: `python -m cineline.rank.worker`, started by the engine or by torchrun's processes.

Without arguments it finds the engine through torchrun's rendezvous; with `--fd N` it has inherited
one end of a pipe to it.
"""

from __future__ import annotations

import gc
import importlib
import os
import queue
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Client, Connection
from typing import Any, NoReturn

from cineline.core import control, streams
from cineline.errors import CinelineError, EdgeBroken, InvalidConfig

PARENT_EVERY_S = 0.5


def main() -> None:
    """Find the engine and serve it."""
    streams.secure()  # the engine's may be gone, and a rank that cannot say why it fails must still tell the engine
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the engine's to handle
    if "--fd" in sys.argv:
        serve(Connection(int(sys.argv[sys.argv.index("--fd") + 1])))
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    store, connection = _find_engine()
    serve(connection, store)


def serve(connection: Connection, store: Any = None) -> NoReturn:
    """Serve one engine until it says stop or goes away; the process ends with that.

    Args:
        store: torchrun's rendezvous, where there is one.
    """
    outbox: queue.SimpleQueue[control.Message | None] = queue.SimpleQueue()
    sender = threading.Thread(target=_send_all, args=(connection, outbox), daemon=True)
    sender.start()
    status = 0
    try:
        _serve(connection, outbox, store)
    except Exception as error:  # the process's edge: whatever it was, the engine must hear of it
        own = error if isinstance(error, CinelineError) else None
        if own is None:
            traceback.print_exc()  # a defect, which its one sentence would not place
        outbox.put(control.Failed(f"{type(error).__name__}: {error}", own))
        status = 1
    outbox.put(None)
    sender.join(timeout=30)
    sys.stderr.flush()
    os._exit(status)  # backends' threads may hang in their own clean-up


def _send_all(connection: Connection, outbox: queue.SimpleQueue[control.Message | None]) -> None:
    """Send what the rank reports, so that its loop never waits for the engine."""
    while (message := outbox.get()) is not None:
        try:
            control.send(connection, message)
        except OSError:
            os._exit(1)


def _receive_all(connection: Connection, inbox: queue.SimpleQueue[control.Message]) -> None:
    """Take in what the engine says; end at once when it is gone, whatever the loop waits for."""
    while True:
        try:
            message = control.receive(connection)
        except (EOFError, OSError):
            os._exit(1)
        inbox.put(message)


def _serve(connection: Connection, outbox: queue.SimpleQueue[control.Message | None], store: Any) -> None:
    setup = control.receive(connection)
    assert isinstance(setup, control.Setup)
    inbox: queue.SimpleQueue[control.Message] = queue.SimpleQueue()
    threading.Thread(target=_receive_all, args=(connection, inbox), daemon=True).start()
    if setup.config.pin_cores:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[setup.local_rank % len(cores)]})

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
    if parallel.ranks > 1 and store is None:
        store = mesh.open_store(setup.store_port, parallel.ranks)
        if setup.store_port is None:
            outbox.put(control.StoreOpen(store.port))
    device = queue_of(mesh.pick_device(setup.config.device, setup.local_rank))
    traffic = Traffic()
    try:
        edges, device_mesh = mesh.join(store, setup.rank, parallel, device, traffic)
    except RuntimeError as error:
        raise EdgeBroken(f"the other ranks could not be met ({error})") from None
    place = parallel.place(setup.rank)
    part = StagePart(place, parallel, setup.cut[place.pp], device.device, setup.config, device_mesh, traffic)
    module, name = setup.spec.stages_class.split(":")
    family = getattr(importlib.import_module(module), name)(setup.spec)
    if not isinstance(family, PipelineParallelMixin):
        raise InvalidConfig(f"stages_class={setup.spec.stages_class!r} is no PipelineParallelMixin: give one that is.")
    family = with_faults(family, setup.faults, setup.rank, setup.start, connection)
    with torch.no_grad():
        bytes_read = family.load(part)
    if device.prepares:
        rehearse(family, part, device)
        traffic.clear()
    gc.collect()
    gc.freeze()  # what is loaded stays: a collection that went through it all would stop the rank for 0.1 s
    outbox.put(control.Ready(bytes_read))
    slices: list[Any] = []
    StageLoop(family, part, edges, device, inbox, outbox.put, slices.append if setup.trace else None).run()
    outbox.put(control.Timeline(tuple(slices), dict(traffic)))


def _end_with_parent(parent: int) -> None:
    """End when torchrun's process is gone: before the engine is found nothing else would tell."""
    while os.getppid() == parent:
        time.sleep(PARENT_EVERY_S)
    os._exit(1)


def _find_engine() -> tuple[Any, Connection]:
    """Under torchrun: its store, and a connection to the engine, whose address rank 0 was given."""
    from torch.distributed.rendezvous import rendezvous

    store, rank, _ = next(rendezvous("env://"))
    key = f"cineline/engine/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if rank == 0:
        store.set(key, os.environ[control.ENGINE_ADDRESS])
    host, port, secret = store.get(key).decode().split(",")
    try:
        connection = Client((host, int(port)), authkey=bytes.fromhex(secret))
    except OSError as error:
        raise InvalidConfig(f"Rank {rank} cannot reach the engine at {host}:{port} ({error}).") from None
    connection.send(rank)
    return store, connection


if __name__ == "__main__":
    main()
