"""What a video of a scene shows: colours by the nearest palette entry, motion by the centroid, shape by templates.

Strict where a broken video could pass: an object must be there nearly all the time, move steadily and in one way.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.scenes import COLOURS, SHAPES, Floats, Motion, Scene, Shape, distance

Mask = NDArray[np.bool_]

LEAST_CONTRAST = 40.0
"""Distance in RGB (0 to 255) from the background below which nothing is an object."""

LEAST_AREA = 0.005
"""Share of a frame's pixels below which there is no object in it."""

LEAST_PRESENCE = 0.8
"""Share of the frames in which an object must be."""

LEAST_OVERLAP = 0.7
"""Mean overlap (intersection over union) with its template below which an object has no shape: blobs, or several."""

FULL_TRAVEL = 0.3
"""Way of a moving object in sides, and what counts as as much growth: the logarithm of the radius' ratio."""
FULL_GROWTH = 0.5

LEAST_MOTION = 0.5
"""Share of the full travel or growth below which an object stands still."""

LEAST_LEAD = 1.5
"""How much stronger than any other change the motion must be."""

LEAST_STEADINESS = 0.7
"""Share of the track that leads the right way."""

LONGEST_STEP = 0.4
"""Share of the motion that may happen between two frames: more is a jump."""


@dataclass(frozen=True)
class Verdict:
    """What was seen; None where nothing could be made out."""

    colour: str | None
    shape: Shape | None
    motion: Motion | None
    background: str

    def matches(self, scene: Scene) -> dict[str, bool]:
        """For each property of the scene, whether it was seen."""
        return {name: getattr(self, name) == wanted for name, wanted in vars(scene).items()}


def judge(frames: NDArray[np.uint8]) -> Verdict:
    """Look at a video [F, H, W, 3]."""
    pixels = frames.astype(np.float32)
    background = np.median(pixels.reshape(-1, 3), axis=0)
    contrast = np.linalg.norm(pixels - background, axis=-1)  # [F, H, W]
    strongest = float(np.quantile(contrast, 0.98))
    ground = _nearest(background)
    if strongest < LEAST_CONTRAST:
        return Verdict(None, None, None, ground)
    masks: Mask = contrast > strongest / 2
    present = masks.mean(axis=(1, 2)) > LEAST_AREA
    colour = _nearest(np.median(pixels[contrast > 0.8 * strongest], axis=0))
    if present.mean() < LEAST_PRESENCE:
        return Verdict(colour, None, None, ground)
    return Verdict(colour, _shape(masks[present]), _motion(masks[present]), ground)


def _nearest(colour: Floats) -> str:
    return min(COLOURS, key=lambda name: float(np.linalg.norm(colour - np.array(COLOURS[name]))))


def _grid(mask: Mask) -> tuple[Floats, Floats]:
    """x [1, W] and y [H, 1] of a frame's pixels, in sides."""
    height, width = mask.shape
    x = (np.arange(width, dtype=np.float32) + 0.5) / height
    y = (np.arange(height, dtype=np.float32) + 0.5) / height
    return x[None, :], y[:, None]


def _place(mask: Mask) -> tuple[float, float, float]:
    """Centre of mass and radius of the circle of the same area, in sides."""
    x, y = _grid(mask)
    area = mask.sum()
    radius = float(np.sqrt(area / np.pi)) / mask.shape[0]
    return float((mask * x).sum() / area), float((mask * y).sum() / area), radius


def _shape(masks: Mask) -> Shape | None:
    """The shape whose template, at the object's place and of its area, overlaps best over all frames."""
    overlap = dict.fromkeys(SHAPES, 0.0)
    for mask in masks:
        x, y = _grid(mask)
        centre_x, centre_y, radius = _place(mask)
        for shape in SHAPES:
            template = distance(shape, x - centre_x, y - centre_y, radius) < 0
            overlap[shape] += float((mask & template).sum() / (mask | template).sum())
    best = max(SHAPES, key=lambda shape: overlap[shape])
    return best if overlap[best] / len(masks) > LEAST_OVERLAP else None


def _motion(masks: Mask) -> Motion | None:
    """The one strong and steady change between the first frames and the last ones."""
    places = np.array([_place(mask) for mask in masks])
    track = np.stack([places[:, 0] / FULL_TRAVEL, places[:, 1] / FULL_TRAVEL, np.log(places[:, 2]) / FULL_GROWTH], 1)
    some = max(1, len(track) // 6)
    total = track[-some:].mean(axis=0) - track[:some].mean(axis=0)
    order = np.argsort(-np.abs(total))
    axis, second = int(order[0]), int(order[1])
    change, steps = float(total[axis]), np.diff(track[:, axis])
    if abs(change) < max(LEAST_MOTION, LEAST_LEAD * abs(float(total[second]))):
        return None
    right_way = np.clip(steps * np.sign(change), 0, None)
    if right_way.sum() < LEAST_STEADINESS * np.abs(steps).sum() or right_way.max() > LONGEST_STEP * abs(change):
        return None
    ways: tuple[tuple[Motion, Motion], ...] = (("left", "right"), ("up", "down"), ("shrinking", "growing"))
    return ways[axis][int(change > 0)]
