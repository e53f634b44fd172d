"""Every error that Cineline raises on purpose.

CinelineError
├── InvalidRequest      a field of a request breaks a rule
├── InvalidConfig       options that cannot work together, or not on this machine
├── CheckpointError     the model's folder is not what it should be
├── OutputError         a result cannot be written where it was asked for
├── MissingLibrary      a library that only some commands need is not installed
├── RankFailed          a rank raised or died; `rank`, `cause` and `request` say which, why and in whose item
│   └── OutOfMemory     its device, or the host, had no memory left
├── EdgeBroken          inside a rank: a neighbour is gone; the engine looks for the one that failed
├── NotFinite           a stage made NaN or infinity of a request; `stage`, `kind` and `number` say where
├── RequestCancelled    the request was cancelled before it was done
├── RequestTimedOut     the request was not done in its `timeout_s`, and was dropped
├── ResultTimeout       `result(timeout=...)` ran out of time; the request goes on
├── Deadlock            a simulated schedule in which nobody can go on
├── EngineClosed        the engine was closed before the request was done
└── WrongProcess        an engine is used in a process that was forked from its own

A message is one sentence with the value, the rule and the remedy. Values are repeated by `shown`, the words of other
libraries' errors by `reason`, so that a message stays one.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path

VALUE_LIMIT = 80
"""Characters of a value that a message repeats."""

PATH_LIMIT = 250
"""Characters of a path that a message repeats whole: its end tells most."""

REASON_LIMIT = 200
"""Characters of another library's error that a message repeats."""


def shown(value: object) -> str:
    """A user's value as a message repeats it: on one line, and where it is long its beginning and its type."""
    kind = type(value).__name__
    try:
        text = " ".join(repr(str(value) if isinstance(value, Path) else value).splitlines())
    except (RecursionError, ValueError):  # nested too deeply, or a number of thousands of digits
        return f"({kind})"
    limit = PATH_LIMIT if isinstance(value, Path) else VALUE_LIMIT
    return text if len(text) <= limit else f"{text[:VALUE_LIMIT]}... ({kind})"


def reason(error: BaseException) -> str:
    """What another library's error says, without the paths that it repeats: the first line of it, not too long."""
    words = (isinstance(error, OSError) and error.strerror) or str(error).strip().partition("\n")[0]
    return words[:REASON_LIMIT] or type(error).__name__


class CinelineError(Exception):
    """Base of all errors raised on purpose."""


class InvalidRequest(CinelineError, ValueError):
    """A field of a request breaks a rule."""


class InvalidConfig(CinelineError, ValueError):
    """Options that cannot work together, or not on this machine."""


class CheckpointError(CinelineError):
    """The model's folder is not what it should be."""


class OutputError(CinelineError, OSError):
    """A result cannot be written where it was asked for."""


class MissingLibrary(CinelineError, ImportError):
    """A library that only some commands need is not installed."""


class RankFailed(CinelineError, RuntimeError):
    """A rank raised or died.

    Attributes:
        rank: the rank's number in the world.
        cause: what happened to it, in words.
        request: the id of the job whose turn it was; None where that is not known, or was nobody's.
    """

    def __init__(self, rank: int, cause: str, request: int | None = None) -> None:
        super().__init__(f"Rank {rank} failed: {cause}" + ("" if request is None else f" (request {request})"))
        self.rank = rank
        self.cause = cause
        self.request = request

    def __reduce__(self) -> tuple[type[RankFailed], tuple[int, str, int | None]]:
        return type(self), (self.rank, self.cause, self.request)


class OutOfMemory(RankFailed):
    """A rank's device, or its host, had no memory left for the request's item. The request fails; the others go on."""


class EdgeBroken(CinelineError, RuntimeError):
    """Inside a rank: a neighbour is gone. A symptom; the engine looks for the rank that failed."""


class NotFinite(CinelineError, ArithmeticError):
    """A stage made NaN or infinity of what was finite; the request is dropped, and the others go on.

    Attributes:
        request: the job's id.
        stage: the stage's number; None where no rank saw who made it, as where it came about on the way.
        kind: what it computed: text, encode, denoise or decode.
        number: the solver step (denoise) or the chunk (decode).
    """

    def __init__(self, request: int, stage: int | None, kind: str, number: int) -> None:
        where = f"{kind} {number}" if kind in ("denoise", "decode") else kind
        who = "at the latest" if stage is None else f"stage {stage} computed"
        super().__init__(
            f"Request {request} is not finite (NaN or infinity) since {who} {where}: "
            "use dtype='float32', less guidance, or weights that are not damaged."
        )
        self.request, self.stage, self.kind, self.number = request, stage, kind, number

    def __reduce__(self) -> tuple[type[NotFinite], tuple[int, int | None, str, int]]:
        return type(self), (self.request, self.stage, self.kind, self.number)


class RequestCancelled(CinelineError):
    """The request was cancelled before it was done."""


class RequestTimedOut(CinelineError, TimeoutError):
    """The request was not done in its `timeout_s`; it was dropped, and the others go on."""


class ResultTimeout(CinelineError, TimeoutError):
    """`result(timeout=...)` ran out of time; the request itself goes on."""


class Deadlock(CinelineError):
    """A simulated schedule in which work is left and nobody can go on, or two ends of an edge disagree."""


class EngineClosed(CinelineError, RuntimeError):
    """The engine was closed before the request was done."""


class WrongProcess(CinelineError, RuntimeError):
    """An engine is used in a process that was forked from its own, where its threads are not."""


def check_process(owner: int) -> None:
    """Refuse to use what belongs to another process.

    Raises:
        WrongProcess: this one is not the `owner`.
    """
    if os.getpid() != owner:
        raise WrongProcess(f"This engine belongs to process {owner}, not to {os.getpid()}: make one here.")


def anew(error: CinelineError) -> CinelineError:
    """The same error to be raised once more: one that is raised again keeps, and shows, where it was before."""
    return copy.copy(error)
