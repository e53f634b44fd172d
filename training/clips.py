"""Clips drawn by formula, and their captions; everything follows from the random generator that is given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.random import Generator

from training.scenes import COLOURS, Floats, Scene, all_scenes, draw, held_out_scenes

MARGIN = 0.02
"""Smallest distance of an object from the picture's edge, in sides."""

EXTENTS = {
    "circle": (1.0, 1.0, 1.0),
    "square": (math.sqrt(math.pi) / 2,) * 3,
    "triangle": tuple(math.sqrt(math.pi / (3 * math.sqrt(3))) * reach for reach in (math.sqrt(3), 2.0, 1.0)),
}
"""How far a shape of radius 1 reaches: sideways, up, down."""

COLOUR_NOISE = 0.03

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Signs of the way in x and y; other motions stay where they are."""

SYNONYMS = {
    "circle": ("circle", "circle", "disc", "ball"),
    "square": ("square", "square", "box"),
    "purple": ("purple", "purple", "violet"),
    "left": ("moving left", "moving left", "moving to the left", "going left"),
    "right": ("moving right", "moving right", "moving to the right", "going right"),
    "up": ("moving up", "moving up", "moving upwards", "rising"),
    "down": ("moving down", "moving down", "moving downwards", "falling"),
    "growing": ("growing", "growing", "getting bigger"),
    "shrinking": ("shrinking", "shrinking", "getting smaller"),
}

TEMPLATES = (
    "a {colour} {shape} {motion} on a {background} background",
    "a {colour} {shape} {motion} on a {background} background",
    "{colour} {shape} {motion}, {background} background",
    "a {colour} {shape} is {motion} over a {background} background",
    "on a {background} background, a {colour} {shape} is {motion}",
    "the {colour} {shape} {motion} in front of a {background} background",
    "a video of a {colour} {shape} {motion} on {background}",
)

UNKNOWN_WORDS = ("blurry", "quality", "nice", "cat", "street", "very", "slow", "detailed", "cinematic", "of", "and")
"""Stand for every word that says nothing of a scene: the tokenizer makes one token of all that no template has."""

EMPTY, UNRELATED, EXTRA = 0.08, 0.04, 0.10
"""Shares of captions without a word, with unknown words alone, and with an unknown word in between."""


@dataclass(frozen=True)
class Clip:
    """A scene with its figures; lengths in sides, colours 0 to 1.

    Attributes:
        scene: what it shows.
        x, y, radius: [F] of the object in each frame.
        colour, background: [3].
    """

    scene: Scene
    x: Floats
    y: Floats
    radius: Floats
    colour: Floats
    background: Floats


TRAINING_SCENES = tuple(sorted(set(all_scenes()) - set(held_out_scenes()), key=lambda scene: scene.prompt))


def draw_clip(random: Generator, frames: int, any_colour: bool = False) -> Clip:
    """A clip of a random training scene; `any_colour` paints it in colours that no word stands for."""
    return place(TRAINING_SCENES[random.integers(len(TRAINING_SCENES))], random, frames, any_colour)


def place(scene: Scene, random: Generator, frames: int, any_colour: bool = False) -> Clip:
    """Where, how large and how fast: the object stays inside the picture all the time."""
    time = np.linspace(0, 1, frames, dtype=np.float32) if frames > 1 else np.full(1, random.random(), np.float32)
    radius = np.full(frames, random.uniform(0.14, 0.19), np.float32)
    if scene.motion in ("growing", "shrinking"):
        small, large = random.uniform(0.09, 0.12), random.uniform(0.19, 0.24)
        start, end = (small, large) if scene.motion == "growing" else (large, small)
        radius = start + (end - start) * time
    sideways, up, down = (reach * float(radius.max()) + MARGIN for reach in EXTENTS[scene.shape])
    dx, dy = DIRECTIONS.get(scene.motion, (0, 0))
    x = _path(dx, sideways, 1 - sideways, time, random)
    y = _path(dy, up, 1 - down, time, random)
    return Clip(scene, x, y, radius, *(_paint(name, random, any_colour) for name in (scene.colour, scene.background)))


def _path(direction: int, low: float, high: float, time: Floats, random: Generator) -> Floats:
    """Coordinate [F] of a centre that stays between low and high and goes -1, 0 or 1 way."""
    travel = random.uniform(0.3, min(0.5, high - low)) if direction else 0.0
    start = random.uniform(low + travel * (direction < 0), high - travel * (direction > 0))
    return (start + direction * travel * time).astype(np.float32)


def _paint(name: str, random: Generator, any_colour: bool) -> Floats:
    if any_colour:
        return random.random(3, np.float32)
    noise = random.normal(0, COLOUR_NOISE, 3)
    return np.clip(np.array(COLOURS[name]) / 255 + noise, 0, 1).astype(np.float32)


def render(clip: Clip, side: int, window: tuple[int, int, int] | None = None) -> Floats:
    """Pixels [3, F, H, W] in [-1, 1]; arguments as `draw`'s."""
    places = clip.x, clip.y, clip.radius
    return draw(clip.scene.shape, places, (clip.colour, clip.background), side, window) * 2 - 1


def window_at(clip: Clip, side: int, size: int, random: Generator) -> tuple[int, int, int]:
    """A window of the picture with an edge of the object in it, most of the time."""
    frame = random.integers(len(clip.x))
    reach = float(clip.radius[frame]) + size / side / 4
    corner = []
    for centre in (clip.y[frame], clip.x[frame]):
        middle = (float(centre) + random.uniform(-reach, reach)) * side
        corner.append(int(np.clip(middle - size / 2, 0, side - size)))
    return corner[0], corner[1], size


def render_windows(clips: Sequence[Clip], side: int, size: int, random: Generator) -> torch.Tensor:
    """Pixels [B, 3, F, size, size] of a window of each clip."""
    windows = [render(clip, side, window_at(clip, side, size, random) if size < side else None) for clip in clips]
    return torch.from_numpy(np.stack(windows))


def caption(scene: Scene, random: Generator) -> str:
    """One of many ways to say what the scene shows, at times nothing or nothing to the point."""
    kind = random.random()
    if kind < EMPTY:
        return ""
    if kind < EMPTY + UNRELATED:
        return " ".join(random.choice(UNKNOWN_WORDS, random.integers(1, 16)))
    words = {
        name: str(random.choice(SYNONYMS.get(word, (word,)))) for name, word in vars(scene).items() if name != "motion"
    }
    words["motion"] = str(random.choice(SYNONYMS[scene.motion]))
    text = str(random.choice(TEMPLATES)).format(**words)
    if random.random() < EXTRA:
        parts = text.split()
        parts.insert(random.integers(len(parts) + 1), str(random.choice(UNKNOWN_WORDS[:9])))
        text = " ".join(parts)
    return text


def vocabulary() -> list[str]:
    """Every word and sign of the captions, unknown ones left out."""
    words = {"a", "the", "on", "is", ",", "."}
    for template in TEMPLATES:
        words |= {word.strip(",") for word in template.split() if not word.startswith("{")}
    for scene in all_scenes():
        for word in vars(scene).values():
            words |= {part for phrase in SYNONYMS.get(word, (word,)) for part in phrase.split()}
    return sorted(words)
