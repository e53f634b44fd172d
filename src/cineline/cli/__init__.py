"""The command line: `cineline generate | serve | show | plan | convert | calibrate-cache | bench | eval`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any, NoReturn

import typer
from pydantic import ValidationError

from cineline.cli.bench import app as bench_app
from cineline.cli.calibrate import calibrate
from cineline.cli.convert import convert
from cineline.cli.evaluate import app as eval_app
from cineline.cli.generate import generate
from cineline.cli.plan import plan
from cineline.cli.serve import serve
from cineline.cli.show import show
from cineline.core import streams
from cineline.engine.launch import PROGRESS, QUIET
from cineline.errors import REASON_LIMIT, CinelineError, InvalidConfig, InvalidRequest, OutputError, reason, shown

app = typer.Typer(
    help="Wan 2.2 video over pipeline stages: several requests in flight, bit for bit what one device gives.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(generate)
app.command()(serve)
app.command()(show)
app.command()(plan)
app.command()(convert)
app.command(name="calibrate-cache")(calibrate)
app.add_typer(bench_app, name="bench")
app.add_typer(eval_app, name="eval")


@app.callback()
def _top() -> None:
    """Keeps `generate` a command of its own, however many others there are."""


def main() -> None:
    """Run `cineline`."""
    run(app)


def run(app: typer.Typer) -> NoReturn:
    """Run a command line; one sentence and a non-zero exit for every error a user can cause."""
    streams.secure()
    signal.signal(signal.SIGTERM, _terminated)
    quiet = {name: value for name, value in QUIET.items() if name != PROGRESS}  # a download may show how far it is
    os.environ.update(quiet | os.environ)
    try:
        status = app(standalone_mode=False)
    except CinelineError as error:
        code = 2 if isinstance(error, (InvalidRequest, InvalidConfig, OutputError)) else 1
        status = _refuse(str(error), code)
    except typer.Abort:
        status = _refuse("Interrupted.", 130)
    except typer.TyperException as error:
        status = _refuse(_sentence(error, app), error.exit_code)
    except OSError as error:  # of no file that was asked for: a temporary one, a pipe
        status = _refuse(f"The operating system refused something ({reason(error)}): check disk, memory and limits.", 1)
    lost = streams.failure_of(sys.stdout)
    if lost is not None:
        status = _refuse(f"Standard output lacks what was printed ({lost}): give it another place.", status or 1)
    sys.exit(status)


def _refuse(sentence: str, status: int) -> int:
    if sentence:
        print(f"cineline: {sentence}", file=sys.stderr)
    return status


def _sentence(error: typer.TyperException, app: typer.Typer) -> str:
    """What is wrong with the command's words; with the value, which typer leaves out, and whose help says more."""
    message = error.format_message().rstrip(".")
    message = message if len(message) <= REASON_LIMIT else f"{message[:REASON_LIMIT]}..."
    if isinstance(error.__context__, ValidationError):
        message += f" (given: {shown(error.__context__.errors()[0]['input'])})"
    context = getattr(error, "ctx", None)
    command = context.command_path if context else _named_command(app, sys.argv[1:])
    return message and f"{message}: see {command} --help."


def _named_command(app: typer.Typer, words: Sequence[str]) -> str:
    """The command that the words begin with: typer does not say whose option it is that lacks a value."""
    path = ["cineline"]
    command: Any = typer.main.get_command(app)
    for word in words:
        command = getattr(command, "commands", {}).get(word)
        if command is None:
            break
        path.append(word)
    return " ".join(path)


def _terminated(number: int, frame: FrameType | None) -> None:
    """End as by Ctrl-C, so that the engine is closed on the way out."""
    raise SystemExit(128 + number)
