"""What steering is given and what it gives: prompts with their seeds and a score, and a sample of each with its cost.

A steerer is a *guide*, which puts a denoiser around the policy's, or a *search*, which decides how the chains of a
prompt are run. Both are given the same ``Task``; guides compose with each other and with any one search.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from tropism.base import Cond, Prompts, Reward, TextToImage, pick, take
from tropism.counting import Counted
from tropism.guidance import ROW
from tropism.particles import Particles
from tropism.particles import Trace as ParticleTrace
from tropism.policy import Guide, Policy, score_latents
from tropism.randomness import branches, normal, row_generators, row_seeds
from tropism.samplers import DDIM, EulerODE, FlowSDE, walk

ParticleScore = Callable[[Tensor, Tensor], Tensor]
"""score(latents (N, ...), rows (N,) among P * count) -> (N,)."""


@dataclass
class Scorer:
    """What the reward says of clean latents; it counts the pictures and the seconds."""

    policy: Policy
    reward: Reward
    prompts: Prompts
    rows: int = 0
    seconds: float = 0.0

    def __call__(self, latents: Tensor, rows: Tensor) -> Tensor:
        """Latents (N, ...) of prompts ``rows`` (N,) -> (N,) float32, without a graph, by micro-batches."""
        started = time.perf_counter()
        parts = zip(latents.split(self.policy.microbatch), rows.cpu().split(self.policy.microbatch), strict=True)
        scores = [score_latents(self.policy, self.reward, some, pick(self.prompts, each)) for some, each in parts]
        self.rows, self.seconds = self.rows + len(rows), self.seconds + time.perf_counter() - started
        return torch.cat(scores).float()

    def check_gradient(self) -> None:
        """Raises TypeError for a reward without a gradient."""
        if not self.reward.differentiable:
            raise TypeError(
                f"reward '{self.reward.name}' has no gradient, which this guide follows; take a reward that has one, "
                "such as clip, or a search that needs values only: best-of-n, beam, fk"
            )

    def value(self, latents: Tensor, rows: Tensor) -> Tensor:
        """The same with its graph, in one piece. Raises TypeError for a reward without a gradient."""
        self.check_gradient()
        own, started = pick(self.prompts, rows.cpu()), time.perf_counter()
        scores = self.reward(self.policy.model.decode(latents), own.text, **own.columns)
        self.rows, self.seconds = self.rows + len(rows), self.seconds + time.perf_counter() - started
        return scores


@dataclass(frozen=True)
class Task:
    """P samples to be drawn, one a row of ``prompts``."""

    policy: Policy
    prompts: Prompts
    seeds: Tensor  # (P,) int64: what row i is drawn from, whatever else is drawn
    score: Scorer

    @property
    def count(self) -> int:
        """P."""
        return len(self.prompts.text)

    def cond(self, each: int = 1) -> Cond:
        """Conditions of P * ``each`` rows, those of one prompt together, with ``ROW``."""
        rows = torch.arange(self.count).repeat_interleave(each)
        cond = self.policy.model.encode(self.prompts.text)
        return {**take(cond, rows.to(self.policy.device)), ROW: rows.to(self.policy.device)}

    def branched(self, each: int) -> Tensor:
        """(P * each,) seeds, those of one prompt together; the first of a prompt is its own."""
        return branches(self.seeds, each).flatten()

    def start(self, each: int = 1) -> tuple[Tensor, list[torch.Generator]]:
        """Noise (P * each, ...) and the generator that each row goes on with; the first of a prompt is what it is drawn
        from without steering."""
        generators = row_generators(self.branched(each))
        shape = (len(generators), *self.policy.model.latent_shape)
        return normal(shape, generators, self.policy.device), generators

    def noisy(self, eta: float, noise_level: float) -> Task:
        """With chance in the moves, which particles of one origin need to part: DDIM(eta) for DDIM, Flow-GRPO's SDE for
        Euler's method, and hops that draw noise as they are."""
        kernel = self.policy.kernel
        if isinstance(kernel, EulerODE):
            kernel = FlowSDE(noise_level)
        elif isinstance(kernel, DDIM):
            kernel = DDIM(eta)
        return replace(self, policy=self.policy.with_(kernel=kernel))

    def particles(self, count: int) -> tuple[Tensor, Cond, list[torch.Generator], ParticleScore]:
        """What a particle system is started with: noise (P, count, ...), conditions and generators of P * count rows,
        and the score of latents of such rows. Raises ValueError as ``check_walk``."""
        self.check_walk()
        x, generators = self.start(count)
        return (
            x.unflatten(0, (self.count, count)),
            self.cond(count),
            generators,
            lambda latents, rows: self.score(latents, rows // count),
        )

    def check_walk(self) -> None:
        """Raises ValueError for a policy that walks in its own way, where a search has to."""
        if self.policy.walker is not walk:
            raise ValueError(
                "a guide of this sample decides how its chain is walked, and so does this search; take best-of-n, or "
                "leave the guide out"
            )

    def drawn_by(self, model: TextToImage) -> Task:
        """By another model, whose calls are counted as the first one's."""
        own = self.policy.model
        return replace(self, policy=self.policy.with_(model=own.instead(model) if isinstance(own, Counted) else model))

    def guided(self, guide: Guide) -> Task:
        """With ``guide`` around what the policy has already."""
        inner = self.policy.guide
        both = guide if inner is None else lambda denoiser: guide(inner(denoiser))
        return replace(self, policy=self.policy.with_(guide=both))


@dataclass(frozen=True)
class Steered:
    """What was drawn, a sample a prompt."""

    latents: Tensor  # (P, ...) clean
    steps: Sequence[Mapping[str, float]] = ()  # a row a move at which something was decided
    particles: Particles | None = None  # all that were run, with their weights, where there were several


@dataclass(frozen=True)
class Trace:
    """What the drawing of P samples cost, and what was decided on the way."""

    calls: float  # rows that the network was asked for, a sample
    scored: float  # pictures that the reward was shown, a sample
    seconds: float  # a sample, all in all
    reward_seconds: float  # of these
    steps: Sequence[Mapping[str, float]] = field(default_factory=list)
    particles: Particles | None = None


@runtime_checkable
class Search(Protocol):
    """Settings of a search: how the chains of every prompt are run."""

    def check(self) -> None: ...

    def draw(self, task: Task) -> Steered: ...


@runtime_checkable
class Guiding(Protocol):
    """Settings of a guide: what goes around the denoiser. It may change the task's policy in other ways as well."""

    def check(self) -> None: ...

    def guide(self, task: Task) -> Task: ...


@dataclass(frozen=True)
class Plain:
    """No search: one chain a sample."""

    def check(self) -> None:
        """Nothing can be wrong."""

    def draw(self, task: Task) -> Steered:
        """As the policy draws."""
        return Steered(chains(task, 1))


@torch.no_grad()
def chains(task: Task, each: int) -> Tensor:
    """``each`` samples of every prompt, (P * each, ...), by micro-batches, as the policy walks."""
    (x, generators), cond, ends = task.start(each), task.cond(each), []
    for rows in torch.arange(len(x)).split(task.policy.microbatch):
        *_, last = task.policy.chain(x[rows], take(cond, rows.to(x.device)), [generators[row] for row in rows])
        ends.append(last.x_next)
    return torch.cat(ends)


def encoder_of(task: Task, what: str) -> Callable[[Tensor], Tensor]:
    """``latents`` of the task's model. Raises ValueError for a model without an encoder."""
    encode = getattr(task.policy.model, "latents", None)
    if encode is None:
        raise ValueError(f"this model has no encoder, by which {what} would become latents; take a pipeline")
    return encode  # type: ignore[no-any-return]


def of_particles(particles: Particles, trace: ParticleTrace) -> Steered:
    """The best of each prompt's particles, with the means of what was decided at every step."""
    steps = [
        {
            "move": step.index,
            "t": step.t,
            "ess": float(step.ess.mean()),
            "resampled": float(step.resampled.double().mean()),
            "unique_ancestors": float(step.unique_ancestors.double().mean()),
            "reward": float(step.reward.double().nanmean()),
        }
        for step in trace.steps
    ]
    return Steered(particles.at(particles.best()), steps, particles)


def check_steerers(steerers: Sequence[object]) -> Search | None:
    """The search among them. Raises ValueError for two, and for what is neither guide nor search."""
    searches = [each for each in steerers if isinstance(each, Search)]
    other = [each for each in steerers if not isinstance(each, Search | Guiding)]
    if other:
        raise ValueError(
            f"{type(other[0]).__name__} is neither a guide nor a search; give settings of tropism.steering"
        )
    if len(searches) > 1:
        names = " and ".join(type(each).__module__.rpartition(".")[2] for each in searches[:2])
        raise ValueError(f"{names} both decide how chains are run; give one of them, with any number of guides")
    return searches[0] if searches else None


def steer_policy(
    policy: Policy, reward: Reward, prompts: Prompts, steerers: Sequence[Search | Guiding], seeds: Tensor
) -> tuple[Steered, Trace]:
    """Draws a sample a row of ``prompts``, steered by the guides in turn and by the search among ``steerers``.

    Sample i depends on ``seeds`` (P,)[i] and its prompt alone. Raises ValueError for two searches, TypeError for a
    guide that needs a gradient which the reward has not.
    """
    search = check_steerers(steerers) or Plain()
    if seeds.shape != (len(prompts.text),):
        raise ValueError(f"{len(prompts.text)} prompts and seeds {tuple(seeds.shape)}; wanted one seed a prompt")
    started, counted = time.perf_counter(), Counted(policy.model)
    policy = policy.with_(model=counted)
    score = Scorer(policy, reward, prompts)
    task = Task(policy, prompts, seeds, score)
    for each in steerers:
        if isinstance(each, Guiding):
            task = each.guide(task)
    found = search.draw(task)
    per = 1 / task.count
    seconds = time.perf_counter() - started
    trace = Trace(
        counted.rows * per, score.rows * per, seconds * per, score.seconds * per, found.steps, found.particles
    )
    return found, trace


def image_seeds(count: int, seed: int) -> Tensor:
    """(count,): image i of ``seed``, as everything that is drawn here counts them."""
    return row_seeds(count, torch.Generator().manual_seed(seed))
