"""How a Wan request's steps are made: by which solver, at which noise levels, by which expert (no torch)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from cineline.core.request import MOST_STEPS, Solver, VideoRequest
from cineline.errors import InvalidRequest, shown
from cineline.families.wan.shapes import WanShapes, shift_of

CLASSES: Mapping[Solver, str] = {
    "unipc": "UniPCMultistepScheduler",
    "euler": "FlowMatchEulerDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "lcm": "FlowMatchLCMScheduler",
}
"""diffusers' schedulers by the names that a request has for them."""

SOLVERS = (*CLASSES.values(), "DPMSolverSinglestepScheduler", "DEISMultistepScheduler")
"""diffusers' schedulers with one forward a step, compared with diffusers bit for bit."""

TAKE_SIGMAS = ("UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler")

OWN_SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
"""In a scheduler's config: levels are not taken as they are given."""

LIGHTNING_STEPS = 4

Default = Callable[[str], Any]
"""A request field's value, or the model's default."""


@dataclass(frozen=True)
class Schedule:
    """A request's, with nothing left open; attributes are `WanJob`'s."""

    steps: int
    solver: Solver | None
    sigmas: tuple[float, ...] | None
    boundary_ratio: float | None
    switch_step: int | None

    @classmethod
    def of(cls, model: WanShapes, request: VideoRequest, default: Default) -> Schedule:
        """Of a request whose preset has filled in what it does.

        Raises:
            InvalidRequest: a field breaks one of the rules.
        """
        solver = default("solver")
        sigmas = _sigmas(model, request, solver, default)
        steps = default("num_inference_steps") if sigmas is None else len(sigmas)
        if not 1 <= steps <= MOST_STEPS:
            rule = "below 1: give 1 or more" if steps < 1 else f"above {MOST_STEPS}: give less"
            raise InvalidRequest(f"num_inference_steps={shown(steps)} is {rule}.")
        return cls(steps, solver, sigmas, *_switch(model, request, steps, default))


def is_given(request: VideoRequest, name: str) -> bool:
    """Whether a request has a value for the field, not only its default."""
    return name in request.model_fields_set and getattr(request, name) is not None


def with_preset(model: WanShapes, request: VideoRequest) -> VideoRequest:
    """The request with its preset's values where it has none.

    Sigmas are as even as the steps are many (1, 0.75, 0.5, 0.25 of four), and the second expert begins in the middle.
    """
    if request.preset is None:
        return request
    steps = request.num_inference_steps
    if steps is None:
        steps = LIGHTNING_STEPS if request.sigmas is None else len(request.sigmas)
    own: dict[str, Any] = {"solver": "euler", "flow_shift": 5.0, "guidance_scale": 1.0, "num_inference_steps": steps}
    if CLASSES[request.solver or "euler"] in TAKE_SIGMAS and 1 <= steps <= MOST_STEPS:
        own["sigmas"] = tuple((steps - step) / steps for step in range(steps))
    if len(model.experts) > 1 and not is_given(request, "boundary_ratio"):
        own["switch_step"] = steps // 2
    return request.model_copy(update={name: value for name, value in own.items() if not is_given(request, name)})


def solver_of(model: WanShapes, solver: Solver | None) -> tuple[str, dict[str, Any]]:
    """diffusers' class and the config to make it of: the checkpoint's own, for another class with its flow shift.

    `from_config` alone would lose that: Euler and LCM call it `shift`, the others `flow_shift`.
    """
    config, name = dict(model.scheduler), model.scheduler_class if solver is None else CLASSES[solver]
    if name == model.scheduler_class:
        return name, config
    if name.startswith("FlowMatch"):
        return name, config | {"shift": shift_of(config)}
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    return name, config | flow | {"flow_shift": shift_of(config)}


def _sigmas(
    model: WanShapes, request: VideoRequest, solver: Solver | None, default: Default
) -> tuple[float, ...] | None:
    """The request's own, or the model's where the request says nothing that they could not go with."""
    others = ("num_inference_steps", "solver")
    own = is_given(request, "sigmas")
    if not own and any(is_given(request, name) for name in others):
        return None
    sigmas: tuple[float, ...] | None = default("sigmas")
    if sigmas is None:
        return None
    falling = all(above > below for above, below in pairwise(sigmas))
    if not (sigmas and sigmas[0] <= 1 and sigmas[-1] > 0 and falling):
        raise InvalidRequest(
            f"sigmas={shown(sigmas)} do not fall from 1 at most to above 0: give noise levels such as 1,0.75,0.5,0.25."
        )
    steps = request.num_inference_steps if is_given(request, "num_inference_steps") else None
    if own and steps not in (None, len(sigmas)):
        raise InvalidRequest(
            f"sigmas={shown(sigmas)} are {len(sigmas)} steps and num_inference_steps={shown(steps)}: give a level for "
            "each step, or leave one of the two out."
        )
    _check_takes_sigmas(model, solver, sigmas)
    return sigmas


def _check_takes_sigmas(model: WanShapes, solver: Solver | None, sigmas: tuple[float, ...]) -> None:
    name, config = solver_of(model, solver)
    if own := [key for key in OWN_SIGMAS if config.get(key)]:
        raise InvalidRequest(
            f"sigmas={shown(sigmas)} cannot be given to a checkpoint whose scheduler's config has {shown(own[0])}, "
            "which makes its own: set that to false there, or leave sigmas and preset out."
        )
    if name not in TAKE_SIGMAS or not (name.startswith("FlowMatch") or config.get("use_flow_sigmas")):
        ours = f"solver={shown(solver)}" if solver else f"the checkpoint's {shown(name)}"
        raise InvalidRequest(
            f"sigmas={shown(sigmas)} cannot be given to {ours}, which makes its own: leave them out, or use the solver "
            "euler, lcm or unipc."
        )


def _switch(model: WanShapes, request: VideoRequest, steps: int, default: Default) -> tuple[float | None, int | None]:
    """Where the second expert takes over: at a noise level, or at a step."""
    boundary, switch = default("boundary_ratio"), default("switch_step")
    given = [name for name in ("boundary_ratio", "switch_step") if is_given(request, name)]
    if "switch_step" not in given and any(is_given(request, name) for name in ("num_inference_steps", "sigmas")):
        switch = None  # the model's own is a step of its own number of steps
    if boundary is not None and switch is not None and len(given) != 1:
        raise InvalidRequest(
            f"boundary_ratio={shown(boundary)} and switch_step={shown(switch)} both say where the second expert takes "
            "over: leave one out."
        )
    if given == ["boundary_ratio"] or switch is None:
        return _boundary(model, boundary), None
    if len(model.experts) == 1:
        raise InvalidRequest(_one_expert(model, "switch_step", switch))
    if not 0 <= switch <= steps:
        raise InvalidRequest(
            f"switch_step={shown(switch)} is no step of {steps}: use 0 (the second expert makes all) to {steps} (none)."
        )
    return None, switch


def _boundary(model: WanShapes, boundary: float | None) -> float | None:
    if boundary is None:
        return model.boundary_ratio
    if len(model.experts) == 1:
        raise InvalidRequest(_one_expert(model, "boundary_ratio", boundary))
    if not 0 <= boundary <= 1:
        raise InvalidRequest(f"boundary_ratio={shown(boundary)} is outside 0 to 1: use a share such as 0.875.")
    return boundary


def _one_expert(model: WanShapes, name: str, value: float) -> str:
    return f"{name}={shown(value)} needs a model with two experts, {shown(model.folder)} has one: leave it out."
