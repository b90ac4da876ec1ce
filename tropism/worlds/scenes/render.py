"""Draw a scene as a picture: flat colours, anti-aliased edges, random but repeatable placement.

Lengths below are in pixels of a 64 x 64 picture and are scaled for other sizes. Pictures are RGB.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from .grammar import Scene, caption

Image = NDArray[np.uint8]

COLOR_RGB: dict[str, tuple[int, int, int]] = {
    "red": (215, 25, 35),
    "orange": (255, 130, 0),
    "yellow": (255, 225, 0),
    "green": (25, 155, 60),
    "cyan": (0, 205, 225),
    "blue": (30, 65, 230),
    "purple": (125, 35, 185),
    "pink": (255, 120, 195),
}
BACKGROUND_RGB: dict[str, tuple[int, int, int]] = {
    "white": (246, 246, 246),
    "black": (12, 12, 12),
    "gray": (122, 122, 122),
    "beige": (220, 202, 168),
}
RADII: dict[str | None, tuple[float, float]] = {"small": (6.7, 7.3), None: (8.5, 9.7), "large": (11.0, 11.8)}

FRAME = 64.0
GAP = 3.0
MARGIN = 1.0
MAX_TURN = math.radians(8.0)
REACH = 1.1  # no shape extends further than REACH * radius from its centre
OFF_AXIS = 0.4  # in a pair, the other axis differs by at most this share of the related axis
_SUPER = 8
_SHIFT = 4


@dataclass(frozen=True, slots=True)
class Placed:
    """One object in the picture: centre (x, y) and radius in 64-pixel units, rotation in radians."""

    shape: str
    color: str
    x: float
    y: float
    radius: float
    turn: float


def _circle(radius: float) -> NDArray[np.float64]:
    angle = np.linspace(0.0, 2.0 * np.pi, 64, endpoint=False)
    return radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _spokes(radii: Sequence[float], count: int) -> NDArray[np.float64]:
    """``count`` corners at equal angles starting at the top, their radii cycling through ``radii``."""
    angle = 2.0 * np.pi * np.arange(count) / count - np.pi / 2.0
    radius = np.asarray([radii[i % len(radii)] for i in range(count)])
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _cross(length: float, half: float) -> NDArray[np.float64]:
    arm = [(-half, -length), (half, -length), (half, -half)]
    turns = [np.array([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]]) for a in np.arange(4) * np.pi / 2]
    return np.concatenate([np.asarray(arm) @ turn.T for turn in turns])


OUTLINES: dict[str, tuple[NDArray[np.float64], ...]] = {
    "circle": (_circle(0.95),),
    "square": (np.array([(-0.77, -0.77), (0.77, -0.77), (0.77, 0.77), (-0.77, 0.77)]),),
    "triangle": (_spokes([1.1], 3),),
    "star": (_spokes([1.1, 0.47], 10),),
    "cross": (_cross(1.0, 0.33),),
    "diamond": (np.array([(0.0, -1.1), (0.74, 0.0), (0.0, 1.1), (-0.74, 0.0)]),),
    "ring": (_circle(1.0), _circle(0.52)),
}
"""Unit-radius outlines in picture coordinates (y down), each (corners, 2); the ring's second one is its hole."""


def coverage(shape: str, radius: float, turn: float, x: float, y: float, side: int) -> NDArray[np.uint8]:
    """Share of each pixel that the shape covers, (side, side) with 0 none and 255 all; (x, y) in pixel units."""
    unit = radius * _SUPER
    cos, sin = unit * math.cos(turn), unit * math.sin(turn)
    matrix = np.array([[cos, sin], [-sin, cos]])
    offset = np.array([x * _SUPER - 0.5, y * _SUPER - 0.5])
    corners = [np.rint((outline @ matrix + offset) * (1 << _SHIFT)).astype(np.int32) for outline in OUTLINES[shape]]
    fine = np.zeros((side * _SUPER, side * _SUPER), np.uint8)
    cv2.fillPoly(fine, corners, 255, cv2.LINE_8, _SHIFT)
    coarse: NDArray[np.uint8] = cv2.resize(fine, (side, side), interpolation=cv2.INTER_AREA)  # type: ignore[assignment]
    return coarse


def _scatter(rng: random.Random, reaches: Sequence[float]) -> list[tuple[float, float]]:
    """Random centres, inside the frame and ``GAP`` apart; four tries, then jittered corners of the frame."""
    for _ in range(4):
        found: list[tuple[float, float]] = []
        for reach in reaches:
            low, high = reach + MARGIN, FRAME - reach - MARGIN
            for _ in range(12):
                x, y = rng.uniform(low, high), rng.uniform(low, high)
                if all(math.hypot(x - a, y - b) >= reach + r + GAP for (a, b), r in zip(found, reaches, strict=False)):
                    found.append((x, y))
                    break
            else:
                break
        if len(found) == len(reaches):
            return found
    return _corners(rng, max(reaches), len(reaches))


def _corners(rng: random.Random, reach: float, count: int) -> list[tuple[float, float]]:
    """Centres near ``count`` different corners of the frame, moved inwards only as far as the gaps allow."""
    low, high = reach + MARGIN, FRAME - reach - MARGIN
    free = (high - low - 2.0 * reach - GAP) / 2.0
    spots = rng.sample([(0, 0), (0, 1), (1, 0), (1, 1)], count)

    def near(far: int) -> float:
        return high - rng.uniform(0.0, free) if far else low + rng.uniform(0.0, free)

    return [(near(right), near(lower)) for right, lower in spots]


def _related(rng: random.Random, reaches: Sequence[float], relation: str) -> list[tuple[float, float]]:
    """Two centres for which the relation of the first to the second holds with a clear margin."""
    swap = relation in ("right of", "below")
    before, after = (reaches[1], reaches[0]) if swap else (reaches[0], reaches[1])
    room = FRAME - 2.0 * MARGIN - before - after
    apart = rng.uniform(before + after + GAP, min(room, 1.35 * (before + after + GAP)))
    start = rng.uniform(before + MARGIN, before + MARGIN + room - apart)
    middle = rng.uniform(before + MARGIN, FRAME - before - MARGIN)
    low = max(after + MARGIN, middle - OFF_AXIS * apart)
    high = min(FRAME - after - MARGIN, middle + OFF_AXIS * apart)
    along, across = (start, start + apart), (middle, rng.uniform(low, high))
    xs, ys = (along, across) if relation in ("left of", "right of") else (across, along)
    spots = list(zip(xs, ys, strict=True))
    return spots[::-1] if swap else spots


def place(scene: Scene, seed: int) -> list[Placed]:
    """Where the objects of a scene go for a seed, first group first."""
    rng = random.Random((zlib.crc32(caption(scene).encode()) << 64) ^ int(seed))
    groups = [group for group in scene.groups for _ in range(group.count)]
    radii = [rng.uniform(*RADII[group.size]) for group in groups]
    reaches = [REACH * radius for radius in radii]
    spots = _scatter(rng, reaches) if scene.relation is None else _related(rng, reaches, scene.relation)
    return [
        Placed(group.shape, group.color, x, y, radius, rng.uniform(-MAX_TURN, MAX_TURN))
        for group, radius, (x, y) in zip(groups, radii, spots, strict=True)
    ]


def _paint(picture: NDArray[np.float32], item: Placed, scale: float) -> None:
    """Blend one object into a (size, size, 3) picture in place."""
    size = picture.shape[0]
    reach = REACH * item.radius * scale + 1.0
    side = min(size, math.ceil(2.0 * reach) + 1)
    left = min(max(int(item.x * scale - reach), 0), size - side)
    top = min(max(int(item.y * scale - reach), 0), size - side)
    cover = coverage(item.shape, item.radius * scale, item.turn, item.x * scale - left, item.y * scale - top, side)
    alpha = cover[:, :, None] * np.float32(1.0 / 255.0)
    window = picture[top : top + side, left : left + side]
    window += alpha * (np.asarray(COLOR_RGB[item.color], np.float32) - window)


def paint(items: Sequence[Placed], background: str, size: int = 64) -> Image:
    """Draw objects, the later ones in front: (size, size, 3) uint8 RGB."""
    if size < 16:
        raise ValueError(f"Got size={size}, wanted at least 16 pixels; use a larger size.")
    picture = np.empty((size, size, 3), np.float32)
    picture[:] = BACKGROUND_RGB[background]
    for item in items:
        _paint(picture, item, size / FRAME)
    return np.rint(picture).astype(np.uint8)


def render(scene: Scene, seed: int, size: int = 64) -> Image:
    """Draw a scene: (size, size, 3) uint8 RGB, fully determined by scene, seed and size."""
    return paint(place(scene, seed), scene.background, size)


def render_batch(scenes: Sequence[Scene], seeds: Sequence[int] | NDArray[np.integer], size: int = 64) -> Image:
    """Draw many scenes: (N, size, size, 3) uint8, item i from ``scenes[i]`` and ``seeds[i]``."""
    if len(scenes) != len(seeds):
        raise ValueError(f"Got {len(scenes)} scenes and {len(seeds)} seeds, wanted as many of each; match them.")
    batch = np.empty((len(scenes), size, size, 3), np.uint8)
    for i, (scene, seed) in enumerate(zip(scenes, seeds, strict=True)):
        batch[i] = render(scene, int(seed), size)
    return batch
