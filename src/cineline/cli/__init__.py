"""The command line: `cineline generate | bench`."""

from __future__ import annotations

import signal
import sys
from types import FrameType

import typer

from cineline.cli.bench import app as bench_app
from cineline.cli.generate import generate
from cineline.errors import CinelineError, InvalidConfig, InvalidRequest, OutputError

app = typer.Typer(
    help="Wan 2.2 video over pipeline stages: several requests in flight, bit for bit what one device gives.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(generate)
app.add_typer(bench_app, name="bench")


@app.callback()
def _top() -> None:
    """Keeps `generate` a command of its own, however many others there are."""


def main() -> None:
    """Run the command line; one sentence and a non-zero exit for every error a user can cause."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        app()
    except CinelineError as error:
        print(f"cineline: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, (InvalidRequest, InvalidConfig, OutputError)) else 1)


def _terminated(number: int, frame: FrameType | None) -> None:
    """End as by Ctrl-C, so that the engine is closed on the way out."""
    raise SystemExit(128 + number)
