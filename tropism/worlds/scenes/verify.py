"""Check a picture against a caption with classical vision: background, objects, then what the caption claims.

The background is the palette tone that most pixels are close to. Objects are connected regions that stand out from it.
Each region is turned into a soft mask (how far every pixel has moved from the background towards the object's own
colour), brought to a standard position and area, and compared with a bank of rendered templates.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from .grammar import BACKGROUNDS, COLORS, SHAPES, Group, Scene, parse
from .render import BACKGROUND_RGB, COLOR_RGB, MAX_TURN, OUTLINES, RADII, coverage

Float = NDArray[np.float32]

SIDE = 64  # pictures are brought to this size first
STANDS_OUT = 40.0  # RGB distance from the background at which a pixel can belong to an object
LOCAL_SHARE = 0.45  # and the share of the largest such distance nearby, which keeps blurred neighbours apart
MIN_AREA = 20  # smaller regions are decoder specks, not objects
MAX_OBJECTS = 6  # the largest ones; more than any caption claims
COLOR_TOLERANCE = 70.0  # RGB distance to the palette colour
UNEVEN = 38.0  # root-mean-square RGB deviation inside one object above which it has no single colour
MISFIT = 0.12  # squared difference to the best template over its squared norm, above which there is no shape
BACKGROUND_TOLERANCE = 40.0
BACKGROUND_SHARE = 0.3  # of the picture that must be close to the background tone
CLUTTER = 0.03  # largest share of background pixels that may stand out without being an object
SMALL_BELOW, LARGE_ABOVE = 8.4, 9.8  # radius; objects of unstated size lie between
AXIS_RATIO = 0.7  # a relation holds when the other axis differs by less than this share

_PATCH = 24
_UNIT_AREA = 0.95 * 0.95  # the patch half-width is 0.95 for a mask of area 1, enough for a star's tips

_WEIGHTS = {"shape": 2.0, "color": 2.0, "count": 2.0, "relation": 2.0, "size": 1.0, "background": 1.0}
_BG_TABLE = np.asarray([BACKGROUND_RGB[name] for name in BACKGROUNDS], np.float32)
_COLOR_TABLE = np.asarray([COLOR_RGB[name] for name in COLORS], np.float32)
_K3, _K5, _K7 = (np.ones((n, n), np.uint8) for n in (3, 5, 7))


@dataclass(frozen=True, slots=True)
class Found:
    """One object seen in a picture; shape or color is None when it is none of the known ones.

    ``x``, ``y`` and ``radius`` are in pixels of a 64 x 64 picture.
    """

    shape: str | None
    color: str | None
    x: float
    y: float
    radius: float

    @property
    def size(self) -> str | None:
        """'small', 'large', or None in between."""
        return "small" if self.radius < SMALL_BELOW else "large" if self.radius > LARGE_ABOVE else None


@dataclass(frozen=True, slots=True)
class Seen:
    """All that was seen in a picture; background is None when no known tone fills it evenly."""

    background: str | None
    objects: tuple[Found, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which claims of a caption hold in a picture.

    ``parts`` names the claims: shape, color, count, background, and when the caption makes them size and relation; a
    pair adds 'second shape', 'second color' and 'second size'. ``score`` in [0, 1] is the weighted share of the parts
    that hold: shape, color, count and relation weigh 2, size and background 1; shape, color and size of each
    object of a pair weigh half of that.
    """

    score: float
    parts: dict[str, bool] = field(hash=False)

    @property
    def passed(self) -> bool:
        """Whether every part holds."""
        return all(self.parts.values())


def _pixels(image: ArrayLike) -> Float:
    """Any accepted picture as (64, 64, 3) float32 in [0, 255]."""
    array: NDArray[Any] = np.asarray(image)
    if array.ndim == 3 and array.shape[2] != 3 and array.shape[0] == 3:
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] != 3 or min(array.shape[:2]) < 16:
        raise ValueError(
            f"Got a picture of shape {array.shape}, wanted (H, W, 3) or (3, H, W) from 16 pixels; reshape it."
        )
    if array.dtype == np.uint8:
        pixels = array.astype(np.float32)
    elif np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= -0.5 and high <= 1.5):
            raise ValueError(
                f"Got pixels from {low:.3g} to {high:.3g}, wanted floats in [0, 1]; rescale or clamp them."
            )
        pixels = np.clip(array, 0.0, 1.0).astype(np.float32) * np.float32(255.0)
    else:
        raise ValueError(f"Got pixels of type {array.dtype}, wanted uint8 or floats in [0, 1]; convert them.")
    if pixels.shape[:2] != (SIDE, SIDE):
        pixels = cv2.resize(pixels, (SIDE, SIDE), interpolation=cv2.INTER_AREA)  # type: ignore[assignment]
    return np.ascontiguousarray(pixels)


def _norm(vectors: Float) -> Float:
    """Length of the last axis."""
    return np.sqrt(np.einsum("...c,...c->...", vectors, vectors))  # type: ignore[no-any-return]


def _nearest(color: Float, table: Float, tolerance: float) -> int | None:
    """Row of ``table`` (n, 3) closest to ``color`` (3,), None when it is further than ``tolerance``."""
    gaps = _norm(table - color)
    at = int(np.argmin(gaps))
    return at if gaps[at] <= tolerance else None


def _background(pixels: Float) -> tuple[Float, str | None]:
    """The background colour (3,) and its name, None when no known tone fills enough of the picture."""
    gaps = _norm(pixels.reshape(-1, 1, 3) - _BG_TABLE)
    close = gaps < 1.5 * BACKGROUND_TOLERANCE
    at = int(np.argmax(close.sum(axis=0)))
    mine = close[:, at] & (gaps.argmin(axis=1) == at)
    if mine.mean() < BACKGROUND_SHARE:
        return np.median(pixels.reshape(-1, 3), axis=0).astype(np.float32), None
    tone = np.median(pixels.reshape(-1, 3)[mine], axis=0).astype(np.float32)
    known = _nearest(tone, _BG_TABLE, BACKGROUND_TOLERANCE)
    return tone, None if known is None else BACKGROUNDS[known]


def _normalise(mask: Float) -> tuple[Float, float, float, float]:
    """A soft mask (h, w) in [0, 1] as a flat patch of standard area, with its area and centroid (x, y)."""
    area = float(mask.sum())
    x = float(mask.sum(axis=0) @ np.arange(mask.shape[1], dtype=np.float32)) / area
    y = float(mask.sum(axis=1) @ np.arange(mask.shape[0], dtype=np.float32)) / area
    step = 2.0 * (_UNIT_AREA * area) ** 0.5 / _PATCH
    middle = (_PATCH - 1) / 2.0
    matrix = np.array([[step, 0.0, x - step * middle], [0.0, step, y - step * middle]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(mask, matrix, (_PATCH, _PATCH), flags=flags).ravel(), area, x, y  # type: ignore[return-value]


def _unit_area(shape: str) -> float:
    """Area of a shape of radius 1, holes taken out."""
    areas = [
        0.5 * abs(float(np.sum(p[:, 0] * np.roll(p[:, 1], -1) - p[:, 1] * np.roll(p[:, 0], -1))))
        for p in OUTLINES[shape]
    ]
    return areas[0] - sum(areas[1:])


_AREAS: dict[str, float] = {shape: _unit_area(shape) for shape in SHAPES}


@cache
def _bank() -> tuple[Float, Float, list[str]]:
    """Templates (T, patch), their squared norms (T,) and shapes: every shape in three sizes, turned, sharp and soft.

    A square standing on its corner is never rendered, but a picture from elsewhere may show it: it is a diamond.
    """
    rows: list[Float] = []
    names: list[str] = []
    poses = [(shape, shape, 0.0) for shape in SHAPES] + [("square", "diamond", np.pi / 4.0)]
    turns = np.linspace(-1.1 * MAX_TURN, 1.1 * MAX_TURN, 7)
    for (shape, name, pose), size, turn, blur in itertools.product(poses, RADII, turns, (0.0, 0.7, 1.2)):
        radius = sum(RADII[size]) / 2.0
        mask = coverage(shape, radius, pose + float(turn), 20.3, 19.8, 40).astype(np.float32) / np.float32(255.0)
        if blur:
            mask = cv2.GaussianBlur(mask, (0, 0), blur)  # type: ignore[assignment]
        rows.append(_normalise(mask)[0])
        names.append(name)
    bank = np.stack(rows)
    return bank, np.einsum("tp,tp->t", bank, bank), names


def _classify(patch: Float) -> tuple[str, float]:
    """The shape of the closest template and the misfit to it, 0 for a perfect one."""
    bank, norms, names = _bank()
    misfit = (norms - 2.0 * (bank @ patch) + float(patch @ patch)) / norms
    at = int(np.argmin(misfit))
    return names[at], float(misfit[at])


def _core(colors: Float, tone: Float) -> Float:
    """The own colour (3,) of an object from its pixels (n, 3): the median of those furthest from the background."""
    gaps = _norm(colors - tone)
    return np.median(colors[gaps >= np.quantile(gaps, 0.7)], axis=0).astype(np.float32)


def _measure(pixels: Float, tone: Float, region: NDArray[np.bool_], taken: NDArray[np.bool_]) -> Found | None:
    """Describe the object of one region; all arguments are windows of the picture, (h, w, 3) and (h, w).

    ``region`` are its pixels, ``taken`` those of other objects.
    """
    core = _core(pixels[region], tone)
    axis = core - tone
    share: Float = np.clip((pixels - tone) @ (axis / (axis @ axis)), 0.0, 1.0)
    share[(share < 0.12) | taken | (cv2.dilate(region.astype(np.uint8), _K5) == 0)] = 0.0
    if share.sum() < MIN_AREA:
        return None
    patch, area, x, y = _normalise(share)
    shape, misfit = _classify(patch)
    strays = (pixels - tone - share[:, :, None] * axis)[region]
    uneven = float(np.sqrt((strays * strays).sum(axis=1).mean()))
    color = _nearest(core, _COLOR_TABLE, COLOR_TOLERANCE)
    return Found(
        shape if misfit <= MISFIT else None,
        COLORS[color] if color is not None and uneven <= UNEVEN else None,
        x,
        y,
        (area / _AREAS[shape]) ** 0.5,
    )


def look(image: ArrayLike) -> Seen:
    """Describe a picture: (H, W, 3) uint8, or (H, W, 3) or (3, H, W) floats in [0, 1]."""
    pixels = _pixels(image)
    tone, background = _background(pixels)
    gaps = _norm(pixels - tone)
    mask = (gaps > STANDS_OUT) & (gaps > LOCAL_SHARE * cv2.dilate(gaps, _K7))
    total, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    order = sorted(range(1, total), key=lambda i: -int(stats[i, cv2.CC_STAT_AREA]))
    large = [i for i in order if stats[i, cv2.CC_STAT_AREA] >= MIN_AREA][:MAX_OBJECTS]
    objects = []
    for i in large:
        left, top, width, height = (int(value) for value in stats[i, :4])
        rows, cols = slice(max(top - 4, 0), top + height + 4), slice(max(left - 4, 0), left + width + 4)
        mine = labels[rows, cols]
        found = _measure(pixels[rows, cols], tone, mine == i, np.isin(mine, [j for j in large if j != i]))
        if found is not None:
            objects.append(Found(found.shape, found.color, found.x + cols.start, found.y + rows.start, found.radius))
    near = cv2.dilate(np.isin(labels, large).astype(np.uint8), _K7) > 0
    clutter = float((gaps[~near] > STANDS_OUT).mean()) if not near.all() else 1.0
    return Seen(background if clutter <= CLUTTER else None, tuple(objects))


def _claims(group: Group, found: Found) -> dict[str, bool]:
    """Which claims about one object of a group hold for an object that was seen."""
    claims = {"shape": found.shape == group.shape, "color": found.color == group.color}
    if group.size is not None:
        claims["size"] = found.size == group.size
    return claims


def _related(first: Found, second: Found, relation: str) -> bool:
    """Whether the relation of the first object to the second holds clearly."""
    along, across = second.x - first.x, second.y - first.y
    if relation in ("above", "below"):
        along, across = across, along
    if relation in ("right of", "below"):
        along = -along
    return along > 0.0 and abs(across) < AXIS_RATIO * along


def _single_parts(group: Group, objects: Sequence[Found]) -> dict[str, bool]:
    """Parts of a one-group scene, judged on the ``count`` objects that fit best."""
    fits = sorted((_claims(group, found) for found in objects), key=lambda claims: -sum(claims.values()))
    chosen = fits[: group.count]
    names = ["shape", "color"] + (["size"] if group.size else [])
    parts = {name: bool(chosen) and all(claims[name] for claims in chosen) for name in names}
    return {**parts, "count": len(objects) == group.count}


def _pair_parts(scene: Scene, objects: Sequence[Found]) -> dict[str, bool]:
    """Parts of a pair, judged on the two seen objects that fit best; missing objects fail their parts."""
    seen: list[Found | None] = [*objects, *[None] * max(0, 2 - len(objects))]
    best: dict[str, bool] = {}
    for first, second in itertools.permutations(seen, 2):
        parts: dict[str, bool] = {}
        for prefix, group, found in (("", scene.groups[0], first), ("second ", scene.groups[1], second)):
            judged = found or Found(None, None, 0.0, 0.0, (SMALL_BELOW + LARGE_ABOVE) / 2.0)
            parts.update({prefix + name: held for name, held in _claims(group, judged).items()})
        appearance = sum(parts.values())
        parts["relation"] = bool(first and second and _related(first, second, scene.relation or ""))
        if not best or (appearance, parts["relation"]) > (sum(best.values()) - best["relation"], best["relation"]):
            best = parts
    return {**best, "count": len(objects) == 2}


def judge(seen: Seen, scene: Scene) -> Verdict:
    """Compare what was seen with what a scene claims."""
    if scene.relation is None:
        parts = _single_parts(scene.groups[0], seen.objects)
    else:
        parts = _pair_parts(scene, seen.objects)
    parts["background"] = seen.background == scene.background
    half = {name for name in parts if f"second {name}" in parts or name.startswith("second ")}
    weights = {name: _WEIGHTS[name.split()[-1]] * (0.5 if name in half else 1.0) for name in parts}
    return Verdict(sum(weights[name] for name, held in parts.items() if held) / sum(weights.values()), parts)


def verify(image: ArrayLike, caption: str) -> Verdict:
    """Judge one picture: (H, W, 3) uint8, or (H, W, 3) or (3, H, W) floats in [0, 1]."""
    return judge(look(image), parse(caption))


def verify_batch(images: ArrayLike, captions: Iterable[str]) -> list[Verdict]:
    """Judge pictures (N, 3, H, W) in [0, 1] (or (N, H, W, 3) uint8), each against its own caption."""
    batch, texts = np.asarray(images), list(captions)
    if batch.ndim != 4 or len(batch) != len(texts):
        raise ValueError(
            f"Got images of shape {batch.shape} and {len(texts)} captions, "
            "wanted (N, 3, H, W) and N captions; match them."
        )
    return [verify(image, text) for image, text in zip(batch, texts, strict=True)]
