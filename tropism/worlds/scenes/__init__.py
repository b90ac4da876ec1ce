"""The scenes world: captions of simple shapes, pictures drawn from them, and a checker for both."""

from .grammar import (
    BACKGROUNDS,
    COLORS,
    COUNTS,
    KINDS,
    RELATIONS,
    SHAPES,
    SIZES,
    Group,
    Scene,
    alter,
    caption,
    captions,
    parse,
    sample_scene,
    split_of,
    words,
)
from .render import render, render_batch
from .verify import Verdict, verify, verify_batch

__all__ = [
    "BACKGROUNDS",
    "COLORS",
    "COUNTS",
    "KINDS",
    "RELATIONS",
    "SHAPES",
    "SIZES",
    "Group",
    "Scene",
    "Verdict",
    "alter",
    "caption",
    "captions",
    "parse",
    "render",
    "render_batch",
    "sample_scene",
    "split_of",
    "verify",
    "verify_batch",
    "words",
]
