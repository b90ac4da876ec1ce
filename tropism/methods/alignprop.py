"""AlignProp: aligning text-to-image diffusion models with reward backpropagation (Prabhudesai et al. 2023, 2310.03739).

The reward's gradient flows through the decoder and the last moves of the chain into the trained parameters. *Which*
moves is the gradient window, and the window is the whole difference between the published methods:
- AlignProp: ``RandomCut``; DRaFT-K (2309.17400): ``LastK``; DRaFT-LV: ``LowVariance``; ReFL (2304.05977): ``OneStep``
  with a ``Hinge`` reward; DRaFT+ (NeMo-Aligner): any window with ``kl_weight``.

Departures from mihirp1998/AlignProp: the reward is not scaled by 0.01 (with AdamW that only moves the gradient clip),
and saturated pixels keep a gradient (the model's ``decode``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tropism.ascent import no_gradient, rewarded
from tropism.base import Cond, Denoiser, Loss, Prediction, Prompts, Reward, TextToImage, bcast, pick, take
from tropism.explore import Exploration
from tropism.methods.settings import ExploreSettings
from tropism.policy import Policy, reward_statistics
from tropism.randomness import row_generators, row_seeds
from tropism.samplers import solver
from tropism.windows import RandomCut, Span, Window

INSTEAD = "use ddpo or raft, which need only its values"


@dataclass(frozen=True)
class Draws:
    """Some prompts of a batch and all that is drawn for them. ``loss`` writes their rewards to their places."""

    prompts: Prompts  # N rows
    rows: Tensor  # (N,) their places in the batch
    cond: Cond  # N rows, exactly as the acting policy sees them
    seeds: Tensor  # (N,) of their noise
    span: Span  # of the batch
    rewards: Tensor  # (B,) of the batch; NaN = no score, or none yet
    group: Tensor  # (B,)

    @property
    def info(self) -> dict[str, float]:
        """Statistics of the batch, complete after its last slice, and how many moves keep a graph."""
        return {**reward_statistics(self.rewards, self.group), "window": float(self.span.last - self.span.first)}


@dataclass
class AlignProp:
    """Gradient ascent on the reward through ``window``; ``minibatch`` chains a backward pass, which bounds memory and
    changes nothing else.

    ``kl_weight`` adds DRaFT+'s 0.5 |eps - eps_reference|^2, a mean over dimensions and moves of the window. Raises
    NoGradient when the reward declares that it has none, or returns none.
    """

    policy: Policy
    reward: Reward
    window: Window = field(default_factory=RandomCut)
    minibatch: int = 16
    kl_weight: float = 0.0
    explore: Exploration | None = None
    generator: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self) -> None:
        if not self.reward.differentiable:
            raise no_gradient(self.reward, "AlignProp", INSTEAD)

    def experience(self, batch: Prompts) -> Iterator[Iterator[Draws]]:
        """One update. All that is random is drawn here; sampling happens inside the loss, where the graph is."""
        cond = self.policy.model.encode(batch.text)
        if self.explore is not None:
            cond = self.explore(self.policy.model, batch.text, cond, self.generator)
        seeds = row_seeds(len(batch.text), self.generator)
        span = self.window(self.policy.steps, self.generator)
        rewards = torch.full((len(batch.text),), math.nan)
        yield (
            Draws(pick(batch, rows), rows, take(cond, rows), seeds[rows], span, rewards, batch.group)
            for rows in self.policy.processes.parts(torch.arange(len(batch.text)), self.minibatch)
        )

    def loss(self, draws: Draws) -> Loss:
        """Minus the reward of differentiable samples, plus the penalty; samples without a score are left out."""
        denoiser, generators = self.policy.denoiser, row_generators(draws.seeds)
        latents, penalty = self._sample(denoiser, draws, generators)
        reward = self._scored(latents, draws.prompts)
        for _ in range(draws.span.repeats):
            latents = self._again(denoiser, latents.detach(), draws.cond, generators)
            reward = reward + self._scored(latents, draws.prompts)
        reward = reward / (1 + draws.span.repeats)
        draws.rewards[draws.rows] = reward.detach().to(draws.rewards)
        present = ~reward.isnan()
        gain = (reward - self.kl_weight * penalty).where(present, 0.0)
        metrics = {"kl": penalty[present].detach().mean()} if self.kl_weight else {}
        return Loss(-gain.sum(), present.sum().float(), metrics)

    def _scored(self, latents: Tensor, prompts: Prompts) -> Tensor:
        """(N,) rewards; where one is missing, no gradient comes back."""
        return rewarded(self.policy.model, self.reward, latents, prompts, "AlignProp", INSTEAD)[0]

    def _sample(self, denoiser: Denoiser, draws: Draws, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
        """(clean latents with the graph of the window, the penalty (N,))."""
        span = draws.span
        chain = self.policy.chain(self.policy.noise(len(generators), generators), draws.cond, generators)
        penalties: list[Tensor] = []
        move = None
        for place in range(span.last):
            with torch.set_grad_enabled(place >= span.first):
                move = next(chain)
            if place >= span.first and self.kl_weight:
                penalties.append(self._penalty(move.x, move.t, draws.cond, move.prediction))
        assert move is not None
        latents = move.prediction.x0 if span.jump else move.x_next
        penalty = torch.stack(penalties).mean(0) if penalties else torch.zeros(len(latents), device=latents.device)
        return latents, penalty

    def _penalty(self, x: Tensor, t: Tensor, cond: Cond, prediction: Prediction) -> Tensor:
        with torch.no_grad(), self.policy.model.reference():
            reference = self.policy.denoiser(x.detach(), t, cond)
        return 0.5 * (prediction.eps - reference.eps).square().flatten(1).mean(1)

    def _again(self, denoiser: Denoiser, clean: Tensor, cond: Cond, generators: Sequence[torch.Generator]) -> Tensor:
        """The latents noised to the level before the end, and the last move from there once more, with a graph."""
        schedule, (t, s) = denoiser.schedule, self.policy.ts[-2:].to(clean.device).expand(len(clean), 2).unbind(1)
        keep = schedule.alpha(t) / schedule.alpha(s)  # the end may have some noise of its own, as in Stable Diffusion
        added = (schedule.sigma(t) ** 2 - (keep * schedule.sigma(s)) ** 2).clamp(min=0).sqrt()
        noisy = bcast(keep, clean) * clean + bcast(added, clean) * self.policy.noise(len(clean), generators)
        return self.policy.kernel(denoiser, noisy, t, s, cond)[0].sample(generators)

    def after_step(self) -> None:
        """Nothing moves but the parameters."""


@dataclass(frozen=True)
class Settings(ExploreSettings):
    """Reward gradients through a random number of last moves."""

    images_per_prompt: int = 1
    prompts_per_step: int = 16
    minibatch: int = 16
    learning_rate: float = 1e-3
    eta: float = 1.0
    """Noise of the DDIM kernel; flow models walk the ODE."""
    longest: int | None = None
    """Most moves that carry the gradient; none: the whole chain."""
    kl_weight: float = 0.0
    """Weight of the squared distance to the model before training (DRaFT+)."""

    def check(self) -> None:
        """As the shared settings; the window fits the chain."""
        super().check()
        if not 0 <= self.eta <= 1 or self.kl_weight < 0:
            raise ValueError(f"eta is {self.eta} and kl_weight {self.kl_weight}; wanted 0 to 1, and 0 or more")
        self.window()(self.inference_steps, torch.Generator())

    def window(self) -> Window:
        """Which moves keep a graph."""
        return RandomCut(self.longest)

    def build(self, model: TextToImage, reward: Reward, generator: torch.Generator) -> AlignProp:
        """The method on this model. Raises NoGradient for a reward without one."""
        explore = self.exploration()
        policy = self.policy(model, solver(model.denoiser, self.eta), explore)
        return AlignProp(policy, reward, self.window(), self.minibatch, self.kl_weight, explore, generator)
