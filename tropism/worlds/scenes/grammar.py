"""The language of the scenes world: what a scene is, how it is worded, read back, sampled and altered.

A caption and a scene say exactly the same thing: ``parse(caption(scene)) == scene`` for every scene,
and ``caption(parse(text)) == text`` for every caption written with single spaces in lower case.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, NoReturn, TypeVar

import numpy as np

Split = Literal["train", "held_out", "any"]

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross", "diamond", "ring")
COLORS: tuple[str, ...] = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SIZES: tuple[str, ...] = ("small", "large")
RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")
COUNTS: tuple[int, ...] = (1, 2, 3, 4)
BACKGROUNDS: tuple[str, ...] = ("white", "black", "gray", "beige")
KINDS: tuple[str, ...] = ("single", "count", "pair")
SPLITS: tuple[str, ...] = ("train", "held_out", "any")

HELD_OUT_SHARE = 0.15
MAX_WORDS = 16

_NUMERALS: dict[str, int] = {"two": 2, "three": 3, "four": 4}
_COUNT_WORDS: dict[int, str] = {count: word for word, count in _NUMERALS.items()}
_PLURALS: dict[str, str] = {shape: shape + ("es" if shape.endswith("s") else "s") for shape in SHAPES}
_SINGULARS: dict[str, str] = {plural: shape for shape, plural in _PLURALS.items()}
_MIRRORED: dict[str, str] = {"right of": "left of", "below": "above"}
_T = TypeVar("_T")


def _require(value: object, allowed: Sequence[object], what: str) -> None:
    """Raise unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        names = ", ".join(str(item) for item in allowed)
        raise ValueError(f"Got {what} {value!r}, wanted one of: {names}; pick one of those.")


@dataclass(frozen=True, slots=True)
class Group:
    """``count`` equal objects; ``size`` None means the caption does not mention a size."""

    shape: str
    color: str
    size: str | None = None
    count: int = 1

    def __post_init__(self) -> None:
        _require(self.shape, SHAPES, "shape")
        _require(self.color, COLORS, "color")
        _require(self.size, (None, *SIZES), "size")
        _require(self.count, COUNTS, "count")


@dataclass(frozen=True, slots=True)
class Scene:
    """One group without a relation, or two different single objects with the relation of first to second."""

    groups: tuple[Group, ...]
    relation: str | None = None
    background: str = "white"

    def __post_init__(self) -> None:
        _require(len(self.groups), (1, 2), "number of groups")
        _require(self.background, BACKGROUNDS, "background")
        if len(self.groups) == 1:
            _require(self.relation, (None,), "relation of a one-group scene")
            return
        _require(self.relation, RELATIONS, "relation of a two-group scene")
        first, second = self.groups
        if first.count != 1 or second.count != 1:
            raise ValueError(f"Got counts {first.count} and {second.count} in a pair, wanted 1 and 1; use count=1.")
        if (first.shape, first.color) == (second.shape, second.color):
            raise ValueError(
                f"Got two {first.color} {_PLURALS[first.shape]} in a pair, wanted two different objects; "
                "change the shape or the color of one."
            )

    @property
    def kind(self) -> str:
        """'single', 'count' or 'pair'."""
        if len(self.groups) == 2:
            return "pair"
        return "single" if self.groups[0].count == 1 else "count"


def words() -> list[str]:
    """The whole closed vocabulary of captions, sorted."""
    found = {"a", "an", "on", "background", *_NUMERALS, *SIZES, *COLORS, *BACKGROUNDS, *SHAPES, *_SINGULARS}
    found.update(word for relation in RELATIONS for word in relation.split())
    return sorted(found)


def _article(next_word: str) -> str:
    return "an" if next_word[0] in "aeiou" else "a"


def _group_text(group: Group) -> str:
    adjectives = [group.size, group.color] if group.size else [group.color]
    if group.count == 1:
        return " ".join([_article(adjectives[0]), *adjectives, group.shape])
    return " ".join([_COUNT_WORDS[group.count], *adjectives, _PLURALS[group.shape]])


def caption(scene: Scene) -> str:
    """The one caption of a scene, lower case, at most ``MAX_WORDS`` words."""
    text = _group_text(scene.groups[0])
    if scene.relation is not None:
        text += f" {scene.relation} {_group_text(scene.groups[1])}"
    return f"{text} on {_article(scene.background)} {scene.background} background"


class _Reader:
    """A cursor over the words of one caption that raises an error naming the word it stumbles on."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.words = text.lower().split()
        self.at = 0

    def peek(self) -> str:
        return self.words[self.at] if self.at < len(self.words) else ""

    def fail(self, wanted: str) -> NoReturn:
        got = f"the word {self.peek()!r}" if self.peek() else "the end of the caption"
        raise ValueError(f"Got {got} at position {self.at + 1} of {self.text!r}, wanted {wanted}; reword the caption.")

    def take(self, allowed: Sequence[str], what: str) -> str:
        word = self.peek()
        if word not in allowed:
            self.fail(f"{what} ({', '.join(allowed)})")
        self.at += 1
        return word

    def article(self) -> None:
        """Read 'a' or 'an', whichever the word after it asks for."""
        following = self.words[self.at + 1] if self.at + 1 < len(self.words) else ""
        self.take([_article(following)] if following else ["a", "an"], f"the article before {following!r}")


def _read_group(reader: _Reader) -> Group:
    count = _NUMERALS.get(reader.peek(), 1)
    if count > 1:
        reader.at += 1
    elif reader.peek() in ("a", "an"):
        reader.article()
    else:
        reader.fail(f"'a', 'an' or a count ({', '.join(_NUMERALS)})")
    size = reader.take(SIZES, "a size") if reader.peek() in SIZES else None
    color = reader.take(COLORS, "a color" if size else f"a size ({', '.join(SIZES)}) or a color")
    noun = reader.take(SHAPES if count == 1 else tuple(_SINGULARS), "a shape" if count == 1 else "a plural shape")
    return Group(_SINGULARS.get(noun, noun), color, size, count)


def _read_relation(reader: _Reader) -> str:
    starts = {relation.split()[0]: relation for relation in RELATIONS}
    relation = starts[reader.take(tuple(starts), "'on' or a relation")]
    for word in relation.split()[1:]:
        reader.take([word], "the rest of the relation")
    return relation


def parse(text: str) -> Scene:
    """Read a caption back into its scene; ValueError names the word that could not be understood."""
    reader = _Reader(text)
    groups, relation = (_read_group(reader),), None
    if reader.peek() != "on":
        relation = _read_relation(reader)
        groups = (*groups, _read_group(reader))  # type: ignore[assignment]
    reader.take(["on"], "the start of the background")
    reader.article()
    background = reader.take(BACKGROUNDS, "a background")
    reader.take(["background"], "the last word")
    if reader.peek():
        reader.fail("the end of the caption")
    return Scene(groups, relation, background)


def _combination(scene: Scene) -> str:
    """What the split is decided on; a pair and its mirrored wording ('A left of B', 'B right of A') share it."""
    first = scene.groups[0]
    if scene.relation is None:
        return f"{first.shape} {first.color} {first.count}"
    second, relation = scene.groups[1], scene.relation
    if relation in _MIRRORED:
        first, second, relation = second, first, _MIRRORED[relation]
    return f"{first.shape} {first.color} {relation} {second.shape} {second.color}"


@cache
def _held_out(combination: str) -> bool:
    digest = hashlib.sha256(f"scenes/1887 {combination}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2.0**64


def split_of(scene: Scene) -> Literal["train", "held_out"]:
    """The split a scene belongs to; sizes and background play no part in it."""
    return "held_out" if _held_out(_combination(scene)) else "train"


def _pick(rng: np.random.Generator, items: Sequence[_T]) -> _T:
    return items[int(rng.integers(len(items)))]


def _draw_group(rng: np.random.Generator, count: int) -> Group:
    size = _pick(rng, (None, *SIZES))
    return Group(_pick(rng, SHAPES), _pick(rng, COLORS), size, count)


def _draw(rng: np.random.Generator, kind: str) -> Scene:
    """A scene of the kind from no particular split; pairs are redrawn until their two objects differ."""
    background = _pick(rng, BACKGROUNDS)
    if kind != "pair":
        count = 1 if kind == "single" else _pick(rng, COUNTS[1:])
        return Scene((_draw_group(rng, count),), None, background)
    first = second = _draw_group(rng, 1)
    while (first.shape, first.color) == (second.shape, second.color):
        second = _draw_group(rng, 1)
    return Scene((first, second), _pick(rng, RELATIONS), background)


def sample_scene(rng: np.random.Generator, split: Split = "train", kind: str | None = None) -> Scene:
    """Draw one scene of a split; ``kind`` None draws the kind too, each of ``KINDS`` equally often."""
    _require(split, SPLITS, "split")
    _require(kind, (None, *KINDS), "kind")
    chosen = kind or _pick(rng, KINDS)
    while True:
        scene = _draw(rng, chosen)
        if split == "any" or split_of(scene) == split:
            return scene


def captions(n: int, seed: int, split: Split = "train", kinds: Sequence[str] = KINDS) -> list[str]:
    """``n`` distinct captions of a split, each kind equally likely; ValueError when there are not that many."""
    if n < 0 or not kinds:
        raise ValueError(f"Got n={n} and kinds={tuple(kinds)}, wanted n >= 0 and at least one kind; change them.")
    rng = np.random.default_rng(seed)
    found: dict[str, None] = {}
    idle = 0
    while len(found) < n:
        before = len(found)
        found.setdefault(caption(sample_scene(rng, split, _pick(rng, tuple(kinds)))))
        idle = idle + 1 if len(found) == before else 0
        if idle > 20_000:
            raise ValueError(
                f"Got n={n}, wanted at most about {len(found)}: split {split!r} has no more distinct captions "
                f"of kinds {', '.join(kinds)}; ask for fewer."
            )
    return list(found)


def _other(rng: np.random.Generator, items: Sequence[_T], current: _T) -> _T:
    return _pick(rng, [item for item in items if item != current])


def attributes(scene: Scene) -> list[str]:
    """The attributes of a scene that ``alter`` can change, e.g. ['shape', 'color', 'count', 'background']."""
    names = ["shape", "color", "background"]
    names.append("count" if scene.relation is None else "relation")
    if any(group.size for group in scene.groups):
        names.append("size")
    return names


def _alter_group(group: Group, name: str, rng: np.random.Generator) -> Group:
    if name == "shape":
        return replace(group, shape=_other(rng, SHAPES, group.shape))
    if name == "color":
        return replace(group, color=_other(rng, COLORS, group.color))
    if name == "count":
        return replace(group, count=_other(rng, COUNTS, group.count))
    return replace(group, size=_other(rng, SIZES, group.size))


def alter(scene: Scene, rng: np.random.Generator, attribute: str | None = None) -> Scene:
    """A scene that differs in exactly one attribute, drawn from ``attributes(scene)`` when not given."""
    if attribute is not None:
        _require(attribute, attributes(scene), "attribute")
    name = attribute or _pick(rng, attributes(scene))
    if name == "background":
        return replace(scene, background=_other(rng, BACKGROUNDS, scene.background))
    if name == "relation":
        return replace(scene, relation=_other(rng, RELATIONS, scene.relation))
    eligible = [i for i, group in enumerate(scene.groups) if name != "size" or group.size]
    at = _pick(rng, eligible)
    while True:
        groups = list(scene.groups)
        groups[at] = _alter_group(groups[at], name, rng)
        if len({(group.shape, group.color) for group in groups}) == len(groups):
            return replace(scene, groups=tuple(groups))
