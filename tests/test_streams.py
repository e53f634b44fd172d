"""What is printed where it cannot be: the videos are made, and what is missing is said."""

from __future__ import annotations

import errno
import io
import os
import pty
import random
import resource
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from encodings.aliases import aliases
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cineline.cli.progress import RequestProgress, make_view
from cineline.core import streams

TESTS = Path(__file__).parent
SMALL = ["--height", "32", "--width", "32", "--num-frames", "1", "--num-inference-steps", "1"]

ENCODINGS = sorted(set(aliases.values()) - {"mbcs", "oem"})
NAMES = st.binary(min_size=1, max_size=20).map(os.fsdecode)
TEXTS = st.text(st.characters(), max_size=20) | NAMES


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """No file of this process grows beyond it, as on a disk with so much room."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def printed(text: str, encoding: str, errors: str = streams.ESCAPE) -> bytes:
    reading, writing = os.pipe()
    stream = streams.text_to(writing, encoding, errors)
    stream.write(text)
    assert streams.failure_of(stream) is None
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        return pipe.read()


def is_text(encoding: str) -> bool:
    try:
        io.TextIOWrapper(io.BytesIO(), encoding)
    except LookupError:
        return False
    return True


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.sampled_from([name for name in ENCODINGS if is_text(name)]), st.sampled_from(streams.TOTAL))
@example("%", "cp864", "ignore")
def test_any_text_is_printed_in_any_encoding(text: str, encoding: str, chosen: str) -> None:
    """And what the encoding has is printed as it is."""
    assert printed("a", encoding)
    both = [printed(text, encoding, errors) for errors in (streams.ESCAPE, chosen)]
    try:
        expected = printed(text, encoding, "strict")
    except UnicodeError:
        return
    assert both == [expected, expected]


@given(NAMES)
def test_a_files_name_is_printed_as_the_bytes_that_it_is(name: str) -> None:
    assert printed(name, "utf-8") == os.fsencode(name)


@settings(deadline=None)
@given(st.lists(st.text("ab\n", min_size=1, max_size=9), max_size=30), st.integers(0, 150))
def test_a_full_disk_has_the_beginning_of_what_was_printed(tmp_path_factory: Any, texts: list[str], room: int) -> None:
    path = tmp_path_factory.mktemp("full") / "out"
    whole = "".join(texts).encode()
    with path.open("wb") as file, file_limit(room):
        stream = streams.text_to(file.fileno(), "utf-8", "strict")
        for text in texts:
            print(text, end="", flush=True, file=stream)
        failure = streams.failure_of(stream)
    assert path.read_bytes() == whole[:room]
    assert (failure is not None) == (len(whole) > room)
    assert failure is None or failure.errno == errno.EFBIG


def test_a_reader_that_goes_away_is_no_failure() -> None:
    reading, writing = os.pipe()
    stream = streams.text_to(writing, "utf-8", "strict")
    os.close(reading)
    for _ in range(3):
        print("x" * 100_000, file=stream)
    assert streams.failure_of(stream) is None
    assert streams.failure_of(None) is None
    assert streams.failure_of(io.StringIO()) is None
    os.close(writing)


def test_a_pipe_that_does_not_block_gets_all_or_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    stream = streams.text_to(writing, "utf-8", "strict")
    got = bytearray()

    def read() -> None:
        time.sleep(0.1)
        while len(got) < 500_000:
            got.extend(os.read(reading, 10_000))

    reader = threading.Thread(target=read)
    reader.start()
    stream.write("x" * 500_000)
    stream.flush()
    reader.join(10)
    assert bytes(got) == b"x" * 500_000
    monkeypatch.setattr(streams, "WAIT_S", 0.05)
    stream.write("x" * 500_000)
    assert isinstance(streams.failure_of(stream), TimeoutError)
    for end in (reading, writing):
        os.close(end)


@given(st.text(st.characters(min_codepoint=32, exclude_categories=["Cc", "Cs"]), max_size=40) | st.text("[/]:ab red"))
def test_no_name_is_taken_for_markup(name: str) -> None:
    console = streams.console()
    console.file = io.StringIO()
    console.print(name, highlight=False, soft_wrap=True)
    assert console.file.getvalue() == f"{name}\n"
    view = make_view([name], quiet=False, console=console)
    view.update([RequestProgress(1, 2, 0, 2, False)])
    view.close()


def test_bars_leave_standard_output_to_its_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = pty.openpty()
    console = streams.console(stderr=True)
    with os.fdopen(theirs, "w") as terminal:
        console.file, console._force_terminal = terminal, True
        view = make_view(["[/]"], quiet=False, console=console)
        print("a path")
        view.update([RequestProgress(1, 2, 0, 2, False)])
        view.close()
    assert capsys.readouterr().out == "a path\n"
    said = b""
    while b"[/]" not in said:
        said += os.read(ours, 100_000)  # it gives what there is; at the end it raises
    os.close(ours)


KINDS = ("file", "full", "gone", "closed", "read-only")
"""The last one only beside others, of standard error."""


def run_with(
    command: list[str], kinds: tuple[str, str, bool], folder: Path, **environment: str
) -> tuple[int, str, str]:
    """A command with such standard output, error and (whether it has) input: its code, and what it printed."""
    reading, gone = os.pipe()
    os.close(reading)
    ends = {"full": ">/dev/full", "gone": f">&{gone}", "closed": ">&-", "read-only": "</dev/null"}
    files = [folder / "stdout", folder / "stderr"]
    words = [
        f"{number}{ends.get(kind, f'>{shlex.quote(str(file))}')}"
        for number, kind, file in zip((1, 2), kinds[:2], files, strict=True)
    ]
    line = f'exec "$@" {" ".join(words)} {"" if kinds[2] else "<&-"}'
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, sys.path)])} | environment
    try:
        done = subprocess.run(["bash", "-c", line, "bash", *command], pass_fds=[gone], env=variables, timeout=60)
    finally:
        os.close(gone)
    out, error = (os.fsdecode(file.read_bytes()) if file.exists() else "" for file in files)
    return done.returncode, out, error


@pytest.mark.parametrize("number", range(4))
def test_a_batch_is_made_whatever_the_streams_are(number: int, tmp_path: Path) -> None:
    """Draws of all that the streams, their encoding and the folder's name can be."""
    chosen = random.Random()
    kinds = (KINDS[number], chosen.choice(KINDS), chosen.random() < 0.5)
    encoding = chosen.choice(["ascii", "utf-8", "latin-1:strict", "cp1252"])
    folder = tmp_path / os.fsdecode(bytes(chosen.choices([*range(1, 47), *range(48, 256)], k=12)))
    folder.mkdir()
    requests = tmp_path / "r.jsonl"
    requests.write_text('{"prompt": "x"}\n' * 3)
    command = [sys.executable, str(TESTS / "instant_line.py"), "generate", "--requests", str(requests), *SMALL]
    code, out, error = run_with([*command, "--output-dir", str(folder)], kinds, tmp_path, PYTHONIOENCODING=encoding)
    names = [f"000{line}.mp4" for line in (1, 2, 3)]
    where = f"{kinds}, {encoding}, {folder}: {error}"
    assert sorted(path.name for path in folder.iterdir()) == names, where
    lost = kinds[0] == "full"
    assert code == (1 if lost else 0), where
    if kinds[0] == "file" and folder.as_posix().isascii():
        assert out == "".join(f"{folder}/{name}\n" for name in names)
    if kinds[0] == "file":
        assert all(name in out for name in names), where
    if kinds[1] == "file":
        assert "Traceback" not in error
        assert error.count("0002.mp4: 32x32") == 1
        assert ("cineline: Standard output lacks what was printed (" in error) == lost, where


@pytest.mark.parametrize("command", ["plan", "help"])
def test_results_that_cannot_be_printed_are_said_to_be_lost(command: str, tmp_path: Path) -> None:
    model = "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
    words = {
        "plan": ["plan", "--model", model, "--devices", "2xL40S", "--json", str(tmp_path / "a.json")],
        "help": ["generate", "--help"],
    }[command]
    code, _, error = run_with([sys.executable, "-m", "cineline", *words], ("full", "file", True), tmp_path)
    assert code == 1
    lost = "Standard output lacks what was printed ([Errno 28] No space left on device): give it another place."
    assert error == f"cineline: {lost}\n"
    assert command == "help" or (tmp_path / "a.json").exists()


def test_ranks_of_a_process_without_streams_start_and_say_why_they_fail(tmp_path: Path) -> None:
    """Their pipes would get the streams' numbers, and what they cannot print must not be what they fail of."""
    script = """if True:
        import sys
        from pathlib import Path
        from cineline import CinelineError, Engine, ParallelConfig, VideoRequest
        from cineline.core import streams
        from faulty_family import FaultySpec
        streams.secure()
        request = VideoRequest(prompt="raise 1 2", num_inference_steps=6, guidance_scale=3.0)
        with Engine(FaultySpec(), ParallelConfig(pp=2), device="cpu", restarts=0) as engine:
            try:
                engine.submit(request).result(30)
            except CinelineError as error:
                Path(sys.argv[1]).write_text(str(error))
    """
    told = tmp_path / "told"
    kinds = ("closed", random.choice(["full", "gone", "closed", "read-only"]), False)
    run_with([sys.executable, "-c", script, str(told)], kinds, tmp_path)
    assert told.read_text() == "Rank 1 failed: ValueError: a fault on purpose (request 0)", kinds
