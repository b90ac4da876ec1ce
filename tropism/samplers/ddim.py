"""DDIM: Denoising Diffusion Implicit Models (2010.02502, eq. 12 and 16), DDPM's ancestral step at eta = 1.

Written for any alpha and sigma, with the variance of x_t given x_s, sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2, in the
place of 1 - A_t / A_s: the two agree where alpha^2 + sigma^2 = 1. Departures from diffusers' DDIMScheduler: none on the
same levels (see ``schedules.table_grid`` for which level it steps to). Where the next level has sigma = 0 (s = 0 of a
table that ends clean) the step is deterministic and has no density; kvablack/ddpo-pytorch never steps to that level.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tropism.base import Cond, Denoiser, Prediction, bcast
from tropism.transitions import Gaussian


@dataclass(frozen=True)
class DDIM:
    """eta in [0, 1]: 0 is the deterministic solver, 1 the ancestral step."""

    eta: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in [0, 1]; got {self.eta}; to add more noise use widen(DDIM(1.0), factor)")

    def __call__(self, denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, cond: Cond) -> tuple[Gaussian, Prediction]:
        """x (B, ...), t and s (B,) with s < t -> the law of x_s and the prediction at (x, t)."""
        prediction = denoiser(x, t, cond)
        schedule = denoiser.schedule
        alpha_t, sigma_t, alpha_s, sigma_s = schedule.alpha(t), schedule.sigma(t), schedule.alpha(s), schedule.sigma(s)
        added = (sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2).clamp(min=0).sqrt()
        std = self.eta * added * sigma_s / sigma_t.where(sigma_t > 0, 1.0)
        direction = (sigma_s**2 - std**2).clamp(min=0).sqrt()
        return Gaussian(bcast(alpha_s, x) * prediction.x0 + bcast(direction, x) * prediction.eps, std), prediction
