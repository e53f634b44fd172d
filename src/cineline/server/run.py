"""The service's process: from its data folder and its socket to its end by a signal."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from cineline.core.config import ParallelConfig
from cineline.core.family import FamilySpec, StoredFamily
from cineline.engine.hub import name_of
from cineline.engine.replicas import AnyEngine
from cineline.errors import InvalidConfig, reason, shown
from cineline.server.app import Parts, make_app
from cineline.server.dispatcher import Dispatcher
from cineline.server.files import DataFolder
from cineline.server.images import Images
from cineline.server.keys import Keys
from cineline.server.metrics import Metrics
from cineline.server.outcomes import Outcomes
from cineline.server.protocol import KEEP_ALIVE_S, PatientProtocol
from cineline.server.service import Service
from cineline.server.settings import ServeConfig
from cineline.server.store import Store

BACKLOG = 1024

MOST_CONNECTIONS = 1000
"""At once; more are told 503."""

ANSWERS_SHARE = 0.2
"""Of the grace: for answers that are under way, once the engine has ended."""

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Served:
    """A model, and how it is to be run.

    Attributes:
        spec: the model's. names: it goes by, its own first.
        parallel, in_flight: how the line is divided, and what it holds. make_engine: with snapshots in that folder.
        defaults: of requests, for fields that they leave out.
        replicas: lines of that kind, side by side.
    """

    spec: FamilySpec
    names: Sequence[str]
    parallel: ParallelConfig
    in_flight: int | None
    make_engine: Callable[[Path], AnyEngine]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    replicas: int = 1

    @property
    def made_of(self) -> str:
        """The model with all that its videos depend on, in words."""
        spec = self.spec
        if not isinstance(spec, StoredFamily):
            return type(spec).__name__
        named = name_of(spec)
        words = [] if named is None else [named if spec.variant is None else f"{named} ({spec.variant})"]
        words += [f"{component} {path.absolute()}" for component, path in sorted(spec.files.items())]
        words += [f"LoRA {lora.text} ({spec.lora_mode})" for lora in spec.loras]
        return ", ".join(words)


def serve(served: Served, settings: ServeConfig, tell: Tell) -> None:
    """Serve until a signal comes, or the engine ends.

    Raises:
        CinelineError: it cannot begin, or the engine has ended; what was not done goes on with the next start.
    """
    with opened(served, settings) as server:
        tell(f"Serving {served.names[0]} on {server.address}, jobs in {settings.data_dir.absolute()}")
        server.answer()


@contextmanager
def opened(served: Served, settings: ServeConfig) -> Iterator[Server]:
    """A service that is ready to answer; its engine begins with that.

    Raises:
        CinelineError: it cannot begin.
    """
    keys = Keys.of(settings.api_keys)
    with ExitStack() as stack:
        folder = DataFolder(settings.data_dir)
        stack.callback(folder.close)
        store = Store(folder.jobs)
        stack.callback(store.close)
        store.of_model(served.made_of)
        listening = _listen(settings.host, settings.port)
        stack.callback(listening.close)
        metrics = Metrics(lambda: service.now)
        outcomes = Outcomes(store, folder, settings, metrics)
        dispatcher = Dispatcher(
            outcomes,
            lambda: served.make_engine(folder.snapshots),
            served.parallel,
            served.in_flight,
            lambda: server.end(),
            served.replicas,
        )
        service = Service(served.spec, served.names, served.defaults, outcomes, dispatcher)
        app = make_app(Parts(service, folder, keys, Images(settings.image_hosts), metrics))
        server = Server(app, service, dispatcher, listening, settings.grace_s)
        yield server


class Server(uvicorn.Server):
    """uvicorn's, which at the first signal answers on until the engine has ended."""

    def __init__(
        self, app: ASGIApp, service: Service, dispatcher: Dispatcher, listening: socket.socket, grace_s: float
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=PatientProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=MOST_CONNECTIONS,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=max(1, int(grace_s * ANSWERS_SHARE)),
            )
        )
        self._service, self._dispatcher, self._listening, self._grace_s = service, dispatcher, listening, grace_s

    @property
    def address(self) -> str:
        """Where it answers."""
        host, port = self._listening.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def answer(self) -> None:
        """Answer until it is told to leave, or the engine ends.

        Raises:
            CinelineError: the latter.
        """
        self._dispatcher.start()
        self.run(sockets=[self._listening])
        failure = self._dispatcher.failure
        if failure is not None:
            words = str(failure).removesuffix(".")
            failure.args = (f"{words}; jobs that are not done go on with the next start.",)
            raise failure

    def end(self) -> None:
        """The engine has ended by itself."""
        self._service.stopping = True
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take no more, and leave; at the second signal at once."""
        if self._service.stopping:
            self.should_exit = self.force_exit = True
            return
        self._service.stopping = True
        # Whatever stands still: what is not done is on the disk.
        last = threading.Timer(self._grace_s, os._exit, [1])
        last.daemon = True
        last.start()
        threading.Thread(target=self.leave, name="cineline-leaving", daemon=True).start()

    def leave(self) -> None:
        """Park what runs, end the engine, and have `answer` return."""
        self._service.stopping = True
        self._dispatcher.stop(self._grace_s * (1 - 2 * ANSWERS_SHARE))
        self.should_exit = True


def _listen(host: str, port: int) -> socket.socket:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        listening = socket.create_server(address[:2], family=family, backlog=BACKLOG)
        # Connections have it from here: asyncio sets it only where a socket says its protocol, and this one does not.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listening
    except (OSError, UnicodeError) as error:
        raise InvalidConfig(
            f"--host {shown(host)} --port {port} cannot be listened to ({reason(error)}): give others."
        ) from None
