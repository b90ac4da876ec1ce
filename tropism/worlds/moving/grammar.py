"""The language of moving scenes: the caption of a scene with one object, then how that object moves.

"a red circle on a white background, moving leftward". The clause comes last so that a causal text encoder reads the
scene exactly as it does without it; its words are in no caption of a scene. ``parse(caption(clip)) == clip``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tropism.worlds.scenes import grammar as scenes
from tropism.worlds.scenes.grammar import Scene, Split

STILL = "still"
DIRECTIONS: dict[str, tuple[int, int]] = {
    "leftward": (-1, 0),
    "rightward": (1, 0),
    "upward": (0, -1),
    "downward": (0, 1),
}
"""The step of each direction in picture coordinates (x to the right, y down)."""
MOTIONS: tuple[str, ...] = (*DIRECTIONS, STILL)
_CLAUSES: dict[str, str] = {**{name: f"moving {name}" for name in DIRECTIONS}, STILL: "keeping still"}
_MOTION_OF: dict[str, str] = {clause: motion for motion, clause in _CLAUSES.items()}


@dataclass(frozen=True, slots=True)
class Clip:
    """A scene with one object, and its motion: one of ``MOTIONS``."""

    scene: Scene
    motion: str

    def __post_init__(self) -> None:
        if self.scene.kind != "single":
            raise ValueError(f"Got a scene of kind {self.scene.kind!r}, wanted 'single'; only one object can move.")
        if self.motion not in MOTIONS:
            raise ValueError(f"Got motion {self.motion!r}, wanted one of: {', '.join(MOTIONS)}; pick one of those.")


def words() -> list[str]:
    """What captions of clips are made of besides the words of scenes: the comma, and the words of the clauses."""
    return [",", *sorted({word for clause in _CLAUSES.values() for word in clause.split()})]


def caption(clip: Clip) -> str:
    """The one caption of a clip, lower case."""
    return f"{scenes.caption(clip.scene)}, {_CLAUSES[clip.motion]}"


def parse(text: str) -> Clip:
    """Read a caption back into its clip; ValueError names what could not be understood."""
    scene, comma, clause = text.lower().partition(",")
    said = " ".join(clause.split())
    if not comma or said not in _MOTION_OF:
        wanted = ", ".join(repr(known) for known in _MOTION_OF)
        raise ValueError(f"Got {said!r} after the comma of {text!r}, wanted one of: {wanted}; reword the caption.")
    return Clip(scenes.parse(scene), _MOTION_OF[said])


def sample_clip(rng: np.random.Generator, split: Split = "train", motion: str | None = None) -> Clip:
    """Draw one clip whose scene is of a split; ``motion`` None draws it too, each equally often."""
    drawn = MOTIONS[int(rng.integers(len(MOTIONS)))] if motion is None else motion
    return Clip(scenes.sample_scene(rng, split, "single"), drawn)


def captions(n: int, seed: int, split: Split = "train", motions: Sequence[str] = MOTIONS) -> list[str]:
    """``n`` distinct captions of a split, the motions in turn; ValueError when there are not that many."""
    if n < 0 or not motions:
        raise ValueError(f"Got n={n} and motions={tuple(motions)}, wanted n >= 0 and at least one motion; change them.")
    rng, found, idle = np.random.default_rng(seed), dict[str, None](), 0
    while len(found) < n and idle <= 20_000:
        before = len(found)
        found.setdefault(caption(sample_clip(rng, split, motions[before % len(motions)])))
        idle = idle + 1 if len(found) == before else 0
    if len(found) < n:
        raise ValueError(f"Got n={n}, wanted at most about {len(found)}: split {split!r} has no more; ask for fewer.")
    return list(found)


def alter(clip: Clip, rng: np.random.Generator, attribute: str | None = None) -> Clip:
    """A clip that differs in one attribute: of its scene but for the number of objects, or 'motion'; drawn if none."""
    names = [name for name in scenes.attributes(clip.scene) if name != "count"] + ["motion"]
    name = names[int(rng.integers(len(names)))] if attribute is None else attribute
    if name not in names:
        raise ValueError(f"Got attribute {name!r}, wanted one of: {', '.join(names)}; pick one of those.")
    if name != "motion":
        return replace(clip, scene=scenes.alter(clip.scene, rng, name))
    others = [motion for motion in MOTIONS if motion != clip.motion]
    return replace(clip, motion=others[int(rng.integers(len(others)))])
