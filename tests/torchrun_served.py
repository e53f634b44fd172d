"""`cineline serve` under torchrun; rank 0 asks itself for a video, writes it to a file, and ends the service.

Arguments: the file, then those of serve.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import httpx
from served import LIMIT_S, create, wait_done, wait_ready

from cineline.cli import main

PORT = 8765


def ask(path: Path) -> None:
    try:
        with httpx.Client(
            base_url=f"http://127.0.0.1:{PORT}", timeout=LIMIT_S, transport=httpx.HTTPTransport(retries=20)
        ) as client:
            wait_ready(client)
            job = create(client, seed=5)["id"]
            assert wait_done(client, job)["status"] == "completed"
            path.write_bytes(client.get(f"/v1/videos/{job}/content").content)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    target, sys.argv[1:] = Path(sys.argv[1]), ["serve", *sys.argv[2:], "--port", str(PORT)]
    if os.environ["RANK"] == "0":
        threading.Thread(target=ask, args=(target,), daemon=True).start()
    main()
