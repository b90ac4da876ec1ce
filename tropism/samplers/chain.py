"""The one loop: a kernel walked along a time grid. A generator, so that whoever consumes it decides what to keep."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tropism.base import Cond, Denoiser, Kernel, Prediction, Transition
from tropism.randomness import Randomness


class Move(NamedTuple):
    """One step of a chain; log-probabilities come from ``transition.log_prob(x_next)``."""

    x: Tensor  # (B, ...) float32
    t: Tensor  # (B,) float32
    s: Tensor  # (B,) float32, s < t
    transition: Transition  # the law of the next state
    prediction: Prediction  # what the denoiser believed at (x, t)
    x_next: Tensor  # (B, ...) the draw


class Walk(Protocol):
    """A way to walk a grid: ``walk`` itself, or one that does more on the way."""

    def __call__(
        self, kernel: Kernel, denoiser: Denoiser, x: Tensor, ts: Tensor, cond: Cond, generator: Randomness = None
    ) -> Iterator[Move]: ...


def walk(
    kernel: Kernel,
    denoiser: Denoiser,
    x: Tensor,
    ts: Tensor,
    cond: Cond,
    generator: Randomness = None,
) -> Iterator[Move]:
    """Moves from x at ts[0] to ts[-1]: x (B, ...), ts (K + 1,) strictly decreasing in [0, 1], cond rows (B, ...).

    Gradients are kept or not by the caller's own context. Nothing is validated before the first ``next``: raises
    ValueError then when ts is not a grid.
    """
    check_grid(ts)
    x, ts = x.float(), ts.to(x.device, torch.float32)
    for now, after in itertools.pairwise(ts):
        t, s = now.expand(x.shape[0]), after.expand(x.shape[0])
        transition, prediction = kernel(denoiser, x, t, s, cond)
        x_next = transition.sample(generator)
        yield Move(x, t, s, transition, prediction, x_next)
        x = x_next


def check_grid(ts: Tensor) -> None:
    """Raises ValueError unless ts is (K + 1,) strictly decreasing in [0, 1]."""
    if ts.ndim != 1 or ts.numel() < 2 or not bool((ts[1:] < ts[:-1]).all()) or ts[0] > 1 or ts[-1] < 0:
        raise ValueError(f"ts must be (K + 1,) strictly decreasing in [0, 1]; got {tuple(ts.shape)}: {ts.tolist()}")
