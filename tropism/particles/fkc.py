"""Feynman-Kac correctors: annealed, guided and multiplied models, sampled exactly from their scores.

Skreta et al.: Feynman-Kac Correctors in Diffusion: Annealing, Guidance, and Product of Experts, 2025 (2503.02819).
The target at every time is prod_i q_i^beta_i exp(b r) / Z. Mixing scores alone does not sample it; particles that carry
a weight do. In y = x / alpha, where the forward process is dy = sqrt(dL) noise with L = (sigma / alpha)^2, and with
S = sum_i beta_i s_i and R = b grad r, a step towards the data by dL has

    dy  = ((1 + zeta^2) S + zeta^2 R) dL / 2 + zeta sqrt(dL) noise
    dlw = (|S|^2 - sum_i beta_i |s_i|^2 + S . R) dL / 2 + db r

for any zeta: the paper's cases (its reward tilt, proposition 3.4, has zeta = 1) in one formula, which follows from the
Fokker-Planck equation. L runs from the first level down, so that variance-preserving, exploding and straight paths are
one case, and no divergence of f remains.

Departures from martaskrt/fkc-diffusion: increments of variance take the place of 2 t dt; a step is DDIM's with eta =
zeta, exact for a broad prior, and agrees with the above to first order; weights are neither floored nor, unless
``clamp`` is given, clamped; the second score of a product is evaluated where the first is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from tropism.base import Cond, Denoiser, bcast, take
from tropism.particles.fk import Flock
from tropism.particles.particles import Particles, ess, log_mean, unique
from tropism.particles.resampling import Resample, systematic
from tropism.particles.trace import Step, Trace
from tropism.particles.walking import Chance, Cost, Score, counted
from tropism.randomness import Randomness, normal
from tropism.samplers.chain import check_grid


@dataclass(frozen=True)
class Factor:
    """One model of the product, to a power: 1 as it is, above 1 colder, below 0 away from it. cond has B rows."""

    denoiser: Denoiser
    power: float
    cond: Cond


@dataclass(frozen=True)
class Tilt:
    """exp(scale ramp(L) reward(x / alpha)): a differentiable reward (B, ...) -> (B,), ramp(0) = 1.

    The default ramp 1 / (1 + L) keeps the tilt of noise, whose size is the root of L, within bounds.
    """

    reward: Callable[[Tensor], Tensor]
    scale: float = 1.0
    ramp: Callable[[float], float] = lambda variance: 1 / (1 + variance)


def guidance(denoiser: Denoiser, cond: Cond, null: Cond, w: float) -> tuple[Factor, Factor]:
    """q(x)^(1 - w) q(x | c)^w: what guidance with scale w is meant to sample. null has one row, cond B."""
    rows = len(next(iter(cond.values())))
    nothing = {name: value.expand(rows, *value.shape[1:]) for name, value in null.items()}
    return Factor(denoiser, 1 - w, nothing), Factor(denoiser, w, cond)


class Field(NamedTuple):
    """At y, before a step; noise halves, so that a score is -eps / level."""

    eps: Tensor  # (B, ...) sum_i beta_i eps_i
    gap: Tensor  # (B,) |sum_i beta_i eps_i|^2 - sum_i beta_i |eps_i|^2, float64
    pull: Tensor  # (B, ...) grad r without its strength; 0 without a tilt
    reward: Tensor  # (B,) r, float64


@torch.no_grad()
def fkc(
    factors: Sequence[Factor],
    x: Tensor,
    ts: Tensor,
    *,
    zeta: float = 1.0,
    data_std: float = 1.0,
    tilt: Tilt | None = None,
    clamp: float | None = None,
    window: tuple[float, float] = (0.0, 1.0),
    resample: Resample = systematic,
    ess_below: float = 0.5,
    score: Score | None = None,
    microbatch: int = 1 << 30,
    generator: Randomness = None,
) -> tuple[Particles, Trace]:
    """Particles of the product from standard normal noise x (P, K, ...), along ts (steps + 1,), decreasing to 0.

    The start is the tempered prior N(0, L / sum of powers). Resampling happens in prompts whose effective sample size
    is below ``ess_below`` * K, at times within ``window`` (low, high), and not at the last step. ``clamp`` bounds each
    increment, centred within its prompt: less variance, for a bias and an evidence that means nothing. With clamp 0 no
    weight is kept: the plain mixture of scores. ``log_evidence`` is relative to that of the start. ``score`` fills
    ``reward``. Raises ValueError for powers that do not sum to more than 0, for a first time without signal (alpha = 0,
    as t = 1 of a straight path), and for factors of different schedules.
    """
    going = _Product(factors, tilt, microbatch)
    total = sum(factor.power for factor in factors)
    _checked(factors, x, ts, total, zeta, ess_below, clamp)
    chance = Chance.of(generator, x.shape[0] * x.shape[1])
    ts = ts.to(x.device, torch.float32)
    conds = {f"{index} {name}": value for index, each in enumerate(factors) for name, value in each.cond.items()}
    flock = Flock.start(x, conds)
    flock = replace(flock, x=flock.x * float(going.level(ts[:1])) / math.sqrt(total))
    flock = flock.weighed(going.strength(ts[0]) * going.reward(flock.x)[1])
    steps = list[Step]()
    for index, (t, s) in enumerate(itertools.pairwise(ts)):
        field = going.field(flock.x, t, flock.cond)
        log_g = going.log_g(field, ts, index)
        flock = flock.weighed(_bounded(log_g, clamp, flock.log_weight.shape))
        allowed = window[0] <= float(t) <= window[1] and index + 2 < len(ts)
        due = flock.due(ess_below) & allowed
        before = flock
        flock, rows = flock.resampled(due, flock.chosen(due, resample, chance))
        there = rows.to(x.device)
        kept = field._replace(eps=field.eps[there], pull=field.pull[there])
        flock = replace(flock, x=going.moved(flock.x, kept, t, s, (zeta, data_std), chance.moves))
        reward = field.reward.reshape(due.shape[0], -1).mean(1)
        steps.append(Step(index, float(t), ess(before.log_weight), due, unique(flock.ancestor), reward))
    clean = flock.x * going.schedule.alpha(ts[-1:])
    evidence = flock.log_evidence + log_mean(flock.log_weight)
    earned, asked = _scored(score, clean, microbatch)
    found = Particles(clean.reshape(x.shape), flock.log_weight, flock.ancestor, evidence, earned.reshape(x.shape[:2]))
    return found, Trace(tuple(steps), going.cost.network_rows, asked)


def _checked(
    factors: Sequence[Factor], x: Tensor, ts: Tensor, total: float, zeta: float, ess_below: float, clamp: float | None
) -> None:
    if x.ndim < 3:
        raise ValueError(f"x has shape {tuple(x.shape)}; wanted (prompts, particles, ...)")
    if not total > 0:
        raise ValueError(f"the powers sum to {total}; wanted more than 0, or there is no law to start from")
    if any(factor.denoiser.schedule != factors[0].denoiser.schedule for factor in factors):
        raise ValueError("the factors have different schedules; wanted one, so that all speak of the same level")
    check_grid(ts)
    if float(factors[0].denoiser.schedule.alpha(ts[:1])) <= 0:
        raise ValueError(f"there is no signal at t = {float(ts[0])} (alpha = 0); begin a little later, as at 0.99")
    if zeta < 0 or not 0 < ess_below <= 1 or (clamp is not None and clamp < 0):
        raise ValueError(f"wanted zeta >= 0, ess_below in (0, 1], clamp >= 0; got {zeta}, {ess_below} and {clamp}")


class _Product:
    """The factors, counted, and what they say together."""

    def __init__(self, factors: Sequence[Factor], tilt: Tilt | None, microbatch: int) -> None:
        if not factors:
            raise ValueError("no factors; wanted one or more")
        self.cost, self.tilt, self.microbatch = Cost(), tilt, microbatch
        self.schedule = factors[0].denoiser.schedule
        self._parts = [(counted(factor.denoiser, self.cost), factor.power, list(factor.cond)) for factor in factors]

    def level(self, t: Tensor) -> Tensor:
        """sigma / alpha, of (1,) or (B,) times."""
        return self.schedule.sigma(t) / self.schedule.alpha(t)

    def strength(self, t: Tensor) -> float:
        """Of the tilt at t ()."""
        return 0.0 if self.tilt is None else self.tilt.scale * self.tilt.ramp(float(self.level(t[None])) ** 2)

    def field(self, y: Tensor, t: Tensor, cond: Cond) -> Field:
        """y (B, ...), t (); by micro-batches."""
        parts = torch.arange(len(y), device=y.device).split(self.microbatch)
        fields = [self._field(y[part], t.expand(len(part)), take(cond, part)) for part in parts]
        return Field(*(torch.cat(values) for values in zip(*fields, strict=True)))

    def _field(self, y: Tensor, t: Tensor, cond: Cond) -> Field:
        x = y * bcast(self.schedule.alpha(t), y)
        mixed, squares = torch.zeros_like(y), torch.zeros(len(y), dtype=torch.float64)
        for index, (denoiser, power, names) in enumerate(self._parts):
            eps = denoiser(x, t, {name: cond[f"{index} {name}"] for name in names}).eps
            mixed = mixed + power * eps
            squares = squares + power * _square(eps)
        pull, reward = self.reward(y)
        return Field(mixed, _square(mixed) - squares, pull, reward)

    def reward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Its gradient (B, ...) and its value (B,) at y (B, ...)."""
        if self.tilt is None:
            return torch.zeros_like(y), torch.zeros(len(y), dtype=torch.float64)
        with torch.enable_grad():
            at = y.detach().requires_grad_()
            reward = self.tilt.reward(at)
            (pull,) = torch.autograd.grad(reward.sum(), at)
        return pull, reward.detach().cpu().double()

    def log_g(self, field: Field, ts: Tensor, index: int) -> Tensor:
        """(B,) what ts[index] adds to the log-weights: half of both intervals around it, all of the last interval."""
        now = ts[index]
        level, strength = float(self.level(now[None])), self.strength(now)
        along = (field.eps.double() * field.pull.double()).flatten(1).sum(1).cpu()
        steady = field.gap / level**2 - strength * along / level
        intervals = [(ts[index], ts[index + 1], 1.0 if index + 2 == len(ts) else 0.5)]
        if index:
            intervals.append((ts[index - 1], ts[index], 0.5))
        variance = sum(share * (self._variance(t) - self._variance(s)) for t, s, share in intervals)
        gained = sum(share * (self.strength(s) - self.strength(t)) for t, s, share in intervals)
        return variance / 2 * steady + gained * field.reward

    def _variance(self, t: Tensor) -> float:
        return float(self.level(t[None])) ** 2

    def moved(
        self, y: Tensor, field: Field, t: Tensor, s: Tensor, how: tuple[float, float], generator: Randomness
    ) -> Tensor:
        """y (B, ...) at s; ``how`` is zeta and data_std."""
        zeta, data = how
        before, after = data**2 + self._variance(t), data**2 + self._variance(s)
        added = min(zeta**2 * (before - after) * after / before, after)
        y = y - (before - math.sqrt(before * (after - added))) / math.sqrt(self._variance(t)) * field.eps
        y = y + zeta**2 * (self.strength(t) + self.strength(s)) / 2 * (before - after) / 2 * field.pull
        return y + math.sqrt(added) * normal(y.shape, generator, y.device) if added else y


def _square(value: Tensor) -> Tensor:
    """(B, ...) -> (B,) |value|^2, float64 on the CPU."""
    return value.double().square().flatten(1).sum(1).cpu()


def _bounded(log_g: Tensor, clamp: float | None, shape: torch.Size) -> Tensor:
    if clamp is None:
        return log_g
    grouped = log_g.reshape(shape)
    return (grouped - grouped.mean(1, keepdim=True)).clamp(-clamp, clamp).flatten()


def _scored(score: Score | None, clean: Tensor, microbatch: int) -> tuple[Tensor, int]:
    if score is None:
        return torch.full((len(clean),), math.nan, dtype=torch.float64), 0
    parts = torch.arange(len(clean), device=clean.device).split(microbatch)
    return torch.cat([score(clean[part], part.cpu()).detach().double().cpu() for part in parts]), len(clean)
