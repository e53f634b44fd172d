"""The training loop that every stage shares: Muon and AdamW, averaged weights, resumable."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

Part = nn.Module | Optimizer | LambdaLR

SAVE_EVERY_S = 120.0
REPORT_EVERY_S = 20.0
WARM_UP_STEPS = 50
LAST_RATE = 0.02


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a stage trains.

    Attributes:
        steps: of the optimizers.
        matrices: learning rate of the matrices (Muon, scaled to AdamW's size of step).
        rest: learning rate of everything else (AdamW).
        beta: AdamW's second one.
        flat: share of the steps before the cosine sets in.
        average: decay of the averaged weights, which are the stage's result.
    """

    steps: int
    matrices: float
    rest: float = 1e-3
    beta: float = 0.97
    flat: float = 0.4
    average: float = 0.995


class MatrixView:
    """Muon on weights of any shape: torch's takes matrices only, so it gets views [out, rest] of them."""

    def __init__(self, weights: list[nn.Parameter], rate: float) -> None:
        self.weights = weights
        self.views = [nn.Parameter(weight.detach().view(weight.shape[0], -1)) for weight in weights]
        self.optimizer = Muon(self.views, lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")

    def lend_gradients(self) -> None:
        """Let the views have the weights' gradients."""
        for view, weight in zip(self.views, self.weights, strict=True):
            view.grad = None if weight.grad is None else weight.grad.view(view.shape)


def device() -> torch.device:
    """The accelerator, where there is one."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def fit(
    module: nn.Module,
    schedule: Schedule,
    loss: Callable[[int], Tensor],
    checkpoint: Path,
    is_matrix: Callable[[str], bool],
) -> dict[str, Tensor]:
    """Train `module` in place, from `checkpoint` if there is one; returns the averaged weights.

    Args:
        module: on its device.
        schedule: how long and how fast.
        loss: of step i; its random numbers must follow from i alone, so that a resumed run sees the same.
        checkpoint: file that holds everything, written every two minutes and at the end.
        is_matrix: whether a parameter of this name (and two or more dimensions) is Muon's.
    """
    named = [(name, weight) for name, weight in module.named_parameters() if weight.requires_grad]
    matrices = [weight for name, weight in named if weight.ndim > 1 and is_matrix(name)]
    taken = {id(weight) for weight in matrices}
    muon = MatrixView(matrices, schedule.matrices)
    adamw = AdamW(
        [weight for _, weight in named if id(weight) not in taken],
        lr=schedule.rest,
        betas=(0.9, schedule.beta),
        weight_decay=0.0,
    )
    optimizers: list[Optimizer] = [muon.optimizer, adamw]
    rates = [LambdaLR(optimizer, lambda step: _rate(step, schedule)) for optimizer in optimizers]
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(schedule.average))  # type: ignore[no-untyped-call]
    parts: dict[str, Part] = {"module": module, "average": average, "muon": muon.optimizer, "adamw": adamw}
    parts |= {f"rate{number}": rate for number, rate in enumerate(rates)}
    step = _load(checkpoint, parts)
    report = Report(checkpoint.stem, step, schedule.steps)
    saved = time.monotonic()
    while step < schedule.steps:
        value = loss(step)
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_([weight for _, weight in named], 1.0)
        muon.lend_gradients()
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.step()
            rate.step()
        module.zero_grad(set_to_none=True)
        average.update_parameters(module)
        step += 1
        report.add(step, float(value.detach()))
        if time.monotonic() - saved > SAVE_EVERY_S or step == schedule.steps:
            state = {name: part.state_dict() for name, part in parts.items()}
            write_whole(checkpoint, state | {"step": step})
            saved = time.monotonic()
    return dict(average.module.state_dict())


def _rate(step: int, schedule: Schedule) -> float:
    if step < WARM_UP_STEPS:
        return (step + 1) / WARM_UP_STEPS
    done = max(0.0, (step / schedule.steps - schedule.flat) / (1 - schedule.flat))
    return LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * min(1.0, done))) / 2


def _load(checkpoint: Path, parts: dict[str, Part]) -> int:
    """Fill the parts from the file; returns the steps that are done."""
    if not checkpoint.exists():
        return 0
    state = torch.load(checkpoint, map_location=device())
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return int(state["step"])


def write_whole(file: Path, content: object) -> None:
    """Save under a temporary name first, so that an interruption leaves what was there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".part")
    torch.save(content, unfinished)
    unfinished.rename(file)


class Report:
    """A line of progress now and then: the mean loss since the last one, and the time to go."""

    def __init__(self, name: str, step: int, steps: int) -> None:
        self._name = name
        self._steps = steps
        self._since = time.monotonic()
        self._step = step
        self._losses: list[float] = []

    def add(self, step: int, loss: float | None = None) -> None:
        """Note that a step is done, and its loss; prints when it is time, and for the last step."""
        self._losses += [] if loss is None else [loss]
        passed = time.monotonic() - self._since
        if passed < REPORT_EVERY_S and step < self._steps:
            return
        each = passed / (step - self._step)
        mean = f"loss {statistics.fmean(self._losses):.4f}, " if self._losses else ""
        to_go = f"{each * (self._steps - step) / 60:.0f} min to go"
        print(f"{self._name} {step}/{self._steps}: {mean}{each * 1e3:.0f} ms each, {to_go}", flush=True)
        self._since, self._step, self._losses = time.monotonic(), step, []
