"""A kernel that is random early in the chain and deterministic afterwards, where noise only spoils finished pictures.

Moves without noise have no density, so that policy gradients are taken over the early moves alone: layout is decided
there, and late moves, whose noise is small, would dominate the gradient otherwise. MixGRPO (2507.21802) moves such a
window along the chain; this is the fixed one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tropism.base import Cond, Denoiser, Kernel, Prediction, bcast
from tropism.transitions import Gaussian, as_gaussian


@dataclass(frozen=True)
class NoiseUntil:
    """``inner`` while t > ``time``, then the deterministic step to alpha_s x_0 + sigma_s eps. Made by
    ``noise_until``."""

    inner: Kernel
    time: float

    def __call__(self, denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, cond: Cond) -> tuple[Gaussian, Prediction]:
        """As the inner kernel. Raises TypeError when its law is not Gaussian."""
        law, prediction = self.inner(denoiser, x, t, s, cond)
        law = as_gaussian(law, self.inner, "lose its noise")
        alpha, sigma = denoiser.schedule.alpha(s), denoiser.schedule.sigma(s)
        quiet = bcast(alpha, x) * prediction.x0 + bcast(sigma, x) * prediction.eps
        random = t > self.time
        std = law.std.where(random if law.std.ndim == 1 else bcast(random, law.std), torch.zeros_like(law.std))
        return Gaussian(law.mean.where(bcast(random, x), quiet), std), prediction


def noise_until(kernel: Kernel, time: float) -> Kernel:
    """``kernel``, deterministic from t = ``time`` (in [0, 1]) on; 0 leaves it as it is."""
    if not (math.isfinite(time) and 0 <= time <= 1):
        raise ValueError(f"time must lie in [0, 1]; got {time}")
    return NoiseUntil(kernel, time) if time else kernel
