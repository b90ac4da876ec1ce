"""Multistep consistency sampling (2303.01469, algorithm 1; latent form 2310.04378): predict x_0, then noise it again.

The re-noising draw is RLCM's action (2404.03673). The hop to s = 0 shows the predicted x_0 itself, whatever level a
table ends at, as diffusers' LCMScheduler does. Departure from Owen-Oertell/rlcm: that hop has no density here, where
the authors store the log-probability of a last draw that no reward sees.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tropism.base import Cond, Denoiser, Prediction, bcast
from tropism.transitions import Gaussian


@dataclass(frozen=True)
class Consistency:
    """x_s ~ N(alpha(s) x_0, sigma(s)^2) with the predicted x_0; exactly x_0 at s = 0."""

    def __call__(self, denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, cond: Cond) -> tuple[Gaussian, Prediction]:
        """x (B, ...), t and s (B,) with s < t -> the law of x_s and the prediction at (x, t)."""
        prediction = denoiser(x, t, cond)
        alpha = denoiser.schedule.alpha(s).where(s > 0, 1.0)
        std = denoiser.schedule.sigma(s).where(s > 0, 0.0)
        return Gaussian(bcast(alpha, x) * prediction.x0, std), prediction
