"""Models from the hub: configs first, checks second, weights last, and of those what is used; a hub of our own."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from foreign import write
from oracle import Checkpoint
from safetensors.torch import load_file, save_file

from cineline import CheckpointError
from cineline.engine.hub import folder_of
from cineline.families.wan.random_checkpoint import RandomConfig

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB_ID = "somebody/tiny-Diffusers"
SMALL = ["--height", "32", "--width", "32", "--num-frames", "5", "--num-inference-steps", "1"]


@dataclass
class Hub:
    """One repository over HTTP, as the hub's client asks for it.

    Attributes:
        address: of the server. home: of the client's cache. folder: what is in the repository.
        fetched: names of files, in order. commit: the newest.
        locked: the status and headers of the answer to requests whose path begins so, as of a gated repository.
    """

    address: str
    home: Path
    folder: Path
    fetched: list[str] = field(default_factory=list)
    commit: str = COMMIT
    locked: tuple[str, int, dict[str, str]] | None = None

    @property
    def weights(self) -> list[str]:
        """Of what was fetched."""
        return [name for name in self.fetched if name.endswith(".safetensors")]

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = (
            os.environ | variables | {"HF_ENDPOINT": self.address, "HF_HOME": str(self.home), "HF_HUB_DISABLE_XET": "1"}
        )
        command = [sys.executable, "-m", "cineline", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(with_content=False)

        def do_GET(self) -> None:
            self.answer(with_content=True)

        def answer(self, with_content: bool) -> None:
            path = self.path.split("?")[0]
            if hub.locked and path.startswith(hub.locked[0]):
                self.refuse(*hub.locked[1:])
                return
            if path.startswith(f"/api/models/{HUB_ID}/tree/"):
                self.send(json.dumps(self.tree()).encode(), "application/json", with_content)
                return
            if path.startswith(f"/api/models/{HUB_ID}"):
                facts = {"id": HUB_ID, "modelId": HUB_ID, "sha": hub.commit, "siblings": []}
                self.send(json.dumps(facts).encode(), "application/json", with_content)
                return
            name = path.removeprefix(f"/{HUB_ID}/resolve/{hub.commit}/")
            file = hub.folder / name
            if name == path or not file.is_file():
                self.send_error(404)
                return
            if with_content:
                hub.fetched.append(name)
            self.send(file.read_bytes(), "application/octet-stream", with_content)

        def refuse(self, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in (headers | {"Content-Length": "0"}).items():
                self.send_header(name, value)
            self.end_headers()

        def tree(self) -> list[dict[str, object]]:
            files = sorted(path for path in hub.folder.rglob("*") if path.is_file())
            return [
                {
                    "type": "file",
                    "path": str(path.relative_to(hub.folder)),
                    "size": path.stat().st_size,
                    "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
                }
                for path in files
            ]

        def send(self, content: bytes, kind: str, with_content: bool) -> None:
            self.send_response(200)
            headers = {"Content-Type": kind, "Content-Length": str(len(content)), "X-Repo-Commit": hub.commit}
            for name, value in (headers | {"ETag": f'"{hashlib.sha1(content).hexdigest()}"'}).items():
                self.send_header(name, value)
            self.end_headers()
            if with_content:
                self.wfile.write(content)

    return Handler


@pytest.fixture
def hub(checkpoint: Checkpoint, tmp_path: Path) -> Iterator[Hub]:
    folder = tmp_path / "repository"
    shutil.copytree(checkpoint(RandomConfig("ti2v")), folder)
    found = Hub("", tmp_path / "cache", folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(found))
    found.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield found
    server.shutdown()
    server.server_close()
    thread.join(10)


def add_variant(folder: Path, component: str, variant: str) -> None:
    """The same weights in another file, as far as a cache can tell."""
    for file in (folder / component).glob("*.safetensors"):
        save_file(load_file(file), file.with_name(f"{file.stem}.{variant}.safetensors"), {"variant": variant})


def test_a_request_that_is_refused_costs_configs_alone(hub: Hub) -> None:
    done = hub.run("generate", "a cat", "--model", HUB_ID, "--height", "33", "--width", "32")
    assert done.returncode == 2 and "height=33" in done.stderr
    assert "model_index.json" in hub.fetched and not hub.weights


def test_a_line_that_is_refused_costs_configs_alone(hub: Hub, tmp_path: Path) -> None:
    done = hub.run("generate", "a cat", "--model", HUB_ID, "--tp", "5", "--output", str(tmp_path / "a.mp4"))
    assert done.returncode == 2 and "tp=5" in done.stderr
    assert not hub.weights


@pytest.mark.parametrize(
    ("pp", "host", "words"),
    [("3", "127.0.0.1", "torchrun started 2 processes"), ("2", "192.0.2.1", "MASTER_ADDR='192.0.2.1'")],
)
def test_a_world_that_is_refused_costs_configs_alone(hub: Hub, pp: str, host: str, words: str, tmp_path: Path) -> None:
    world = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": host}
    options = ["--model", HUB_ID, "--pp", pp, "--device", "cpu", "--output", str(tmp_path / "a.mp4")]
    done = hub.run("generate", "a cat", *options, **world, MASTER_PORT="29500")
    assert done.returncode == 2 and words in done.stderr
    assert not hub.weights


def test_planning_costs_configs_alone(hub: Hub) -> None:
    done = hub.run("plan", "--model", HUB_ID, "--devices", "2xL40S", "--requests", "1")
    assert done.returncode == 0, done.stderr
    assert hub.fetched and not hub.weights


def test_weights_come_last_once_and_in_one_variant(hub: Hub, tmp_path: Path) -> None:
    add_variant(hub.folder, "transformer", "fp16")
    out = tmp_path / "a.safetensors"
    arguments = ["generate", "a cat", "--model", HUB_ID, *SMALL, "--save-latents", str(out)]
    done = hub.run(*arguments)
    assert done.returncode == 0, done.stderr
    plain = [f"{name}.safetensors" for name in ("text_encoder/model", "transformer/diffusion_pytorch_model")]
    assert sorted(hub.weights) == [*plain, "vae/diffusion_pytorch_model.safetensors"]
    nbytes = sum((hub.folder / name).stat().st_size for name in hub.weights)
    assert f"Downloading {HUB_ID}: 3 files, {nbytes / 1e9:.2f} GB" in done.stderr
    hub.fetched.clear()
    again = hub.run(*arguments, "--quiet")
    assert again.returncode == 0 and not hub.fetched and "Downloading" not in again.stderr


def test_what_is_given_as_a_file_is_not_downloaded(hub: Hub, tmp_path: Path) -> None:
    files = {name: write(hub.folder, name, "original", tmp_path)[0] for name in ("transformer", "text_encoder")}
    options = ["--transformer", str(files["transformer"]), "--text-encoder-file", str(files["text_encoder"])]
    out = tmp_path / "a.safetensors"
    done = hub.run("generate", "a cat", "--model", HUB_ID, *options, *SMALL, "--save-latents", str(out))
    assert done.returncode == 0, done.stderr
    assert hub.weights == ["vae/diffusion_pytorch_model.safetensors"]
    assert f"Loading {HUB_ID} with transformer.safetensors, text_encoder.safetensors on 1 rank" in done.stderr


def test_only_the_variant_that_is_asked_for_comes(hub: Hub, tmp_path: Path) -> None:
    add_variant(hub.folder, "transformer", "fp16")
    out = tmp_path / "a.safetensors"
    arguments = ["generate", "a cat", "--model", HUB_ID, *SMALL, "--save-latents", str(out), "--quiet"]
    done = hub.run(*arguments, "--variant", "fp16")
    assert done.returncode == 0, done.stderr
    assert "transformer/diffusion_pytorch_model.fp16.safetensors" in hub.weights
    assert "transformer/diffusion_pytorch_model.safetensors" not in hub.weights
    assert "Downloading" not in done.stderr
    hub.fetched.clear()
    refused = hub.run(*arguments, "--variant", "fp17")
    assert refused.returncode == 1 and "variant='fp17' is in no component" in refused.stderr and not hub.fetched


def test_a_later_commit_of_the_repository_links_what_is_here(hub: Hub, tmp_path: Path) -> None:
    arguments = ["generate", "a cat", "--model", HUB_ID, *SMALL, "--save-latents", str(tmp_path / "a.safetensors")]
    assert hub.run(*arguments).returncode == 0
    hub.commit = COMMIT[::-1]
    config = hub.folder / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text() + "\n")
    hub.fetched.clear()
    done = hub.run(*arguments)
    assert done.returncode == 0, done.stderr
    assert not hub.weights and "Downloading" not in done.stderr


def test_what_runs_does_not_depend_on_what_is_in_the_cache(hub: Hub, tmp_path: Path) -> None:
    add_variant(hub.folder, "transformer", "fp16")
    out = tmp_path / "a.safetensors"
    arguments = ["generate", "a cat", "--model", HUB_ID, *SMALL, "--save-latents", str(out), "--quiet"]
    assert hub.run(*arguments, "--variant", "fp16").returncode == 0
    hub.fetched.clear()
    assert hub.run(*arguments).returncode == 0
    assert hub.weights == ["transformer/diffusion_pytorch_model.safetensors"]
    hub.fetched.clear()
    assert hub.run(*arguments, "--variant", "fp16").returncode == 0 and not hub.weights


def test_the_command_line_lets_the_hub_show_its_progress(hub: Hub) -> None:
    code = (
        "import sys, cineline.cli as cli, typer\n"
        "app = typer.Typer()\n"
        "@app.command()\n"
        "def look():\n"
        "    from huggingface_hub.utils import are_progress_bars_disabled\n"
        "    print(are_progress_bars_disabled())\n"
        "sys.argv = ['look']\n"
        "cli.run(app)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_PROGRESS_BARS"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr


def test_a_repository_that_was_not_converted_is_refused_with_the_name_to_try(hub: Hub) -> None:
    (hub.folder / "model_index.json").unlink()
    done = hub.run("generate", "a cat", "--model", HUB_ID)
    assert "has no model_index.json, as models in diffusers format do: give one that does" in done.stderr


GATED = {"X-Error-Code": "GatedRepo", "X-Error-Message": f"Access to model {HUB_ID} is restricted."}


@pytest.mark.parametrize("path", ["/", f"/{HUB_ID}/resolve/"], ids=["all", "files alone"])
@pytest.mark.parametrize(
    ("status", "headers"),
    [(401, GATED), (403, GATED), (401, {}), (403, {}), (401, {"X-Error-Code": "RepoNotFound"})],
    ids=["gated 401", "gated 403", "401", "403", "private"],
)
def test_a_repository_that_is_locked_says_how_to_get_in(
    path: str, status: int, headers: dict[str, str], hub: Hub
) -> None:
    hub.locked = path, status, headers
    done = hub.run("plan", "--model", HUB_ID, "--devices", "2xL40S", "--requests", "1")
    (told,) = (line for line in done.stderr.splitlines() if line and not line.startswith("Fetching"))
    assert done.returncode == 1
    assert told == (
        f"cineline: model='{HUB_ID}' is no folder here, and the hub does not let you have it ({status}): check the "
        "name, accept the licence on the hub's page and log in with `hf auth login`, or set HF_TOKEN."
    )


def test_weights_that_are_locked_say_so_too(hub: Hub, tmp_path: Path) -> None:
    """A token may expire between the configs and the weights."""
    assert hub.run("plan", "--model", HUB_ID, "--devices", "2xL40S", "--requests", "1").returncode == 0
    hub.locked = f"/{HUB_ID}/resolve/{COMMIT}/vae/", 403, GATED
    done = hub.run("generate", "x", "--model", HUB_ID, *SMALL, "--quiet", "--output", str(tmp_path / "a.mp4"))
    assert done.returncode == 1 and "the hub does not let you have it (403)" in done.stderr
    assert not hub.weights


def test_a_full_disk_is_called_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("huggingface_hub.snapshot_download", fill)
    with pytest.raises(
        CheckpointError, match=r"cannot be downloaded \(No space left on device\): check the disk, and HF_HOME"
    ):
        folder_of(HUB_ID)
