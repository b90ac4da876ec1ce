"""Feynman-Kac steering: resample chains while they run, by rewards of what they will become.

Singhal et al.: A General Framework for Inference-time Scaling and Steering of Diffusion Models, 2025 (2501.06848). K
particles of each prompt are samples of p(x_0) exp(scale r(x_0)) / Z, properly weighted: for every potential, schedule,
scheme and threshold the estimate of Z is unbiased, and weighted means converge as K grows.

Departures from zacharyhorvitz/Fk-Diffusion-Steering, whose choices are marked (a) where they change the target:
log-weights are carried whenever nothing is resampled (theirs are dropped, (a)); the last potential is
exp(scale r(x_0)) over the product of all before, where theirs of max and sum is over the last maximum or sum (a);
weights are logs, not exponentials clamped at 1e10 (a); a state is weighed by the prediction made from it before its
noise is drawn, so that offspring of one particle differ at once, where theirs share the noise that the weighing did not
see; resampling is systematic, not multinomial, and within a prompt; the end is weighed and not resampled.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from tropism.base import Cond, Denoiser, Kernel, Prediction, Transition, take
from tropism.particles.intermediate import Intermediate, predicted
from tropism.particles.particles import Particles, ess, log_mean, unique
from tropism.particles.potentials import Memory, Potential, difference
from tropism.particles.resampling import Resample, systematic
from tropism.particles.trace import Step, Trace
from tropism.particles.walking import (
    Chance,
    Score,
    Seen,
    Walk,
    Walking,
    counted,
    law_rows,
    laws_below,
)
from tropism.randomness import Randomness

Proposal = Callable[[Transition, Seen], Transition]
"""proposal(the model's law, seen) -> the law that the next state is drawn from instead."""


def through(kernel: Kernel, denoiser: Denoiser) -> Proposal:
    """Draws by another kernel or denoiser (a guided one); the weights make up for it."""
    return lambda law, seen: kernel(counted(denoiser, seen.cost), seen.x, seen.t, seen.s, seen.cond)[0]


def schedule(steps: int, every: int, first: float = 0.2, last: float = 0.8) -> tuple[int, ...]:
    """Every ``every``-th of ``steps`` moves, between these shares of the chain: what ``at`` wants.

    Raises ValueError where there is none.
    """
    found = tuple(i for i in range(0, steps, max(every, 1)) if first * steps <= i <= last * steps)
    if every < 1 or not found:
        raise ValueError(f"no move of {steps} is a multiple of {every} between {first} and {last} of the chain")
    return found


@dataclass(frozen=True)
class Flock:
    """Everything that belongs to particles, B = P * K rows."""

    x: Tensor  # (B, ...)
    cond: Cond
    memory: Memory
    log_weight: Tensor  # (P, K) float64
    log_evidence: Tensor  # (P,) float64
    ancestor: Tensor  # (P, K)

    @staticmethod
    def start(x: Tensor, cond: Cond) -> Flock:
        """x (P, K, ...), cond B rows."""
        prompts, count = x.shape[:2]
        zero = torch.zeros(prompts, count, dtype=torch.float64)
        every = torch.arange(count).expand(prompts, count)
        return Flock(x.flatten(0, 1).float(), cond, Memory.empty(prompts * count), zero, zero[:, 0], every)

    def weighed(self, log_g: Tensor) -> Flock:
        """With log_g (B,) on top of the weights."""
        return dataclasses.replace(self, log_weight=self.log_weight + log_g.reshape(self.log_weight.shape))

    def due(self, ess_below: float) -> Tensor:
        """(P,) bool: whose effective sample size is below this share of K."""
        return ess(self.log_weight) < ess_below * self.log_weight.shape[1]

    def chosen(self, due: Tensor, resample: Resample, chance: Chance) -> Tensor:
        """(P, K) int64 from which particle each comes now: drawn for prompts that are due, itself for the others."""
        prompts, count = self.log_weight.shape
        index = torch.arange(count).repeat(prompts, 1)
        places = due.nonzero()[:, 0]
        if len(places):
            index[places] = resample(self.log_weight[places], count, chance.of_prompts(places, count))
        return index

    def resampled(self, due: Tensor, index: Tensor) -> tuple[Flock, Tensor]:
        """After ``chosen``, and the same index by rows (B,): what was weighed goes into the evidence."""
        prompts, count = index.shape
        rows = (index + torch.arange(prompts)[:, None] * count).flatten()
        zero = torch.zeros((), dtype=torch.float64)
        there = rows.to(self.x.device)
        flock = Flock(
            self.x[there],
            take(self.cond, there),
            self.memory.rows(rows),
            self.log_weight.where(~due[:, None], zero),
            self.log_evidence + log_mean(self.log_weight).where(due, zero),
            self.ancestor.gather(1, index),
        )
        return flock, rows


def checked(x: Tensor, cond: Cond, moves: int, at: Collection[int], ess_below: float) -> None:
    """Raises ValueError for what cannot be walked."""
    if x.ndim < 3 or not x.shape[0] or not x.shape[1]:
        raise ValueError(f"x has shape {tuple(x.shape)}; wanted (prompts, particles, ...), at least one of each")
    wrong = {name: len(value) for name, value in cond.items() if len(value) != x.shape[0] * x.shape[1]}
    if wrong:
        raise ValueError(f"cond has rows {wrong}; wanted one a particle, {x.shape[0]} * {x.shape[1]}")
    if not all(0 <= index < moves for index in at):
        raise ValueError(f"at names moves {sorted(at)} of a chain that has 0..{moves - 1}")
    if not 0 < ess_below <= 1:
        raise ValueError(f"ess_below must lie in (0, 1], a share of the particles; got {ess_below}")


@torch.no_grad()
def fk_steer(
    walk: Walk,
    x: Tensor,
    cond: Cond,
    score: Score,
    *,
    scale: float,
    potential: Potential | None = difference,
    at: Collection[int] = (),
    resample: Resample = systematic,
    ess_below: float = 1.0,
    intermediate: Intermediate = predicted,
    proposal: Proposal | None = None,
    generator: Randomness = None,
) -> tuple[Particles, Trace]:
    """Particles from noise x (P, K, ...) for the target p(x_0) exp(scale r(x_0)); cond has P * K rows.

    Before each move in ``at`` the states are scored by ``intermediate``, weighed by ``potential`` (None: not before the
    end) and, in prompts whose effective sample size is below ``ess_below`` * K, resampled; 1 is always. A row without
    score keeps its weight at that step; one without score at the end counts as it did last, or not at all if it never
    had one. ``generator`` is one, or one a row. Raises ValueError for a kernel that draws no noise, since equal
    particles would stay equal, for shapes that do not fit, and for infinite rewards.
    """
    at = frozenset(at) if potential is not None else frozenset()
    checked(x, cond, len(walk.ts) - 1, at, ess_below)
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite; got {scale}")
    going, chance = Walking(walk, score), Chance.of(generator, x.shape[0] * x.shape[1])
    flock, steps, missing = Flock.start(x, cond), list[Step](), False
    ts = walk.ts.to(x.device, torch.float32)
    for index, (t, s) in enumerate(itertools.pairwise(ts)):
        law, prediction = going.look(flock.x, t, s, flock.cond)
        if index == 0 and at:
            _random(law, walk.kernel)
        if index in at and potential is not None:
            reward = _by_parts(intermediate, going, _seen(going, flock, t, s, prediction, chance))
            missing |= bool(reward.isnan().any())
            log_g = potential(reward, flock.memory).where(~reward.isnan(), 0.0)
            flock = dataclasses.replace(flock, memory=flock.memory.after(reward, log_g)).weighed(scale * log_g)
            before, due = flock, flock.due(ess_below)
            flock, rows = flock.resampled(due, flock.chosen(due, resample, chance))
            law, prediction = _rows_of(law, prediction, rows.to(x.device))
            steps.append(_step(index, float(t), before, flock, due, reward))
        flock = _moved(going, flock, law, prediction, t, s, proposal, chance)
    reward = going.score(flock.x, torch.arange(len(flock.x)))
    _warn(missing or bool(reward.isnan().any()))
    flock = _ended(flock, reward, scale)
    steps.append(_step(len(ts) - 1, float(ts[-1]), flock, flock, torch.zeros(len(x)).bool(), reward))
    return _particles(flock, reward, x), Trace(tuple(steps), going.cost.network_rows, going.cost.reward_rows)


def _random(law: Transition, kernel: Kernel) -> None:
    if not bool(law.is_random.all()):
        raise ValueError(
            f"{type(kernel).__name__} draws no noise here, so that particles with one ancestor would stay equal; use "
            "samplers.stochastic_solver, or steer without steps in between (at=(), or importance)"
        )


def _seen(going: Walking, flock: Flock, t: Tensor, s: Tensor, said: Prediction, chance: Chance) -> Seen:
    rows = len(flock.x)
    place = torch.arange(rows)
    return Seen(flock.x, t.expand(rows), s.expand(rows), said, flock.cond, place, chance.rows, going.walk, going.cost)


def _by_parts(intermediate: Intermediate, going: Walking, seen: Seen) -> Tensor:
    """(B,) float64 on the CPU."""
    parts = torch.arange(len(seen.x), device=seen.x.device).split(going.walk.microbatch)
    values = torch.cat([intermediate(going.score, seen.of(part)).detach().double().cpu() for part in parts])
    if values.shape != (len(seen.x),) or bool(values.isinf().any()):
        raise ValueError(
            f"the intermediate reward is {tuple(values.shape)} or infinite; wanted ({len(seen.x)},) finite, or NaN"
        )
    return values


def _rows_of(law: Transition, said: Prediction, rows: Tensor) -> tuple[Transition, Prediction]:
    return law_rows(law, rows), Prediction(said.x0[rows], said.eps[rows])


def _moved(
    going: Walking,
    flock: Flock,
    law: Transition,
    said: Prediction,
    t: Tensor,
    s: Tensor,
    proposal: Proposal | None,
    chance: Chance,
) -> Flock:
    """After one draw; from a proposal it costs log p - log proposal. A step without noise is always the model's."""
    if proposal is None or not bool(law.is_random.all()):
        return dataclasses.replace(flock, x=law.sample(chance.moves))
    seen = _seen(going, flock, t, s, said, chance)
    parts = torch.arange(len(flock.x), device=flock.x.device).split(going.walk.microbatch)
    drawn = laws_below([proposal(law_rows(law, part), seen.of(part)) for part in parts])
    if not bool(drawn.is_random.all()):
        raise ValueError(f"the proposal draws no noise at t = {float(t):.4g}, where the model does; wanted a density")
    x = drawn.sample(chance.moves)
    gap = law.log_prob(x).double() - drawn.log_prob(x).double()
    return dataclasses.replace(flock, x=x).weighed(gap.cpu())


def _ended(flock: Flock, reward: Tensor, scale: float) -> Flock:
    """With the last potential, exp(scale r(x_0)) over the product of those before."""
    known = (~reward.isnan()) | flock.memory.known
    final = reward.where(~reward.isnan(), flock.memory.last)
    log_g = scale * (final - flock.memory.spent)
    never = (~known).reshape(flock.log_weight.shape)
    hopeless = never.all(1, keepdim=True).expand_as(never).flatten()
    log_g = log_g.where(known, -torch.inf).where(~hopeless, 0.0)
    flock = flock.weighed(log_g)
    return dataclasses.replace(flock, log_evidence=flock.log_evidence + log_mean(flock.log_weight))


def _step(index: int, t: float, before: Flock, after: Flock, due: Tensor, reward: Tensor) -> Step:
    mean = reward.reshape(before.log_weight.shape).nanmean(1)
    return Step(index, t, ess(before.log_weight), due, unique(after.ancestor), mean)


def _warn(missing: bool) -> None:
    if missing:
        warnings.warn(
            "some samples have no score (NaN): they keep their weights at those steps, and count at the end as they "
            "did last",
            stacklevel=3,
        )


def _particles(flock: Flock, reward: Tensor, x: Tensor) -> Particles:
    shape = flock.log_weight.shape
    samples = flock.x.reshape(*shape, *flock.x.shape[1:])
    return Particles(samples, flock.log_weight, flock.ancestor, flock.log_evidence, reward.reshape(shape))
