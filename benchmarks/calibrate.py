"""Rates of this machine for the planner, measured with diffusers' own modules at the shapes in question.

A product, an attention, a whole block and a whole chunk of decoding are timed; what a block takes beside its products
and attention gives the rate of element-wise operations, what a chunk takes beside those the rate of convolutions.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import psutil
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch.nn import functional as F

from cineline.bench.beside import hear, processes
from cineline.core.config import DeviceConfig
from cineline.core.hardware import Device, Rates
from cineline.core.work import Work
from cineline.families.wan.constants import TEXT_TOKENS
from cineline.families.wan.costs.seconds import TimedLine

REPEATS = 5

LEAST_SHARE = 0.02
"""Of a module's time that element-wise operations (or convolutions) take at least, however noisy the subtraction."""


def calibrate_apart(line: TimedLine, config: DeviceConfig) -> Device:
    """`calibrated` in a process like a rank's: one core and one thread where `config` pins ranks.

    Raises:
        CinelineError: it ended, or has no answer.
    """
    with processes(__name__, config.rank_environment(psutil.cpu_count() or 1)) as (connection,):
        connection.send((line, psutil.virtual_memory().total))
        device = hear(connection, "The calibration")
        assert isinstance(device, Device)
        return device


@torch.no_grad()
def calibrated(line: TimedLine, memory: float) -> Device:
    """This machine's CPU as a device, for one rank of as many threads as this process has.

    Args:
        line: model, axes and request whose shapes are measured. memory: bytes that a rank may hold.
    """
    dtype, vae_dtype = getattr(torch, line.costs.dtype), getattr(torch, line.costs.vae_dtype)
    linear, attention = _linear_rate(line, dtype), _attention_rate(line, dtype)
    moved = _moved_rate(line, dtype, linear, attention)
    convolution = _convolution_rate(line, vae_dtype, attention, moved)
    return Device("cpu", memory, measured=Rates(linear, attention, convolution, moved), reserved=0)


def _least_s(run: Callable[[], Any]) -> float:
    """The quickest of some runs: whatever else goes on makes them slower only."""
    run()
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _linear_rate(line: TimedLine, dtype: torch.dtype) -> float:
    model, tokens = line.costs.transformer, line.own_tokens(line.job)
    hidden, weight = torch.randn(tokens, model.width, dtype=dtype), torch.randn(model.ffn, model.width, dtype=dtype)
    return 2 * tokens * model.width * model.ffn / _least_s(lambda: F.linear(hidden, weight))


def _attention_rate(line: TimedLine, dtype: torch.dtype) -> float:
    model, tokens = line.costs.transformer, line.tokens(line.job)
    queries = torch.randn(1, model.heads, tokens, model.width // model.heads, dtype=dtype)
    flop = 4 * tokens * tokens * model.width
    return flop / _least_s(lambda: F.scaled_dot_product_attention(queries, queries, queries))


def _moved_rate(line: TimedLine, dtype: torch.dtype, linear: float, attention: float) -> float:
    model, tokens = line.costs.transformer, line.tokens(line.job)
    block = WanTransformerBlock(model.width, model.ffn, model.heads, cross_attn_norm=model.norm_weights).to(dtype)
    for name, weight in block.named_parameters():
        if {"scale_shift_table", "norm2"} & set(name.split(".")):
            weight.data = weight.data.float()
    hidden = torch.randn(1, tokens, model.width, dtype=dtype)
    text = torch.randn(1, TEXT_TOKENS, model.width, dtype=dtype)
    modulation = torch.randn(1, 6, model.width, dtype=dtype)
    rotary = (torch.randn(1, tokens, 1, model.width // model.heads),) * 2
    seconds = _least_s(lambda: block.eval()(hidden, text, modulation, rotary))
    work = model.block_work(tokens, line.itemsize)
    rest = seconds - work.linear / linear - work.attention / attention
    return work.moved / max(rest, LEAST_SHARE * seconds)


def _convolution_rate(line: TimedLine, dtype: torch.dtype, attention: float, moved: float) -> float:
    vae = AutoencoderKLWan.from_config(dict(line.spec.vae)).to(dtype).eval()
    _, channels, _, height, width = line.spec.latent_shape(line.job)
    latents = torch.randn(1, channels, 1, height, width, dtype=dtype)
    cache: list[Any] = [None] * vae._cached_conv_counts["decoder"]
    vae.decoder(latents, feat_cache=cache, feat_idx=[0], first_chunk=True)
    seconds = _least_s(lambda: vae.decoder(latents, feat_cache=cache, feat_idx=[0]))
    works = [unit.work(height * width, False, line.vae_itemsize) for unit in line.costs.vae.decoder]
    work = sum(works, Work())
    rest = seconds - work.attention / attention - work.moved / moved
    return work.convolution / max(rest, LEAST_SHARE * seconds)


def _serve(connection: Connection) -> None:
    line, memory = connection.recv()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    connection.send(calibrated(line, memory))


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[sys.argv.index("--fd") + 1])))
