"""Safe denoising (Kim et al. 2025, 2502.08011): a belief from which a negation set of data is taken out.

With the data a mixture of what is wanted and what is not, of masses P_s and P_u and noised densities q_s and q_u, the
law of total expectation gives, without any training (its theorem 3.1)

    E_safe[x0 | x] = E[x0 | x] + beta (E[x0 | x] - E_unsafe[x0 | x]),    beta = P_u q_u(x) / (P_s q_s(x)),

beta being the odds that x came from what is not wanted. ``Safe`` is that, given an estimate of both (``Odds``);
``KernelOdds`` makes one of examples: E_unsafe is their mean weighted by N(x; alpha example, variance), and beta the
ratio of the mean weights of the examples not wanted and of others that are, or without others ``scale`` times the mean
of the unnormalised weights (the paper's form, whose normaliser is unknown).

Departures from MingyuKim87/Safe_Denoiser: the formula and not x0 - scale * mean; distances are squared and those of x,
in the space and at the noise of the chain, where the code compares x0 with references that are normalised another way
by a fixed width; in logarithms, since the weights underflow; no second renoising; the noise half follows x0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tropism.base import Cond, Denoiser, Prediction, Schedule, bcast
from tropism.denoisers import consistent


class Odds(Protocol):
    """What is believed of the data that is not wanted."""

    def __call__(self, schedule: Schedule, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, ...), t (B,) -> E_unsafe[x0 | x] (B, ...), and log beta (B,)."""
        ...


@dataclass(frozen=True, eq=False)
class Safe:
    """A denoiser whose data are without what ``odds`` describes.

    beta is at most ``cap``, and 0 for times outside [low, high], where it is below ``least``, and where x0 is further
    than ``reach`` (root mean square) from E_unsafe: odds compare two densities, also where both are far away. ``bound``
    clips x0 to [-bound, bound] in rows that are moved. Raises ValueError for settings out of range.
    """

    inner: Denoiser
    odds: Odds
    cap: float = 50.0
    least: float = 0.0
    low: float = 0.0
    high: float = 1.0
    reach: float | None = None
    bound: float | None = None

    def __post_init__(self) -> None:
        if not self.cap > 0 or not self.least >= 0:
            raise ValueError(f"cap is {self.cap} and least {self.least}; wanted more than 0, and 0 or more")
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"wanted 0 <= low < high <= 1; got {self.low} and {self.high}")

    @property
    def schedule(self) -> Schedule:
        """The inner denoiser's."""
        return self.inner.schedule

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        """x (B, ...), t (B,), cond rows (B, ...)."""
        said = self.inner(x, t, cond)
        beta, unsafe = self.beta(x, t)
        if self.reach is not None:
            away = (said.x0 - unsafe).flatten(1).square().mean(1).sqrt()
            beta = beta.where(away <= self.reach, 0.0)
        moved = said.x0 + bcast(beta, x) * (said.x0 - unsafe)
        if self.bound is not None:
            moved = moved.clamp(-self.bound, self.bound)
        at = bcast(self.schedule.alpha(t), x), bcast(self.schedule.sigma(t), x)
        safe, touched = consistent(moved, x.float(), *at), bcast(beta > 0, x)
        return Prediction(safe.x0.where(touched, said.x0), safe.eps.where(touched, said.eps))

    def beta(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """beta (B,) before ``reach``, and E_unsafe[x0 | x] (B, ...)."""
        unsafe, odds = self.odds(self.schedule, x, t)
        beta = odds.clamp(max=math.log(self.cap)).exp()
        used = (t >= self.low) & (t <= self.high) & (beta >= self.least)
        return beta.where(used, 0.0), unsafe


@dataclass(frozen=True, eq=False)
class KernelOdds:
    """Odds from examples: ``unsafe`` (N, ...) of what is not wanted and ``safe`` (M, ...) of what is, clean latents.

    ``prior`` is P_u, of which 1 - P_u is left for the others. Without ``safe``, beta is ``scale`` times the mean of
    exp(-distance^2 / (2 variance)). The variance is sigma^2 + (alpha bandwidth)^2: every example stands for its
    neighbours within ``bandwidth``. Raises ValueError without examples, and for examples of another size than x.
    """

    unsafe: Tensor
    safe: Tensor | None = None
    prior: float = 0.5
    scale: float = 1.0
    bandwidth: float = 0.0

    def __post_init__(self) -> None:
        for name, examples in (("unsafe", self.unsafe), ("safe", self.safe)):
            if examples is not None and (examples.ndim < 2 or not len(examples)):
                raise ValueError(f"{name} has shape {tuple(examples.shape)}; wanted (N, ...) with 1 example or more")
        if self.safe is not None and self.safe.shape[1:] != self.unsafe.shape[1:]:
            raise ValueError(
                f"unsafe examples are {tuple(self.unsafe.shape[1:])} and safe ones {tuple(self.safe.shape[1:])}; "
                "wanted one size"
            )
        if not 0 < self.prior < 1 or not self.scale > 0 or not self.bandwidth >= 0:
            raise ValueError(
                f"prior is {self.prior}, scale {self.scale} and bandwidth {self.bandwidth}; wanted a share in (0, 1), "
                "more than 0, and 0 or more"
            )

    def __call__(self, schedule: Schedule, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """As ``Odds``. At sigma = 0 without a bandwidth nothing is near an example, or all is: beta is 0."""
        if x.shape[1:] != self.unsafe.shape[1:]:
            raise ValueError(
                f"the negation set has examples {tuple(self.unsafe.shape[1:])} and the model draws "
                f"{tuple(x.shape[1:])}; encode pictures of the model's own size with it"
            )
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        variance = sigma**2 + (alpha * self.bandwidth) ** 2
        near = self._weights(self.unsafe, x, alpha, variance)
        mean = near.softmax(1) @ self.unsafe.to(near).flatten(1)
        odds = near.logsumexp(1) - math.log(len(self.unsafe))
        if self.safe is None:
            odds = odds + math.log(self.scale)
        else:
            others = self._weights(self.safe, x, alpha, variance).logsumexp(1) - math.log(len(self.safe))
            odds = odds - others + math.log(self.prior / (1 - self.prior))
        return mean.reshape(x.shape), odds.where(variance > 0, -math.inf)

    @staticmethod
    def _weights(examples: Tensor, x: Tensor, alpha: Tensor, variance: Tensor) -> Tensor:
        """(B, N) logarithms."""
        at = bcast(alpha, x.flatten(1)) * x.new_ones((), dtype=torch.float32)
        flat, each = x.float().flatten(1), examples.to(x.device, torch.float32).flatten(1)
        square = (flat**2).sum(1, keepdim=True) - 2 * at * (flat @ each.T) + at**2 * (each**2).sum(1)
        return -square.clamp(min=0) / (2 * variance.clamp(min=1e-12)[:, None])
