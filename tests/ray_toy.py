"""A node of a Ray cluster of two hosts (`two_hosts.sh`), each with room for one rank. The first one runs a request of
two ranks; the other one is lost on the way, and the request goes on with a node that comes in its place.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

import ray
from faulty_family import FaultySpec
from toy_family import ToySpec
from toy_reference import toy_reference

from cineline import Engine, ParallelConfig, VideoRequest

PORT = 6379
RAY = [sys.executable, "-c", "from ray.scripts.scripts import main; main()"]
ROOM = ["--num-cpus", "1", "--object-store-memory", str(80 * 2**20), "--disable-usage-stats"]

REQUEST = VideoRequest(prompt="slow", num_inference_steps=60, guidance_scale=3.0)


def start(*options: str) -> None:
    """A node of this host."""
    subprocess.run([*RAY, "start", *options, *ROOM], stdin=subprocess.DEVNULL, stdout=sys.stderr.fileno(), check=True)


def nodes() -> int:
    return sum(bool(node["Alive"]) for node in ray.nodes())  # type: ignore[no-untyped-call]


def main() -> None:
    """Either host's part."""
    host = os.environ["HOST"]
    if os.environ["NODE"] == "1":
        time.sleep(8)  # else it asks in vain, for longer
        start("--address", f"{host}:{PORT}", "--node-ip-address", "10.9.0.2", "--block")
        return
    where = ["--port", str(PORT), "--node-ip-address", host, "--temp-dir", os.environ["RAY_FOLDER"]]
    start("--head", "--include-dashboard", "false", *where)
    ray.init(f"{host}:{PORT}", log_to_driver=False)
    while nodes() < 2:
        time.sleep(0.1)
    with Engine(FaultySpec(), ParallelConfig(pp=2), device="cpu", launcher="ray") as engine:
        handle = engine.submit(REQUEST)
        while handle.progress[0] < 5:
            time.sleep(0.01)
        print("going", flush=True)
        start("--address", f"{host}:{PORT}", "--node-ip-address", host)
        made = handle.result(120)
    print("equal" if made.latents.equal(toy_reference(ToySpec(), REQUEST)[0]) else "different", handle.restarts)


main()
