"""diffusers' own pipelines in processes of their own: what the benchmarks compare with."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

from cineline.bench.beside import WAIT_LIMIT_S, hear, processes
from cineline.core.config import DeviceConfig
from cineline.core.request import VideoRequest, drawn

PASSED_ON = (
    *("prompt", "negative_prompt", "image", "height", "width", "num_frames"),
    *("num_inference_steps", "guidance_scale", "guidance_scale_2"),
)

WHO = "The diffusers process"


@dataclass(frozen=True)
class Reference:
    """A diffusers pipeline, loaded, at the other end of one pipe (or of one for each of its ranks)."""

    connections: Sequence[Connection]

    def latents(self, request: VideoRequest) -> tuple[np.ndarray, float]:
        """Final latents float32 [C, F', H', W'] of a request without open fields, and the seconds they took."""
        latents, seconds = self._ask(request, "latent")
        return latents, seconds

    def frames(self, request: VideoRequest) -> np.ndarray:
        """The pictures, uint8 [F, H, W, 3], made from the noise again."""
        frames: np.ndarray = self._ask(request, "pil")[0]
        return frames

    def _ask(self, request: VideoRequest, output_type: str) -> Any:
        for connection in self.connections:
            connection.send((request, output_type))
        answers: dict[Any, Any] = {}
        while len(answers) < len(self.connections):  # whichever comes first: a rank may end while others wait for it
            left = [connection for connection in self.connections if connection not in answers]
            heard = wait(left, WAIT_LIMIT_S)
            first = next((connection for connection in left if connection in heard), left[0])
            answers[first] = hear(first, WHO)
        return answers[self.connections[0]]


@contextmanager
def reference(folder: Path, config: DeviceConfig, with_image: bool = False, ulysses: int = 1) -> Iterator[Reference]:
    """diffusers' pipeline of a checkpoint, a core for each rank where `config` pins cores.

    Args:
        ulysses: ranks of diffusers' own Ulysses attention.
    """
    with processes(__name__, config.rank_environment(ulysses), ulysses) as connections:
        port = None
        for rank, connection in enumerate(connections):
            connection.send((folder, config, with_image, rank, ulysses, port))
            if rank == 0 and ulysses > 1:
                port = hear(connection, WHO)
        for connection in connections:
            hear(connection, WHO)
        yield Reference(connections)


def _serve(connection: Connection) -> None:
    folder, config, with_image, rank, ranks, port = connection.recv()
    if config.pin_cores:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    pipeline = _load(folder, config, with_image)
    if ranks > 1:
        _share_tokens(pipeline, connection, rank, ranks, port)
    connection.send(None)
    while True:
        try:
            request, output_type = connection.recv()
        except EOFError:
            return
        with _cached(pipeline, folder, request):
            made = _generate(pipeline, request, output_type)
        connection.send(made)


@contextmanager
def _cached(pipeline: Any, folder: Path, request: VideoRequest) -> Iterator[None]:
    """With diffusers' MagCache, of the model's ratios, where the request has a cache; of one transformer."""
    if request.cache is None:
        yield
        return
    from diffusers import MagCacheConfig

    from cineline.families.wan.ratios import ratios_of
    from cineline.families.wan.spec import WanSpec

    steps, threshold = request.num_inference_steps, float(request.cache.removeprefix("mag:"))
    measured = list(ratios_of(WanSpec.open(folder))[0])
    config = MagCacheConfig(threshold=threshold, num_inference_steps=steps, mag_ratios=measured)
    pipeline.transformer.enable_cache(config)
    try:
        yield
    finally:
        pipeline.transformer.disable_cache()


def _load(folder: Path, config: DeviceConfig, with_image: bool) -> Any:
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


def _share_tokens(pipeline: Any, connection: Connection, rank: int, ranks: int, port: int | None) -> None:
    """diffusers' Ulysses over so many ranks."""
    import torch
    import torch.distributed as dist
    from diffusers import ContextParallelConfig

    from cineline.transport.mesh import open_store

    store = open_store(port, ranks)
    if port is None:
        connection.send(store.port)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    # Without it `enable_parallelism` divides by the number of accelerators, which is 0 on a CPU (diffusers 0.42.1).
    torch.accelerator.device_count = lambda: 1
    for transformer in filter(None, (pipeline.transformer, pipeline.transformer_2)):
        transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=ranks))


def _generate(pipeline: Any, request: VideoRequest, output_type: str) -> tuple[np.ndarray, float]:
    import torch

    fields = {name: getattr(request, name) for name in PASSED_ON}
    given = {name: value for name, value in fields.items() if value is not None}
    started = time.monotonic()
    generator = torch.Generator("cpu").manual_seed(drawn(request.seed))
    made = pipeline(**given, generator=generator, output_type=output_type).frames[0]
    result = made.float().cpu().numpy() if output_type == "latent" else np.stack([np.asarray(frame) for frame in made])
    return result, time.monotonic() - started


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[sys.argv.index("--fd") + 1])))
