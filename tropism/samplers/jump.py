"""Jumps along the path, by a model that is told where to: CTM (2310.02279), MeanFlow (2505.13447), shortcut models
(2410.12557).

With x0 and eps as the model believes when it is told (t, s), x_s = alpha(s) x0 + sigma(s) eps. On a straight path that
is x - (t - s) u; on any path it is DDIM's deterministic step, from which it differs by what the network is told.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from tropism.base import Cond, Denoiser, Prediction, bcast
from tropism.denoisers import towards
from tropism.schedules import scaled_level
from tropism.transitions import Gaussian


@dataclass(frozen=True)
class Jump:
    """One jump from t to s, of which ``gamma`` is noise (CTM's gamma-sampling, 2310.02279, algorithm 3).

    The model jumps to the time whose level sigma / alpha is sqrt(1 - gamma^2) that of s, and noise brings the state to
    s. 0 is without noise; at 1 the model says x0, which is noised again: multistep consistency sampling. The step to
    s = 0 shows x0 itself, whatever level a table ends at. Departure from sony/ctm: levels fall to 0, theirs to 0.002.
    """

    gamma: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma must lie in [0, 1]; got {self.gamma}")

    def __call__(self, denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, cond: Cond) -> tuple[Gaussian, Prediction]:
        """x (B, ...), t and s (B,) with s < t -> the law of x_s and the prediction at (x, t), told where to."""
        schedule, kept = denoiser.schedule, math.sqrt(1 - self.gamma**2)
        prediction = denoiser(x, t, towards(denoiser, cond, scaled_level(schedule, s, kept)))
        alpha, sigma = schedule.alpha(s).where(s > 0, 1.0), schedule.sigma(s).where(s > 0, 0.0)
        mean = bcast(alpha, x) * prediction.x0 + bcast(kept * sigma, x) * prediction.eps
        return Gaussian(mean, self.gamma * sigma), prediction
