"""A component's weights by diffusers' names, whatever its files call them."""

from __future__ import annotations

from collections.abc import Sequence

from cineline.families.wan.recognise import look_into
from cineline.families.wan.shapes import Component
from cineline.weights.files import Weights
from cineline.weights.lora import Adapter
from cineline.weights.sources import open_source


def weights_of(component: Component, loras: Sequence[Adapter] = ()) -> Weights:
    """The tensors of a component, with what these add to them.

    Raises:
        CheckpointError: there is no such file, it is broken, or none of such a component.
    """
    if not component.is_given:
        return Weights(open_source(component.path, component.variant), loras=loras)
    found = look_into(component.path)
    return Weights(found.source, found.names, loras)
