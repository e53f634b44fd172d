"""The command line with an engine that is done at once: what is printed and written, without ranks.

`python instant_line.py ARGUMENTS` is `cineline ARGUMENTS`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cineline import RequestHandle, Video, VideoRequest
from cineline.cli import main
from cineline.core.family import FamilySpec
from cineline.engine.handle import Ticket


class InstantEngine:
    """As far as `generate` uses one; the options of the command are not looked at."""

    def __init__(self, spec: FamilySpec, *_: Any, **__: Any) -> None:
        self._spec = spec
        self._submitted = 0

    def __enter__(self) -> InstantEngine:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, request: VideoRequest, outputs: Mapping[str, Path]) -> RequestHandle:
        job = self._spec.resolve(request, self._submitted)
        self._submitted += 1
        ticket = Ticket(job, outputs=outputs)
        frames = np.full((job.num_frames, job.height, job.width, 3), 90, dtype=np.uint8)
        latents: Any = None  # torch takes seconds
        ticket.future.set_result(Video(latents, frames, job.fps))
        return RequestHandle(ticket, lambda *_: False)


if __name__ == "__main__":
    vars(sys.modules["cineline.cli.generate"])["Engine"] = InstantEngine
    main()
