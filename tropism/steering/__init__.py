"""Steering: a reward decides while a model draws, and nothing is trained. One steerer a file, found by its name.

``Settings`` of a file are a *guide* (``guide(task)``: what goes around the denoiser) or a *search* (``draw(task)``: how
the chains of a prompt are run), or both halves of one method. See ``task``.
"""

from tropism.guidance import ROW
from tropism.steering.task import (
    Guiding,
    Plain,
    Scorer,
    Search,
    Steered,
    Task,
    Trace,
    check_steerers,
    image_seeds,
    steer_policy,
)

__all__ = [
    "ROW",
    "Guiding",
    "Plain",
    "Scorer",
    "Search",
    "Steered",
    "Task",
    "Trace",
    "check_steerers",
    "image_seeds",
    "steer_policy",
]
