"""A process's standard streams, safe against what they may be: closed, full, gone, or without a character (no torch).

What is computed is worth more than what is said of it: once `secure` was called, printing never raises, whoever
prints. What kept a stream from being printed to is asked for at the end (`failure_of`).
"""

from __future__ import annotations

import codecs
import io
import os
import select
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer
    from rich.console import Console

ESCAPE = "cineline"
"""The error handler's name, as `codecs` knows it."""

TOTAL = ("ignore", "replace", "backslashreplace", "xmlcharrefreplace", "namereplace")
"""Error handlers that never fail, which a user may have chosen (`PYTHONIOENCODING`)."""

WAIT_S = 60.0
"""Seconds that a pipe which does not block may be full before it counts as gone."""


def secure() -> None:
    """Give the process standard streams that are open and never fail.

    Streams that somebody has put in their place are left as they are.
    """
    for number in (0, 1, 2):  # else the next file or pipe that is opened would get the number, and what is printed
        _fill(number)
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: PTH123, SIM115 (it stays open)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _safe(1, sys.stdout, ESCAPE)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _safe(2, sys.stderr, "backslashreplace")


def failure_of(stream: TextIO | None) -> OSError | None:
    """Why something is not there that was printed; None where nothing is missing, or its reader wanted no more."""
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    if stream is None or not isinstance(raw, Lasting):
        return None
    stream.flush()
    return None if isinstance(raw.failure, ConnectionError) else raw.failure


def console(stderr: bool = False, width: int | None = None) -> Console:
    """Prints what it is given: no name of a file is taken for markup.

    Args:
        width: of what is no terminal.
    """
    from rich.console import Console  # late: ranks print without it

    made = Console(stderr=stderr, markup=False, emoji=False)
    return made if made.is_terminal or width is None else Console(stderr=stderr, markup=False, emoji=False, width=width)


class Lasting(io.FileIO):
    """A descriptor that takes whatever is written to it, and drops it from the first failure on.

    Not only what failed: lines after a gap would be read as if they were all.

    Attributes:
        failure: the first, if there was one.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.failure: OSError | None = None

    def write(self, data: ReadableBuffer, /) -> int:
        """Write some of it, or drop all of it; how many bytes that is."""
        if self.failure is None:
            try:
                return self._write(data)
            except OSError as error:
                self.failure = error
        return memoryview(data).nbytes

    def _write(self, data: ReadableBuffer) -> int:
        while True:
            written: int | None = super().write(data)
            if written is not None:
                return written
            if not select.select([], [self], [], WAIT_S)[1]:  # it does not block, and is full
                raise TimeoutError(f"nothing was read for {WAIT_S:.0f} s")


def text_to(descriptor: int, encoding: str, errors: str) -> io.TextIOWrapper:
    """A stream of text to a descriptor that never fails."""
    return io.TextIOWrapper(io.BufferedWriter(Lasting(descriptor)), encoding, errors, line_buffering=True)


def _safe(number: int, stream: TextIO | None, errors: str) -> TextIO:
    """In place of Python's own stream, None where its descriptor was closed when Python began."""
    if stream is None:  # by now the number may be another file's
        return text_to(os.open(os.devnull, os.O_WRONLY), "utf-8", errors)
    chosen = stream.errors if stream.errors in TOTAL else errors
    return text_to(number, stream.encoding, chosen or errors)


def _fill(number: int) -> None:
    """Open the descriptor on nothing if it is closed; those below it are open."""
    try:
        os.fstat(number)
    except OSError:
        os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    """For one character that an encoding has not: the byte of a file's name that it stands for, else its escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    number = ord(error.object[error.start])
    if 0xDC80 <= number <= 0xDCFF and not error.encoding.lower().startswith(("utf-16", "utf-32", "utf_16", "utf_32")):
        return bytes([number - 0xDC00]), error.start + 1
    # By number: the character may be one of ASCII's, such as the per cent sign that code page 864 has not.
    escaped = f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"
    return escaped if number < 0x10000 else f"\\U{number:08x}", error.start + 1


codecs.register_error(ESCAPE, _escape)
