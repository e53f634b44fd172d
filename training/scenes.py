"""What the mini models were taught to draw: one object of a colour and a shape, moving over a background.

Geometry is in sides: 1 is the picture's side, (0, 0) its upper left corner.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Shape = Literal["circle", "square", "triangle"]
Motion = Literal["left", "right", "up", "down", "growing", "shrinking"]

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 70, 210),
    "yellow": (240, 220, 50),
    "purple": (140, 50, 170),
    "orange": (245, 140, 30),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
"""RGB, 0 to 255."""

SHAPES: tuple[Shape, ...] = ("circle", "square", "triangle")
MOTIONS: tuple[Motion, ...] = ("left", "right", "up", "down", "growing", "shrinking")

HELD_OUT = 128
HELD_OUT_SEED = 22


Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Scene:
    """What a clip shows, in words."""

    colour: str
    shape: Shape
    motion: Motion
    background: str

    @property
    def prompt(self) -> str:
        """The scene as a sentence."""
        moving = self.motion if self.motion in ("growing", "shrinking") else f"moving {self.motion}"
        return f"a {self.colour} {self.shape} {moving} on a {self.background} background"


def all_scenes() -> list[Scene]:
    """Every scene whose object differs in colour from its background."""
    combinations = itertools.product(COLOURS, SHAPES, MOTIONS, COLOURS)
    return [Scene(*combination) for combination in combinations if combination[0] != combination[3]]


def held_out_scenes() -> list[Scene]:
    """The scenes that training never draws, in an order that mixes everything."""
    return random.Random(HELD_OUT_SEED).sample(all_scenes(), HELD_OUT)


def distance(shape: Shape, x: Floats, y: Floats, radius: Floats | float) -> Floats:
    """Signed distance to the shape's edge, negative inside; all shapes of one radius have one area.

    Exact for the circle, for the others the distance to the nearest side's line.

    Args:
        x, y: seen from the object's centre of mass; y grows downwards.
        radius: of the circle of the same area.
    """
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - radius * np.float32(math.sqrt(math.pi) / 2)
    inner = radius * np.float32(math.sqrt(math.pi / (3 * math.sqrt(3))))  # of the circle inside the triangle
    return np.maximum(y, np.abs(x) * np.float32(math.sqrt(3) / 2) - y / 2) - inner


def draw(
    shape: Shape,
    places: tuple[Floats, Floats, Floats],
    colours: tuple[Floats, Floats],
    side: int,
    window: tuple[int, int, int] | None = None,
) -> Floats:
    """Pixels [3, F, H, W], 0 to 1, of a shape with smooth edges.

    Args:
        places: x, y and radius of the shape in each frame, [F] each.
        colours: of the shape and of the background, [3] each, 0 to 1.
        side: of the whole picture, in pixels.
        window: first row, first column and side of the part to draw; all of it if None.
    """
    row, column, size = window or (0, 0, side)
    centre_x, centre_y, radius = (place.astype(np.float32)[:, None, None] for place in places)
    pixels = (np.arange(size, dtype=np.float32) + 0.5) / side
    x, y = pixels[None, None, :] + column / side, pixels[None, :, None] + row / side
    edge = distance(shape, x - centre_x, y - centre_y, radius)
    cover = np.clip(0.5 - edge * side, 0, 1)[None]
    inside, outside = (colour.astype(np.float32)[:, None, None, None] for colour in colours)
    drawn: Floats = outside + (inside - outside) * cover
    return drawn


def first_frame(scene: Scene, side: int) -> NDArray[np.uint8]:
    """RGB [H, W, 3] of the scene before anything moves, for image to video.

    Nothing in it tells the motion: the object is in the middle, and of one size.
    """
    places = np.array([[0.5], [0.52], [0.15]], np.float32)
    colours = np.array([COLOURS[scene.colour], COLOURS[scene.background]], np.float32) / 255
    pixels = draw(scene.shape, (places[0], places[1], places[2]), (colours[0], colours[1]), side)
    return np.round(pixels[:, 0].transpose(1, 2, 0) * 255).astype(np.uint8)
