"""AlignProp: aligning text-to-image diffusion models with reward backpropagation (Prabhudesai et al. 2023, 2310.03739).

The reward's gradient flows through the decoder and the last moves of the chain into the trained parameters. *Which*
moves is the gradient window, and the window is the whole difference between the published methods:
- AlignProp: ``RandomCut``; DRaFT-K (2309.17400): ``LastK``; DRaFT-LV: ``LowVariance``; ReFL (2304.05977): ``OneStep``
  with a ``Hinge`` reward; DRaFT+ (NeMo-Aligner): any window with ``kl_weight``.

Departures from mihirp1998/AlignProp: the reward is not scaled by 0.01 (with AdamW that only moves the gradient clip),
and saturated pixels keep a gradient (the model's ``decode``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tropism.base import Cond, Denoiser, Kernel, Loss, Prediction, Prompts, Reward, TextToImage, bcast
from tropism.explore import Exploration
from tropism.methods.settings import ExploreSettings
from tropism.policy import Policy, reward_statistics
from tropism.samplers import DDIM, EulerODE
from tropism.schedules import RectifiedFlow
from tropism.windows import RandomCut, Span, Window


class NoGradient(TypeError):
    """The reward cannot be differentiated."""


@dataclass
class AlignProp:
    """Gradient ascent on the reward through ``window``; ``minibatch`` chains a backward pass.

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
            raise NoGradient(self._no_gradient())

    def _no_gradient(self) -> str:
        return (
            f"the reward {self.reward.name!r} has no gradient with respect to the images, and AlignProp follows that "
            "gradient; use ddpo or raft, which need only its values, or a differentiable reward such as clip"
        )

    def experience(self, batch: Prompts) -> Iterator[Iterator[Prompts]]:
        """One update, over micro-batches of prompts; sampling happens inside the loss, where the graph is."""
        yield self._slices(batch)

    def _slices(self, batch: Prompts) -> Iterator[Prompts]:
        for rows in torch.arange(len(batch.text)).split(self.minibatch):
            picked = rows.tolist()
            columns = {name: [values[i] for i in picked] for name, values in batch.columns.items()}
            yield Prompts([batch.text[i] for i in picked], batch.group[rows], columns)

    def loss(self, batch: Prompts) -> Loss:
        """Minus the reward of differentiable samples, plus the penalty; samples without a score are left out."""
        model, denoiser = self.policy.model, self.policy.denoiser
        cond = model.encode(batch.text)
        if self.explore is not None:
            cond = self.explore(model, batch.text, cond, self.generator)
        span = self.window(self.policy.steps, self.generator)
        latents, penalty = self._sample(denoiser, cond, span, len(batch.text))
        reward = self._scored(latents, batch)
        for _ in range(span.repeats):
            reward = reward + self._scored(self._again(denoiser, latents.detach(), cond), batch)
        reward = reward / (1 + span.repeats)
        present = ~reward.isnan()
        gain = (reward - self.kl_weight * penalty).where(present, 0.0)
        info = reward_statistics(reward.detach(), batch.group.to(reward.device))
        metrics = {"reward_mean": torch.tensor(info["reward_mean"]), "reward_std": torch.tensor(info["reward_std"])}
        metrics |= {
            "reward_missing": torch.tensor(info["reward_missing"]),
            "window": torch.tensor(float(span.last - span.first)),
        }
        if self.kl_weight:
            metrics["kl"] = penalty.detach().mean()
        return Loss(-gain.sum(), present.sum().float(), metrics)

    def _scored(self, latents: Tensor, batch: Prompts) -> Tensor:
        reward = self.reward(self.policy.model.decode(latents), batch.text, **batch.columns)
        if not reward.requires_grad:
            raise NoGradient(self._no_gradient())
        return reward

    def _sample(self, denoiser: Denoiser, cond: Cond, span: Span, count: int) -> tuple[Tensor, Tensor]:
        """(clean latents with the graph of the window, the penalty (B,))."""
        chain = iter(self.policy.chain(self.policy.noise(count, self.generator), cond, self.generator))
        penalties: list[Tensor] = []
        move = None
        for place in range(span.last):
            with torch.set_grad_enabled(place >= span.first):
                move = next(chain)
            if place >= span.first and self.kl_weight:
                penalties.append(self._penalty(move.x, move.t, cond, move.prediction))
        assert move is not None
        latents = move.prediction.x0 if span.jump else move.x_next
        penalty = torch.stack(penalties).mean(0) if penalties else torch.zeros(count, device=latents.device)
        return latents, penalty

    def _penalty(self, x: Tensor, t: Tensor, cond: Cond, prediction: Prediction) -> Tensor:
        with torch.no_grad(), self.policy.model.reference():
            reference = self.policy.denoiser(x.detach(), t, cond)
        return 0.5 * (prediction.eps - reference.eps).square().flatten(1).mean(1)

    def _again(self, denoiser: Denoiser, clean: Tensor, cond: Cond) -> Tensor:
        """The clean latents noised to the last level and denoised once more, with a graph."""
        t = self.policy.ts[-2].expand(len(clean)).to(clean.device)
        noise = torch.randn(clean.shape, generator=self.generator).to(clean.device)
        noisy = bcast(denoiser.schedule.alpha(t), clean) * clean + bcast(denoiser.schedule.sigma(t), clean) * noise
        return denoiser(noisy, t, cond).x0

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
        flow = isinstance(model.denoiser.schedule, RectifiedFlow)
        kernel: Kernel = EulerODE() if flow else DDIM(self.eta)
        explore = self.exploration()
        policy = self.policy(model, kernel, explore)
        return AlignProp(policy, reward, self.window(), self.minibatch, self.kl_weight, explore, generator)
