"""Draw clips: ``FRAMES`` pictures of one object that moves evenly along a straight line, or stays where it is."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tropism.worlds.moving.grammar import DIRECTIONS, Clip, caption
from tropism.worlds.scenes.render import FRAME, MARGIN, MAX_TURN, RADII, REACH, Image, Placed, paint

FRAMES = 4
SPEEDS = (6.0, 9.0)  # pixels a frame, in a 64 x 64 picture: 18 to 27 from the first frame to the last


def path(clip: Clip, seed: int, frames: int = FRAMES) -> list[Placed]:
    """Where the object is in each frame, inside the picture in all of them."""
    rng = random.Random((zlib.crc32(caption(clip).encode()) << 64) ^ int(seed))
    group, step = clip.scene.groups[0], DIRECTIONS.get(clip.motion, (0, 0))
    radius, turn, speed = rng.uniform(*RADII[group.size]), rng.uniform(-MAX_TURN, MAX_TURN), rng.uniform(*SPEEDS)
    low, high = REACH * radius + MARGIN, FRAME - REACH * radius - MARGIN
    travel = speed * (frames - 1)
    if travel > high - low:
        raise ValueError(f"Got {frames} frames, wanted fewer: the object would travel out of the picture.")
    x, y = (rng.uniform(low + max(0.0, -d * travel), high - max(0.0, d * travel)) for d in step)
    return [
        Placed(group.shape, group.color, x + step[0] * speed * f, y + step[1] * speed * f, radius, turn)
        for f in range(frames)
    ]


def render(clip: Clip, seed: int, size: int = 64, frames: int = FRAMES) -> Image:
    """Draw a clip: (frames, size, size, 3) uint8 RGB, fully determined by the arguments."""
    return np.stack([paint([item], clip.scene.background, size) for item in path(clip, seed, frames)])


def render_batch(clips: Sequence[Clip], seeds: Sequence[int] | NDArray[np.integer], size: int = 64) -> Image:
    """Draw many clips: (N, FRAMES, size, size, 3) uint8, item i from ``clips[i]`` and ``seeds[i]``."""
    if len(clips) != len(seeds):
        raise ValueError(f"Got {len(clips)} clips and {len(seeds)} seeds, wanted as many of each; match them.")
    drawn = [render(clip, int(seed), size) for clip, seed in zip(clips, seeds, strict=True)]
    return np.stack(drawn) if drawn else np.empty((0, FRAMES, size, size, 3), np.uint8)


def strip(frames: Image) -> Image:
    """Clips (N, F, H, W, 3) as film strips (N, H, F * W, 3), the first frame at the left."""
    n, f, h, w, c = frames.shape
    return frames.transpose(0, 2, 1, 3, 4).reshape(n, h, f * w, c)
