"""`python soak.py COUNT`: so many small requests through an engine whose stages sleep, every tenth one cancelled.

Prints, for each of twenty parts of them, the memory (bytes that are a process's own) and descriptors of the engine's
process and of each rank, as JSON.
"""

from __future__ import annotations

import gc
import json
import sys
from collections import deque
from contextlib import suppress

import psutil

from cineline import Engine, ParallelConfig, RequestCancelled, RequestHandle, VideoRequest
from cineline.bench.sleeping import SleepingSpec

PARTS = 20
UNDERWAY = 20
LIMIT_S = 60.0


def main(count: int) -> None:
    found = []
    with Engine(SleepingSpec(2, 1e-4, 1024), ParallelConfig(pp=2), device="cpu") as engine:
        own = psutil.Process()
        processes = [own, *own.children(recursive=True)]
        handles: deque[RequestHandle] = deque()
        for number in range(count):
            steps, scale = 1 + number % 3, 1.0 + number % 2
            fields = {"num_inference_steps": steps, "guidance_scale": scale, "decode": False, "seed": number}
            handles.append(engine.submit(VideoRequest(prompt=f"request {number}", **fields)))
            if number % 10 == 9:
                handles[-1].cancel()
            if len(handles) > UNDERWAY:
                end(handles.popleft())
            if (number + 1) % (count // PARTS) == 0:
                gc.collect()
                found.append([(process.memory_full_info().uss, process.num_fds()) for process in processes])
        while handles:
            end(handles.popleft())
    print(json.dumps(found))


def end(handle: RequestHandle) -> None:
    with suppress(RequestCancelled):
        handle.result(LIMIT_S)


if __name__ == "__main__":
    main(int(sys.argv[1]))
