"""Check a clip against its caption: every frame as a picture of the scene, and how the object's centre moves.

A clip comes as its frames, or as a film strip of square frames, the first at the left. The object that is followed is,
in each frame, the one that fits the caption best; where a frame has none, nothing moves as the caption says.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tropism.worlds.moving.grammar import DIRECTIONS, Clip, parse
from tropism.worlds.scenes.verify import Seen, judge, look

Float = NDArray[np.float64]

TRAVEL = 3.0  # pixels a frame (of 64), the least in the direction that is claimed: half of the slowest clip
ASIDE = 0.35  # most of the way across the direction, as a share of the way along it
REST = 3.0  # pixels between the two furthest centres of an object that keeps still
JOLT = 2.0  # pixels, the most that a centre lies off an even motion: a third of a step of the slowest clip
WEIGHTS = {"frames": 6.0, "direction": 3.0, "smooth": 1.0}


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which claims of a caption hold in a clip.

    ``parts``: those of the scene, each in all frames, then "direction" (it goes where the caption says, or keeps still)
    and "smooth" (no centre is off an even motion). ``frame_rate`` is the share of frames that show the scene, ``off``
    the largest distance of a centre from an even motion in pixels (NaN where an object is missing). ``score`` in [0, 1]
    weighs the mean score of the frames 6, direction 3 and smooth 1.
    """

    score: float
    parts: dict[str, bool] = field(hash=False)
    frame_rate: float
    off: float

    @property
    def passed(self) -> bool:
        """Whether every part holds."""
        return all(self.parts.values())

    @property
    def moved(self) -> bool:
        """Whether the motion is right, whatever the object looks like."""
        return self.parts["direction"] and self.parts["smooth"]


def frames_of(strip: ArrayLike) -> NDArray[Any]:
    """The square frames (F, H, H, 3) or (F, 3, H, H) of a film strip (H, F * H, 3) or (3, H, F * H)."""
    picture = np.asarray(strip)
    first = picture.ndim == 3 and picture.shape[0] == 3
    height, width = picture.shape[1:] if first else picture.shape[:2]
    if picture.ndim != 3 or width % height or width // height < 2:
        raise ValueError(f"Got a strip of shape {picture.shape}, wanted two or more square frames side by side.")
    return np.stack(np.split(picture, width // height, axis=2 if first else 1))


def centres(seen: list[Seen], clip: Clip) -> Float:
    """(F, 2) the centre (x, y) of the object in each frame, in pixels of 64; NaN where there is none."""
    group, found = clip.scene.groups[0], []
    for each in seen:
        fits = [(o.shape == group.shape) + (o.color == group.color) for o in each.objects]
        best = each.objects[int(np.argmax(fits))] if fits else None
        found.append((np.nan, np.nan) if best is None else (best.x, best.y))
    return np.asarray(found, np.float64)


def judge_motion(places: Float, motion: str) -> tuple[bool, bool, float]:
    """(direction, smooth, largest distance from an even motion) of centres (F, 2)."""
    if not np.isfinite(places).all():
        return False, False, float("nan")
    time = np.arange(len(places)) - (len(places) - 1) / 2
    middle, slope = places.mean(0), time @ (places - places.mean(0)) / (time @ time)
    off = float(np.linalg.norm(places - middle - time[:, None] * slope, axis=1).max())
    if motion in DIRECTIONS:
        step = np.asarray(DIRECTIONS[motion])
        along, across = float(slope @ step), abs(float(slope @ step[::-1]))
        return along >= TRAVEL and across <= ASIDE * along, off <= JOLT, off
    spread = np.linalg.norm(places[:, None] - places, axis=2).max()
    return bool(spread <= REST), off <= JOLT, off


def verify(clip: ArrayLike, caption: str) -> Verdict:
    """Judge one clip: frames (F, H, W, 3) uint8 or (F, 3, H, W) in [0, 1], or a film strip of such."""
    claimed, pictures = parse(caption), np.asarray(clip)
    frames = frames_of(pictures) if pictures.ndim == 3 else pictures
    seen = [look(frame) for frame in frames]
    verdicts = [judge(each, claimed.scene) for each in seen]
    direction, smooth, off = judge_motion(centres(seen, claimed), claimed.motion)
    parts = {name: all(verdict.parts[name] for verdict in verdicts) for name in verdicts[0].parts}
    shares = {
        "frames": float(np.mean([verdict.score for verdict in verdicts])),
        "direction": float(direction),
        "smooth": float(smooth),
    }
    score = sum(WEIGHTS[name] * share for name, share in shares.items()) / sum(WEIGHTS.values())
    rate = float(np.mean([verdict.passed for verdict in verdicts]))
    return Verdict(score, {**parts, "direction": direction, "smooth": smooth}, rate, off)


def verify_batch(clips: ArrayLike, captions: Iterable[str]) -> list[Verdict]:
    """Judge film strips (N, 3, H, F * H) in [0, 1], or frames (N, F, ...), each against its own caption."""
    batch, texts = np.asarray(clips), list(captions)
    if batch.ndim not in (4, 5) or len(batch) != len(texts):
        raise ValueError(
            f"Got clips of shape {batch.shape} and {len(texts)} captions, "
            "wanted (N, 3, H, F * H) and N captions; match them."
        )
    return [verify(clip, text) for clip, text in zip(batch, texts, strict=True)]
