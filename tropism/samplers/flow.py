"""Steps on the straight path x_t = (1 - t) x_0 + t eps: the ODE and two SDEs. Here v = eps - x_0 and ds = s - t < 0."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tropism.base import Cond, Denoiser, Prediction, bcast
from tropism.schedules import RectifiedFlow
from tropism.transitions import Gaussian


def _flow_prediction(denoiser: Denoiser, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
    if not isinstance(denoiser.schedule, RectifiedFlow):
        name = type(denoiser.schedule).__name__
        raise TypeError(
            f"this kernel walks the path of RectifiedFlow, the denoiser has {name}; use DDIM or Consistency"
        )
    return denoiser(x, t, cond)


@dataclass(frozen=True)
class EulerODE:
    """Euler's method on the probability-flow ODE: x + v ds, no noise (diffusers' FlowMatchEulerDiscreteScheduler)."""

    def __call__(self, denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, cond: Cond) -> tuple[Gaussian, Prediction]:
        """x (B, ...), t and s (B,) with s < t -> a law without density and the prediction at (x, t)."""
        prediction = _flow_prediction(denoiser, x, t, cond)
        return Gaussian(x + bcast(s - t, x) * (prediction.eps - prediction.x0), (t - s) * 0.0), prediction


@dataclass(frozen=True)
class FlowSDE:
    """Flow-GRPO's marginal-preserving SDE (2505.05470; sd3_sde_with_logprob.py of its repository).

    mean = x (1 + g^2 ds / (2 t)) + v (1 + g^2 (1 - t) / (2 t)) ds and std = g sqrt(-ds), where
    g = noise_level sqrt(t / (1 - t)). At t = 1 the authors' code puts the second level of its grid into 1 - t. That
    level is s of the same step, so nothing needs to be remembered; the step then adds variance noise_level^2 however
    short it is. The step to s = 0 is random as well, as theirs (they only leave it out of training).

    Departures from yifan123/flow_grpo: log-probabilities are sums, theirs are means over dimensions; ``kl`` divides by
    this step's variance g^2 (-ds), theirs by g^2 alone (its issue 78), so that their KL is this one times -ds.
    """

    noise_level: float = 0.7

    def __post_init__(self) -> None:
        if self.noise_level < 0:
            raise ValueError(f"noise_level must not be negative; got {self.noise_level}")

    def __call__(self, denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, cond: Cond) -> tuple[Gaussian, Prediction]:
        """x (B, ...), t and s (B,) with s < t -> the law of x_s and the prediction at (x, t)."""
        prediction = _flow_prediction(denoiser, x, t, cond)
        ds = s - t
        g = self.noise_level * (t / (1 - t.where(t < 1, s))).sqrt()
        keep = 1 + g**2 * ds / (2 * t)
        push = (1 + g**2 * (1 - t) / (2 * t)) * ds
        mean = bcast(keep, x) * x + bcast(push, x) * (prediction.eps - prediction.x0)
        return Gaussian(mean, g * (-ds).sqrt()), prediction


@dataclass(frozen=True)
class ConstantSDE:
    """DanceGRPO's SDE with constant noise (2505.07818; flux_step of its repository).

    mean = x + v ds - eta^2 score ds / 2 with score = -(x - (1 - t) x_0) / t^2 = -eps / t, std = eta sqrt(-ds).
    The step to s = 0 goes to the predicted x_0 without noise and has no density: XueZeyue's code draws a last state,
    drops it, and decodes that x_0. Its log-probabilities are means over dimensions, these are sums.
    """

    eta: float = 0.3

    def __post_init__(self) -> None:
        if self.eta < 0:
            raise ValueError(f"eta must not be negative; got {self.eta}")

    def __call__(self, denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, cond: Cond) -> tuple[Gaussian, Prediction]:
        """x (B, ...), t and s (B,) with s < t -> the law of x_s and the prediction at (x, t)."""
        prediction = _flow_prediction(denoiser, x, t, cond)
        ds, last = s - t, s <= 0
        drift = (
            x + bcast(ds, x) * (prediction.eps - prediction.x0) + bcast(self.eta**2 * ds / (2 * t), x) * prediction.eps
        )
        std = (self.eta * (-ds).sqrt()).where(~last, 0.0)
        return Gaussian(prediction.x0.where(bcast(last, x), drift), std), prediction
