"""Jumps along the path, by a model that is told where to: CTM (2310.02279), MeanFlow (2505.13447), shortcut models
(2410.12557).

With x0 and eps as the model believes when it is told (t, s), x_s = alpha(s) x0 + sigma(s) eps. On a straight path that
is x - (t - s) u; on any path it is DDIM's deterministic step, from which it differs by what the network is told.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tropism.base import Cond, Denoiser, Prediction, bcast
from tropism.denoisers import towards
from tropism.transitions import Gaussian


@dataclass(frozen=True)
class Jump:
    """One jump from t to s, without noise; exactly x_0 at s = 0, whatever level a table ends at."""

    def __call__(self, denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, cond: Cond) -> tuple[Gaussian, Prediction]:
        """x (B, ...), t and s (B,) with s < t -> a law without density and the prediction at (x, t), told s."""
        prediction = denoiser(x, t, towards(denoiser, cond, s))
        alpha = denoiser.schedule.alpha(s).where(s > 0, 1.0)
        sigma = denoiser.schedule.sigma(s).where(s > 0, 0.0)
        return Gaussian(bcast(alpha, x) * prediction.x0 + bcast(sigma, x) * prediction.eps, s * 0.0), prediction
