"""Training-free guidance by a reward's gradient (TFG: Ye et al. 2024, 2409.15761), with its special cases as settings.

What is drawn is to follow p(x0) exp(value(x0)). The belief of that law at (x, t) is

    x0 + Cov[x0 | x] grad value  to first order, and exactly where value is linear and the posterior Gaussian,

and Cov[x0 | x] = sigma^2 / alpha times the Jacobian of x0 in x. ``rho`` follows it through the denoiser, one pass
back: x0 += rho sigma^2 / alpha grad_x L(x0(x)) (TFG's variance guidance). ``mu`` takes the covariance to be that of
data of variance 1, v = sigma^2 / (alpha^2 + sigma^2), and needs no pass back: x0 += mu v grad L(x0), ``iterations``
times (mean guidance). So 1 is the strength of the law, of either. L is the value, or with ``noise`` the log of the mean
of exp(value) at x0 + ``spread`` sqrt(v) noise (LGD-MC). The noise half follows x0, so that x = alpha x0 + sigma eps
holds, or with ``keep_noise`` stays the network's.

    DPS (2209.14687)      rho, keep_noise               MPGD (2311.16424)      mu, keep_noise
    LGD-MC (2023)         rho, keep_noise, noise        UGD (2302.07121)       rho and mu, iterations, recurrence
    FreeDoM (2303.09833)  rho, keep_noise, recurrence   TFG                    all of it, keep_noise, recurrence

Recurrence goes back up the path and is a matter of the walk: ``samplers.recurrent_walk``.

Departures: strengths are in these units and independent of the grid, where the papers' step sizes are tuned for each;
``through(schedule, rho_t)`` and ``beside(schedule, mu_t)`` give TFG's own, with which a move of DDIM is its algorithm 1
to rounding. LGD's noise is given, not drawn at every call, so that the guide is a function.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tropism.base import Cond, Denoiser, Prediction, Schedule, bcast
from tropism.denoisers import consistent
from tropism.guidance.cfg import ROW, Scale

Value = Callable[[Tensor, Tensor], Tensor]
"""value(x0 (N, ...), rows (N,) int64) -> (N,) nats, with its graph; NaN is no score. Rows are cond[ROW], or the place
in the batch where there is none."""


def window(strength: float, low: float, high: float) -> Scale:
    """The strength for low <= t <= high, 0 elsewhere. ValueError unless 0 <= low < high <= 1."""
    if not 0 <= low < high <= 1:
        raise ValueError(f"wanted 0 <= low < high <= 1; got {low} and {high}")
    return lambda t, cond: torch.full_like(t, strength).where((t >= low) & (t <= high), 0.0)


def through(schedule: Schedule, rho: float | Scale) -> Scale:
    """TFG's rho_t as ``rho`` of ``RewardGuided``: rho_t / sigma^2."""
    return lambda t, cond: _at(rho, t, cond) / schedule.sigma(t).clamp(min=1e-6) ** 2


def beside(schedule: Schedule, mu: float | Scale) -> Scale:
    """TFG's mu_t as ``mu`` of ``RewardGuided``: mu_t / v."""
    return lambda t, cond: _at(mu, t, cond) / data_variance(schedule, t).clamp(min=1e-12)


def data_variance(schedule: Schedule, t: Tensor) -> Tensor:
    """(B,) of x0 given x, for data of variance 1: sigma^2 / (alpha^2 + sigma^2)."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    return sigma**2 / (alpha**2 + sigma**2)


@dataclass(frozen=True, eq=False)
class RewardGuided:
    """A denoiser whose belief is tilted towards exp(value). Strengths are numbers or ``Scale``s.

    ``noise`` (M, ...) standard normal, what x0 is moved by in each of M samples. ``limit`` bounds how far x0 is moved
    in all, as the root mean square over a row's entries. The gradient is taken whatever the caller's context; the
    answer is detached unless ``keep_graph``, which differentiates the guidance as well. Where all strengths are 0 the
    value is not asked for. Rows without a score are not guided.

    Raises ValueError for settings out of range, TypeError where the value, or for ``rho`` the network, has no graph.
    """

    inner: Denoiser
    value: Value
    rho: float | Scale = 1.0
    mu: float | Scale = 0.0
    iterations: int = 1
    spread: float = 1.0
    noise: Tensor | None = None
    limit: float | None = None
    keep_noise: bool = False
    keep_graph: bool = False

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"iterations is {self.iterations}; wanted 1 or more")
        if not self.spread >= 0 or (self.limit is not None and not self.limit > 0):
            raise ValueError(
                f"spread is {self.spread} and limit {self.limit}; wanted 0 or more, and more than 0 or None"
            )

    @property
    def schedule(self) -> Schedule:
        """The inner denoiser's."""
        return self.inner.schedule

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        """x (B, ...), t (B,), cond rows (B, ...)."""
        rho, mu = _at(self.rho, t, cond), _at(self.mu, t, cond)
        if not bool((rho != 0).any()) and not bool((mu != 0).any()):
            return self.inner(x, t, cond)
        rows = cond.get(ROW, torch.arange(len(x), device=x.device))
        schedule, moved = self.schedule, torch.zeros_like(x, dtype=torch.float32)
        alpha, sigma = bcast(schedule.alpha(t), x), bcast(schedule.sigma(t), x)
        with torch.enable_grad():
            if bool((rho != 0).any()):
                x = x if self.keep_graph and x.requires_grad else x.detach().requires_grad_()
                said = self.inner(x, t, cond)
                slope = self._slope(said.x0, x, t, rows, "the network, or the value,")
                moved = moved + (bcast(rho, x) * sigma**2 / alpha.where(alpha > 0, 1.0) * slope).where(alpha > 0, 0.0)
            else:
                said = self.inner(x, t, cond)
            if bool((mu != 0).any()):
                moved = moved + self._beside(said.x0, mu, t, rows)
        moved = self._bounded(moved)
        found = Prediction(said.x0 + moved, said.eps)
        if not self.keep_noise:
            found = consistent(found.x0, x.float(), alpha, sigma)
        return found if self.keep_graph else Prediction(found.x0.detach(), found.eps.detach())

    def _beside(self, x0: Tensor, mu: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        """How far x0 (B, ...) goes by itself in all iterations."""
        start = x0 if self.keep_graph else x0.detach()
        size, place = bcast(mu * data_variance(self.schedule, t), x0), start
        for _ in range(self.iterations):
            place = place if place.requires_grad else place.requires_grad_()
            place = place + size * self._slope(place, place, t, rows, "the value")
            place = place if self.keep_graph else place.detach()
        return place - start

    def _slope(self, x0: Tensor, of: Tensor, t: Tensor, rows: Tensor, who: str) -> Tensor:
        """Gradient of L(x0) in ``of`` (B, ...); 0 for rows without a score."""
        if self.noise is None:
            score = self.value(x0, rows)
        else:
            step = bcast(self.spread * data_variance(self.schedule, t).sqrt(), x0)
            many = [x0 + step * each for each in self.noise.to(x0)]
            score = self.value(torch.cat(many), rows.repeat(len(many))).reshape(len(many), -1).logsumexp(0)
            score = score - math.log(len(many))
        if score.shape != (len(x0),):
            raise ValueError(f"value answered {tuple(score.shape)} for {len(x0)} rows; wanted one number a row")
        found = None
        if score.requires_grad:
            (found,) = torch.autograd.grad(score.sum(), of, create_graph=self.keep_graph, allow_unused=True)
        if found is None:
            raise TypeError(
                f"{who} has no gradient, which this guide follows; take a differentiable value (rho also needs a "
                "network that keeps its graph; mu needs none), or a search that needs values only"
            )
        return found.float().where(bcast(~score.isnan(), found), 0.0)

    def _bounded(self, moved: Tensor) -> Tensor:
        if self.limit is None:
            return moved
        size = moved.flatten(1).square().mean(1).sqrt()
        return moved * bcast((self.limit / size.clamp(min=1e-12)).clamp(max=1.0), moved)


def _at(strength: float | Scale, t: Tensor, cond: Cond) -> Tensor:
    return strength(t, cond) if callable(strength) else torch.full_like(t, strength)


def dps(inner: Denoiser, value: Value, rho: float | Scale, limit: float | None = None) -> RewardGuided:
    """DPS (2209.14687, algorithm 1); with ``samplers.recurrent_walk`` FreeDoM (2303.09833, algorithm 2)."""
    return RewardGuided(inner, value, rho, limit=limit, keep_noise=True)


def lgd_mc(
    inner: Denoiser, value: Value, rho: float | Scale, noise: Tensor, limit: float | None = None
) -> RewardGuided:
    """LGD-MC (Song et al. 2023, *Loss-Guided Diffusion Models for Plug-and-Play Controllable Generation*, eq. 8)."""
    return RewardGuided(inner, value, rho, noise=noise, limit=limit, keep_noise=True)


def mpgd(inner: Denoiser, value: Value, mu: float | Scale, limit: float | None = None) -> RewardGuided:
    """MPGD (2311.16424, algorithm 1, without its projection): no pass back through the network."""
    return RewardGuided(inner, value, 0.0, mu, limit=limit, keep_noise=True)


def ugd(
    inner: Denoiser,
    value: Value,
    rho: float | Scale,
    mu: float | Scale,
    iterations: int,
    limit: float | None = None,
) -> RewardGuided:
    """Universal guidance (2302.07121, algorithm 1): forward (rho) and backward (mu); its k is the walk's recurrence."""
    return RewardGuided(inner, value, rho, mu, iterations, limit=limit)
