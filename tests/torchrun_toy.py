"""`torchrun torchrun_toy.py`: a long request on a toy over all of its processes; rank 0 says what came of it."""

from __future__ import annotations

import os
import sys
import time

from faulty_family import FaultySpec

from cineline import CinelineError, Engine, ParallelConfig, VideoRequest
from cineline.core.config import DeviceConfig
from cineline.engine.hosts import serve_torchrun_rank
from cineline.engine.torchrun import torchrun_world


def main() -> int:
    world, per_host = torchrun_world()
    if int(os.environ["RANK"]):
        return serve_torchrun_rank(DeviceConfig("cpu").rank_environment(per_host))
    with Engine(FaultySpec(), ParallelConfig(pp=world), device="cpu", launcher="torchrun") as engine:
        handle = engine.submit(VideoRequest(prompt="slow", num_inference_steps=5000))
        while handle.progress[0] < 3:
            time.sleep(0.05)
        print("going", flush=True)
        try:
            handle.result(60)
        except CinelineError as error:
            print(error, flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())
