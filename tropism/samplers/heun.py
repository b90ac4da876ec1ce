"""Heun's method on the probability-flow ODE: second order, two calls a move (2206.00364, algorithm 1, no churn).

On a straight path it averages the velocities eps - x0 at both ends, as diffusers' FlowMatchHeunDiscreteScheduler. On
any other it averages eps, which is dx/dl for x / alpha along the level l = sigma / alpha, as HeunDiscreteScheduler.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tropism.base import Cond, Denoiser, Prediction, bcast
from tropism.schedules import RectifiedFlow
from tropism.transitions import Gaussian


@dataclass(frozen=True)
class Heun:
    """The last move, to a level of 0, is Euler's, and so is one from a pure noise without signal."""

    def __call__(self, denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, cond: Cond) -> tuple[Gaussian, Prediction]:
        """x (B, ...), t and s (B,) with s < t -> a law without density and the prediction at (x, t)."""
        schedule, first = denoiser.schedule, denoiser(x, t, cond)
        alpha, sigma = bcast(schedule.alpha(s), x), bcast(schedule.sigma(s), x)
        euler = alpha * first.x0 + sigma * first.eps
        if bool((sigma == 0).all()):
            return Gaussian(euler, s * 0.0), first
        second = denoiser(euler, s, cond)
        if isinstance(schedule, RectifiedFlow):
            velocity = (first.eps - first.x0 + second.eps - second.x0) / 2
            better, known = x + bcast(s - t, x) * velocity, sigma > 0
        else:
            start, noise = bcast(schedule.alpha(t), x), bcast(schedule.sigma(t), x)
            eps, known = (first.eps + second.eps) / 2, (sigma > 0) & (start > 0)
            better = alpha * (x - noise * eps) / start.where(start > 0, 1.0) + sigma * eps
        return Gaussian(better.where(known, euler), s * 0.0), first
