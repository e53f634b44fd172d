"""The command line: what it writes, and one sentence for every error a user can cause."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import psutil
import pytest
from oracle import Checkpoint, Oracle
from PIL import Image
from safetensors.torch import load_file

from cineline import Engine, ParallelConfig, VideoRequest
from cineline.cli import main
from cineline.cli.generate import generate
from cineline.cli.options import Fields
from cineline.core.config import DeviceConfig, texts_of
from cineline.core.recovery import Recovery
from cineline.families.wan.random_checkpoint import RandomConfig

SMALL = ["--height", "32", "--width", "64", "--num-frames", "5", "--num-inference-steps", "2"]


@pytest.fixture(scope="module")
def t2v(checkpoint: Checkpoint) -> str:
    return str(checkpoint(RandomConfig("t2v", seed=3)))


@pytest.fixture(scope="module")
def ti2v(checkpoint: Checkpoint) -> str:
    return str(checkpoint(RandomConfig("ti2v", seed=3)))


def run(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cineline", *arguments], capture_output=True, text=True, timeout=timeout
    )


def test_a_prompt_becomes_a_video_and_latents_on_two_stages(ti2v: str, tmp_path: Path, oracle: Oracle) -> None:
    video, latents, trace = tmp_path / "a.mp4", tmp_path / "a.safetensors", tmp_path / "t.json"
    files = ["--output", str(video), "--save-latents", str(latents), "--trace", str(trace)]
    done = run("generate", "a cat", "--model", ti2v, "--pp", "2", "--seed", "5", *SMALL, *files)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(latents), str(video)]
    assert "64x32, 5 frames at 24 fps, 2 steps, guidance 5, seed 5" in done.stderr
    request = VideoRequest(prompt="a cat", height=32, width=64, num_frames=5, num_inference_steps=2, seed=5)
    expected, _ = oracle.run(Path(ti2v), "float32", request)
    assert load_file(latents)["latents"].equal(expected)
    with av.open(str(video)) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        assert sum(1 for _ in container.decode(video=0)) == 5
    rows = {event["tid"] for event in json.loads(trace.read_text())["traceEvents"]}
    assert rows == {0, 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "a.safetensors", "t.json"]


def test_a_file_of_requests_is_numbered_by_line_with_options_as_defaults(
    ti2v: str, tmp_path: Path, oracle: Oracle
) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text('{"prompt": "one"}\n\n{"prompt": "two", "seed": 9, "num_frames": 1}\n')
    out = tmp_path / "out"
    out.mkdir()
    where = ["--output-dir", str(out), "--save-latents", str(out), "--quiet"]
    done = run("generate", "--requests", str(file), "--model", ti2v, "--guidance-scale", "1", *SMALL, *where)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert sorted(path.name for path in out.glob("*.mp4")) == ["0001.mp4", "0003.mp4"]
    request = VideoRequest(
        prompt="two", seed=9, height=32, width=64, num_frames=1, num_inference_steps=2, guidance_scale=1.0
    )
    expected, _ = oracle.run(Path(ti2v), "float32", request)
    assert load_file(out / "0003.safetensors")["latents"].equal(expected)


def test_the_options_of_generate_are_the_configs_fields() -> None:
    options = inspect.signature(generate).parameters
    for owner in (VideoRequest, ParallelConfig, DeviceConfig, Recovery):
        assert texts_of(owner).keys() <= options.keys()
    assert not {"decode", "high_stages", "pin_cores"} & options.keys()
    assert options["cfg"].default.help.endswith(f"; {ParallelConfig().cfg}.")
    named = [*texts_of(ParallelConfig), *texts_of(DeviceConfig)]  # what is not given a snapshot folder may say
    assert all(options[name].default.default is None for name in named)
    given = Fields(ParallelConfig, ["pp", "split", "text_split", "vae_decode"]).take(
        {"pp": 2, "split": "3,1", "text_split": None, "vae_decode": "rows"}
    )
    assert given == {"pp": 2, "split": [3, 1], "vae_decode": "rows"}
    for config in (DeviceConfig, Recovery):
        assert inspect.signature(config).parameters.keys() <= inspect.signature(Engine).parameters.keys()


def complaint(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """The one sentence that a refused command prints; it must end with a non-zero exit."""
    monkeypatch.setattr(sys, "argv", ["cineline", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code not in (0, None)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    return printed.err


BAD_OPTIONS = [
    (["--height", "33"], ["height=33", "multiple of 32", "use 32 or 64"]),
    (["--width", "0"], ["width=0", "multiple of 32"]),
    (["--num-frames", "6"], ["num_frames=6", "4k+1", "use 5 or 9"]),
    (["--num-inference-steps", "0"], ["num_inference_steps=0", "below 1"]),
    (["--guidance-scale", "nan"], ["guidance_scale=nan", "finite"]),
    (["--flow-shift", "-1"], ["flow_shift=-1", "positive"]),
    (["--guidance-scale-2", "3"], ["guidance_scale_2=3", "two experts"]),
    (["--boundary-ratio", "0.5"], ["boundary_ratio=0.5", "two experts"]),
    (["--seed", "-1"], ["seed=-1", "out of range"]),
    (["--image", "no-such.png"], ["no-such.png", "cannot be read"]),
    (["--output", "video.txt"], ["video.txt", ".mp4"]),
    (["--output", "no/such/folder/video.mp4"], ["no/such/folder", "does not exist"]),
    (["--output-dir", "no/such/folder"], ["no/such/folder", "does not exist"]),
    (["--save-latents", "latents.pt"], ["latents.pt", ".safetensors"]),
    (["--trace", "trace.txt"], ["trace.txt", ".json"]),
    (["--output", f"{'x' * 300}.mp4"], ["xxx", "longer than 200 bytes"]),
    (["--model", "x" * 300], ["xxx", "cannot be a folder"]),
    (["--fps", "3000000000"], ["fps=3000000000", "above 1000"]),
    (["--timeout-s", "-1"], ["timeout_s=-1.0", "above 0", "give seconds"]),
    (["--num-inference-steps", "1000000000000"], ["num_inference_steps=1000000000000", "above 10000"]),
    (["--pp", "0"], ["pp=0", "at least 1"]),
    (["--pp", "99"], ["pp=99", "4 blocks"]),
    (["--pp", "2", "--split", "3,2"], ["[3, 2]", "adds up to 5", "4 blocks"]),
    (["--pp", "2", "--split", "a,b"], ["split='a,b'", "5,2,1"]),
    (["--vae-decode", "columns"], ["vae_decode='columns'", "rows"]),
    (["--pp", "2", "--vae-split", "1,2"], ["vae_split=[1, 2]", "adds up to 3", "units of the VAE's decoder"]),
    (["--pp", "2", "--vae-decode", "rows", "--vae-split", "1,2"], ["vae_split is for vae_decode='layers'"]),
    (["--pp", "2", "--text-split", "0,1"], ["text_split=[0, 1]", "adds up to 1", "text encoder"]),
    (["--text-encoder", "disk"], ["text_encoder='disk'", "reload"]),
    (["--in-flight", "0"], ["in_flight=0", "from 1 on"]),
    (["--dtype", "float8"], ["float8", "bfloat16"]),
    (["--device", "toaster"], ["toaster", "cpu"]),
    (["--launcher", "torchrun"], ["torchrun"]),
    (["--no-such-option"], ["--no-such-option"]),
    (["--prompt-cache", "3XB"], ["prompt_cache='3XB'", "give bytes"]),
    (["--height", "tall"], ["--height", "'tall'", "integer"]),
]


@pytest.mark.parametrize(("options", "words"), BAD_OPTIONS, ids=lambda value: " ".join(value))
def test_a_bad_option_is_refused_in_one_sentence(
    options: list[str],
    words: list[str],
    ti2v: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    error = complaint(capsys, monkeypatch, "generate", "a cat", "--model", ti2v, *options)
    for word in words:
        assert word in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["plan", "--model"], "cineline plan"),
        (["plan", "--model", "x", "--no-such-option"], "cineline plan"),
        (["plan"], "cineline plan"),
        (["generate", "a cat", "--height"], "cineline generate"),
        (["generate", "a cat", "--height", "tall"], "cineline generate"),
        (["bench", "line", "--steps"], "cineline bench line"),
        (["bench", "line", "--steps", "0"], "cineline bench line"),
        (["bench", "no-such-command"], "cineline bench"),
        (["eval", "compare", "one", "two", "--json"], "cineline eval compare"),
        (["no-such-command"], "cineline"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_words_point_to_their_commands_help(
    words: list[str], command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert complaint(capsys, monkeypatch, *words).endswith(f": see {command} --help.\n")


@pytest.mark.parametrize(
    "option",
    [
        *("--height", "--seed", "--image", "--model", "--requests", "--output", "--output-dir", "--save-latents"),
        *("--trace", "--pp", "--cfg", "--split", "--vae-split", "--vae-decode", "--expert-placement"),
        *("--device", "--dtype", "--text-encoder", "--launcher", "--guidance-scale", "--no-such-option"),
    ],
)
@pytest.mark.parametrize("value", ["x" * 100_000, "9" * 100_000, "9" * 4000], ids=["letters", "digits", "4000 digits"])
def test_a_long_value_of_an_option_is_cut(
    option: str,
    value: str,
    ti2v: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [option, value] if option != "--no-such-option" else [option + value]
    error = complaint(capsys, monkeypatch, "generate", "x", *(["--model", ti2v] if option != "--model" else []), *given)
    *_, sentence = error.splitlines()
    assert sentence.startswith("cineline: ")
    assert len(sentence) < 800


def test_other_refusals(
    ti2v: str, t2v: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "file").write_text("no folder")

    def error(*arguments: str) -> str:
        return complaint(capsys, monkeypatch, "generate", *arguments)

    assert "empty" in error("  ", "--model", ti2v)
    assert "no prompt" in error("--model", ti2v)
    assert "text.png" in error("x", "--model", ti2v, "--image", "text.png")
    Image.new("RGB", (8, 8)).save("picture.png")
    assert "takes no image" in error("x", "--model", t2v, "--image", "picture.png")
    assert "no-such-model" in error("x", "--model", "no-such-model")
    assert "model_index.json" in error("x", "--model", str(tmp_path))
    assert "is a file" in error("x", "--model", "file")


def test_an_image_model_without_image_is_refused(
    checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(checkpoint(RandomConfig("i2v", seed=3)))
    assert "needs an image" in complaint(capsys, monkeypatch, "generate", "x", "--model", folder)


def test_a_folder_that_cannot_be_written_is_refused(
    ti2v: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    error = complaint(capsys, monkeypatch, "generate", "x", "--model", ti2v, "--output", str(tmp_path / "a.mp4"))
    assert "cannot be written" in error


BAD_LINES = [
    ("{", "no JSON"),
    ("[1]", "no JSON object"),
    ('{"prompt": "x", "colour": 1}', "colour"),
    ('{"prompt": "x", "num_frames": 6}', "num_frames=6"),
    ('{"prompt": "x", "guidance_scale": NaN}', "guidance_scale=nan"),
    ('{"prompt": "x", "height": "tall"}', "height='tall'"),
    ("[" * 100_000, "no JSON"),
    ('{"seed": 1}', "prompt"),
    ('{"prompt": ""}', "empty"),
    ('{"prompt": "x", "image": "no-such.png"}', "no-such.png"),
    ('{"prompt": "x", "decode": false}', "--save-latents"),
]


@pytest.mark.parametrize(("line", "word"), BAD_LINES, ids=[word for _, word in BAD_LINES])
def test_one_bad_line_refuses_the_file_and_names_the_line(
    line: str, word: str, ti2v: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text(f'{{"prompt": "good"}}\n\n{line}\n')
    out = tmp_path / "out"
    out.mkdir()
    error = complaint(
        capsys, monkeypatch, "generate", "--requests", str(file), "--output-dir", str(out), "--model", ti2v
    )
    assert "line 3" in error
    assert word in error
    assert list(out.iterdir()) == []


def test_a_broken_weight_file_is_refused_in_one_sentence(checkpoint: Checkpoint, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "broken"
    shutil.copytree(checkpoint(RandomConfig(seed=3)), folder)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    done = run(
        "generate", "x", "--model", str(folder), "--pp", "2", *SMALL, "--output", str(tmp_path / "a.mp4"), "--quiet"
    )
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert "truncated" in done.stderr
    assert not (tmp_path / "a.mp4").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_in_the_middle_leaves_no_process_and_no_file(
    number: signal.Signals, ti2v: str, tmp_path: Path
) -> None:
    command = ["generate", "x", "--model", ti2v, "--pp", "2", "--num-inference-steps", "10000"]
    command += ["--trace", str(tmp_path / "t.json")]
    size = ["--height", "32", "--width", "32", "--num-frames", "1", "--output", str(tmp_path / "a.mp4")]
    # A shell's background job ignores Ctrl-C, and so would its children.
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen([sys.executable, "-m", "cineline", *command, *size], stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, ignored)
    assert process.stderr is not None
    assert "on 2 ranks" in process.stderr.readline()
    assert "a.mp4" in process.stderr.readline()  # printed once the ranks are ready
    ranks = psutil.Process(process.pid).children(recursive=True)
    assert len(ranks) == 3  # and the process that forked them
    time.sleep(0.5)
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode != 0
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert not alive
    assert list(tmp_path.iterdir()) == []


def test_torchrun_starts_the_same_line(ti2v: str, tmp_path: Path, oracle: Oracle) -> None:
    latents = tmp_path / "a.safetensors"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "cineline"]
    arguments = ["generate", "a cat", "--model", ti2v, *SMALL, "--save-latents", str(latents), "--quiet"]
    done = subprocess.run([sys.executable, *command, *arguments], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    request = VideoRequest(prompt="a cat", height=32, width=64, num_frames=5, num_inference_steps=2)
    assert load_file(latents)["latents"].equal(oracle.run(Path(ti2v), "float32", request)[0])


def test_an_option_that_is_not_given_leaves_the_models_default_be() -> None:
    """A checkpoint's own `negative_prompt` and `seed` hold unless the options are there."""
    seen = inspect.signature(generate).parameters
    defaults = {name: seen[name].default.default for name in texts_of(VideoRequest)}
    assert {"negative_prompt", "seed"} <= defaults.keys()
    assert Fields(VideoRequest).take(defaults) == {}
