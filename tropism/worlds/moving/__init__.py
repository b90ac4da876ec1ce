"""The world of moving scenes: captions of one object and its motion, clips drawn from them, and a checker for both."""

from .grammar import DIRECTIONS, MOTIONS, STILL, Clip, alter, caption, captions, parse, sample_clip, words
from .render import FRAMES, path, render, render_batch, strip
from .verify import Verdict, frames_of, verify, verify_batch

__all__ = [
    "DIRECTIONS",
    "FRAMES",
    "MOTIONS",
    "STILL",
    "Clip",
    "Verdict",
    "alter",
    "caption",
    "captions",
    "frames_of",
    "parse",
    "path",
    "render",
    "render_batch",
    "sample_clip",
    "strip",
    "verify",
    "verify_batch",
    "words",
]
