"""diffusers' own pipelines in a process of their own: what the benchmarks compare with."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from cineline.config import DeviceConfig
from cineline.errors import CinelineError
from cineline.launch import start_piped
from cineline.request import VideoRequest

PASSED_ON = (
    *("prompt", "negative_prompt", "image", "height", "width", "num_frames"),
    *("num_inference_steps", "guidance_scale", "guidance_scale_2"),
)

WAIT_LIMIT_S = 3600.0


@dataclass(frozen=True)
class Reference:
    """A diffusers pipeline, loaded, at the other end of a pipe."""

    connection: Connection

    def latents(self, request: VideoRequest) -> tuple[np.ndarray, float]:
        """Final latents float32 [C, F', H', W'] of a request without open fields, and the seconds they took."""
        self.connection.send((request, "latent"))
        latents, seconds = self.answer()
        return latents, seconds

    def frames(self, request: VideoRequest) -> np.ndarray:
        """The pictures, uint8 [F, H, W, 3], made from the noise again."""
        self.connection.send((request, "pil"))
        frames: np.ndarray = self.answer()[0]
        return frames

    def answer(self) -> Any:
        """What the process says next.

        Raises:
            CinelineError: it ended, or said nothing within `WAIT_LIMIT_S`.
        """
        try:
            if self.connection.poll(WAIT_LIMIT_S):
                return self.connection.recv()
        except EOFError:
            raise CinelineError("The diffusers process ended: see its error above.") from None
        raise CinelineError(f"The diffusers process has not answered in {WAIT_LIMIT_S:.0f} s: use a smaller request.")


@contextmanager
def reference(folder: Path, config: DeviceConfig, with_image: bool = False) -> Iterator[Reference]:
    """diffusers' pipeline of a checkpoint, on the first core alone where `config` pins cores."""
    ranks = len(os.sched_getaffinity(0)) if config.pin_cores else 1
    connection, process = start_piped(__name__, config.rank_environment(ranks))
    try:
        connection.send((folder, config, with_image))
        loaded = Reference(connection)
        loaded.answer()
        yield loaded
    finally:
        connection.close()
        process.kill()
        process.wait()


def _serve(connection: Connection) -> None:
    pipeline = _load(*connection.recv())
    connection.send(None)
    while True:
        try:
            request, output_type = connection.recv()
        except EOFError:
            return
        connection.send(_generate(pipeline, request, output_type))


def _load(folder: Path, config: DeviceConfig, with_image: bool) -> Any:
    if config.pin_cores:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import torch
    from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanPipeline
    from diffusers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if config.device == "cpu":
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    vae = AutoencoderKLWan.from_pretrained(folder, subfolder="vae", dtype=getattr(torch, config.vae_dtype))
    pipeline_class = WanImageToVideoPipeline if with_image else WanPipeline
    pipeline = pipeline_class.from_pretrained(folder, vae=vae, dtype=getattr(torch, config.dtype))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(config.device)


def _generate(pipeline: Any, request: VideoRequest, output_type: str) -> tuple[np.ndarray, float]:
    import torch

    fields = {name: getattr(request, name) for name in PASSED_ON}
    given = {name: value for name, value in fields.items() if value is not None}
    started = time.monotonic()
    generator = torch.Generator("cpu").manual_seed(request.seed)
    made = pipeline(**given, generator=generator, output_type=output_type).frames[0]
    result = made.float().cpu().numpy() if output_type == "latent" else np.stack([np.asarray(frame) for frame in made])
    return result, time.monotonic() - started


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[sys.argv.index("--fd") + 1])))
