"""Rewards of unfinished samples: of the predicted clean one, of several draws, or learned (2501.06848).

Each is a function (score, seen) -> (N,). It never changes what is sampled, only how well; see ``fk.fk_steer``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tropism.base import Cond, bcast
from tropism.particles.walking import Score, Seen
from tropism.randomness import normal
from tropism.samplers.chain import walk

Intermediate = Callable[[Score, Seen], Tensor]
"""intermediate(score, seen (N rows)) -> (N,); NaN = no score."""
Draw = Callable[[Seen], Tensor]
"""draw(seen (N rows)) -> clean latents (N, ...)."""


def predicted(score: Score, seen: Seen) -> Tensor:
    """The reward of the predicted clean sample: no network call of its own."""
    return score(seen.prediction.x0, seen.rows)


@dataclass(frozen=True)
class Sampled:
    """log mean exp(scale r) / scale over ``count`` clean samples drawn from p(x_0 | x_t), of those that have a score.

    With the scale of the steering this is the value that makes the potentials optimal as ``count`` grows. Departure
    from 2501.06848's code, which has scale 1 inside and multiplies outside.
    """

    draw: Draw
    count: int = 4
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.count < 1 or self.scale == 0:
            raise ValueError(f"wanted count >= 1 and a scale other than 0; got {self.count} and {self.scale}")

    def __call__(self, score: Score, seen: Seen) -> Tensor:
        """(N,)."""
        values = torch.stack([score(self.draw(seen), seen.rows).double() for _ in range(self.count)])
        there = ~values.isnan()
        logs = (self.scale * values).where(there, -torch.inf).logsumexp(0)
        return ((logs - there.sum(0).log()) / self.scale).where(there.any(0), math.nan)


def around(std: float) -> Draw:
    """Draws N(x0, v) around the prediction, v = std^2 sigma^2 / (alpha^2 std^2 + sigma^2): right for Gaussian data of
    this standard deviation, and a guess for others."""

    def draw(seen: Seen) -> Tensor:
        schedule = seen.walk.denoiser.schedule
        alpha, sigma = schedule.alpha(seen.t), schedule.sigma(seen.t)
        spread = std * sigma / ((alpha * std) ** 2 + sigma**2).sqrt()
        noise = normal(seen.x.shape, seen.generators, seen.x.device)
        return seen.prediction.x0 + bcast(spread, seen.x) * noise

    return draw


def by_chain(steps: int) -> Draw:
    """Draws by ``steps`` moves of the kernel on even times to the end of the grid: as many network calls each."""

    def draw(seen: Seen) -> Tensor:
        ts = torch.linspace(float(seen.t[0]), float(seen.walk.ts[-1]), steps + 1)
        *_, last = walk(seen.walk.kernel, seen.walk.denoiser, seen.x, ts, seen.cond, seen.generators)
        return last.x_next

    return draw


def learned(value: Callable[[Tensor, Tensor, Cond], Tensor]) -> Intermediate:
    """A value network value(x (N, ...), t (N,), cond) -> (N,), which asks the reward for nothing on the way."""
    return lambda score, seen: value(seen.x, seen.t, seen.cond)
