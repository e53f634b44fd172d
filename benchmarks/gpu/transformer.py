"""One expert at its true size: a forward of diffusers' model, and of one stage and of each of four after another."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

from benchmarks.gpu.clock import forget, peak_gb, timed
from benchmarks.gpu.random_wan import RandomSpec, RandomStages, RandomWeights, random_spec
from cineline.core.config import DeviceConfig, ParallelConfig, Place
from cineline.core.hardware import Device
from cineline.core.request import Branch, Kind, VideoRequest, WorkItem
from cineline.families.pipeline_parallel import StagePart
from cineline.families.wan.costs.line import PlannedLine
from cineline.families.wan.costs.model import ModelCosts
from cineline.families.wan.denoise import make_solver
from cineline.families.wan.job import WanJob
from cineline.planning.cut import default_cut
from cineline.planning.hardware import LINKS, device_named

SIZES = {"ti2v-5b": (704, 1280, 121), "t2v-a14b": (480, 832, 81)}
SMALL_SIZES = {"ti2v-5b": (64, 96, 9), "t2v-a14b": (32, 48, 9)}
STEPS = 4
ITEM = WorkItem(Kind.DENOISE, 0, 0, Branch.COND)


def measure(model: str, device: torch.device) -> Iterator[dict[str, Any]]:
    """Rows: seconds of a forward, peak memory, whether the prediction has diffusers' bits, the planner's figures."""
    small = device.type == "cpu"
    height, width, frames = (SMALL_SIZES if small else SIZES)[model]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        spec = random_spec(model, Path(folder), small)
        request = VideoRequest(
            prompt="a video", height=height, width=width, num_frames=frames, num_inference_steps=STEPS
        )
        job = spec.resolve(request, 0)
        config = DeviceConfig(device.type, "float32" if small else "bfloat16")
        theirs, row = _diffusers(spec, job, config, device)
        yield row
        for stages in (1, 4):
            yield from _stages(spec, job, config, device, stages, theirs)


def _embedding(spec: RandomSpec, config: DeviceConfig, device: torch.device) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(1)
    shape = (1, 512, int(spec.text["d_model"]))
    return torch.randn(shape, generator=generator).to(device, getattr(torch, config.dtype))


def _latents(spec: RandomSpec, job: WanJob, device: torch.device) -> torch.Tensor:
    """As `WanStages.admit` draws them."""
    return torch.randn(spec.latent_shape(job), generator=torch.Generator("cpu").manual_seed(job.seed)).to(device)


def _diffusers(
    spec: RandomSpec, job: WanJob, config: DeviceConfig, device: torch.device
) -> tuple[torch.Tensor, dict[str, Any]]:
    forget(device)
    dtype = getattr(torch, config.dtype)
    with torch.device("meta"):
        model = WanTransformer3DModel.from_config(spec.transformer)
    del model.rope
    RandomWeights(spec.component("transformer")).load(model, dtype, device, fp32=model._keep_in_fp32_modules)
    rope = spec.transformer["attention_head_dim"], spec.patch, spec.transformer["rope_max_seq_len"]
    model.rope = WanRotaryPosEmbed(*rope).to(device)
    latents, text = _latents(spec, job, device), _embedding(spec, config, device)
    time = make_solver(spec.scheduler_class, spec.scheduler, job, device).timesteps[0]
    if spec.kind == "ti2v":
        mask = torch.ones(latents.shape, device=device)
        timestep = (mask[0][0][:, ::2, ::2] * time).flatten().unsqueeze(0)
    else:
        timestep = time.expand(1)
    predictions: list[torch.Tensor] = []

    def forward() -> None:
        predictions[:] = model(
            hidden_states=latents.to(dtype), timestep=timestep, encoder_hidden_states=text, return_dict=False
        )

    seconds = timed(forward, device)
    return predictions[0].cpu(), {"arm": "diffusers, transformer alone", "seconds": seconds, "peak_gb": peak_gb(device)}


def _stages(
    spec: RandomSpec, job: WanJob, config: DeviceConfig, device: torch.device, count: int, theirs: torch.Tensor
) -> Iterator[dict[str, Any]]:
    costs = ModelCosts.of(spec, config.dtype, config.vae_dtype)
    parallel = default_cut(costs, spec.place(ParallelConfig(pp=count)))
    cuts = spec.cut(parallel, config)
    card = None if device.type == "cpu" else _card(device)
    planned = card and PlannedLine(spec, costs, parallel, (card,) * count, LINKS["pcie4"], job)
    handed: tuple[torch.Tensor, ...] = ()
    conditioning: tuple[torch.Tensor, ...] = ()
    for stage in range(count):
        forget(device)
        place = Place(pp=stage)
        family = RandomStages(spec)
        read = family.load(StagePart(place, parallel, cuts[stage], device, config))
        state = family.admit(job, None)
        if stage == 0:
            state.texts = dict.fromkeys((Branch.COND, Branch.UNCOND), _embedding(spec, config, device))
            family.compute(state, WorkItem(Kind.ENCODE, 0), True, True)
            conditioning = state.conditioning
        state.conditioning = conditioning
        hidden, starts, ends = handed, stage == 0, stage == count - 1

        def forward(family: Any = family, state: Any = state, given: Any = (hidden, starts, ends)) -> None:
            state.hidden, *where = given
            family.compute(state, ITEM, *where)

        seconds = timed(forward, device)
        handed = state.hidden
        row = {
            "arm": f"stage {stage + 1} of {count}",
            "seconds": seconds,
            "peak_gb": peak_gb(device),
            "weights_gb": round(read / 1e9, 3),
        }
        if planned and card:
            row["planned_seconds"] = planned.denoise_s(stage, 0, job)
            row["planned_peak_gb"] = round((planned.peak_bytes(place, 1) - card.reserved) / 1e9, 3)
        if ends:
            prediction = state.predictions[Branch.COND].cpu()
            row["equal"] = torch.equal(prediction, theirs)
            row["deviation"] = float((prediction.float() - theirs.float()).abs().max())
        yield row
        del family, state, forward


def _card(device: torch.device) -> Device | None:
    properties = torch.cuda.get_device_properties(device)
    try:
        return device_named(properties.name, float(properties.total_memory))
    except Exception:
        return None
