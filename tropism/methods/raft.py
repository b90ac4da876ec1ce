"""RAFT: Reward rAnked FineTuning (Dong et al. 2023, 2304.06767, algorithm 1), and reward-weighted regression.

Sample, weigh by reward, and fit the denoiser to what was sampled. RAFT keeps the best of each prompt's images
(``best_of_group``, its local ranking); reward-weighted regression (Peters and Schaal 2007; the baseline of DDPO,
2305.13301) keeps all of them with weight exp(advantage / beta) (``softmax_of_group``).

Departures from OptimalScale/LMFlow: each iteration starts from the current model, as theirs, but the kept images are
used at once and not stored across iterations; prompts are dropped at ``drop`` for classifier-free guidance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tropism.base import Cond, Loss, Prompts, Reward, TextToImage, take
from tropism.denoisers import NetDenoiser, denoising_error
from tropism.methods.settings import MethodSettings
from tropism.overlap import scored_draw
from tropism.policy import Policy, reward_statistics
from tropism.rollout import slices
from tropism.samplers import solver

Weigh = Callable[[Tensor, Tensor], Tensor]
"""weigh(reward (B,), group (B,)) -> weight (B,) >= 0; 0 where there is no score."""


def best_of_group(share: float = 0.125) -> Weigh:
    """1 for the best ``share`` of each group (at least one image), 0 for the rest; a group without spread is
    left out."""
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1]; got {share}")

    def weigh(reward: Tensor, group: Tensor) -> Tensor:
        weight = torch.zeros_like(reward)
        for name in set(group.tolist()):
            rows = ((group == name) & ~reward.isnan()).nonzero().flatten()
            if len(rows) > 1 and bool(reward[rows].max() > reward[rows].min()):
                kept = max(1, round(share * len(rows)))
                weight[rows[reward[rows].argsort(descending=True, stable=True)[:kept]]] = 1.0
        return weight

    return weigh


def softmax_of_group(beta: float = 1.0) -> Weigh:
    """softmax(reward / beta) over each group, times its size; a group without spread is left out."""
    if beta <= 0:
        raise ValueError(f"beta must be positive; got {beta}")

    def weigh(reward: Tensor, group: Tensor) -> Tensor:
        weight = torch.zeros_like(reward)
        for name in set(group.tolist()):
            rows = ((group == name) & ~reward.isnan()).nonzero().flatten()
            if len(rows) > 1 and bool(reward[rows].max() > reward[rows].min()):
                weight[rows] = (reward[rows] / beta).softmax(0) * len(rows)
        return weight

    return weigh


@dataclass(frozen=True)
class Kept:
    """Samples to fit, with their weights."""

    x0: Tensor  # (N, ...)
    t: Tensor  # (N,) the time that they are noised to
    eps: Tensor  # (N, ...) with this noise
    weight: Tensor  # (N,)
    cond: Cond  # N rows, some of them without their prompt
    info: Mapping[str, float] = field(default_factory=dict)


@dataclass
class RAFT:
    """``epochs`` passes over the kept samples of each batch, ``updates`` optimizer steps a pass."""

    policy: Policy
    reward: Reward
    weigh: Weigh = field(default_factory=best_of_group)
    minibatch: int = 64
    updates: int = 1
    epochs: int = 4
    drop: float = 0.1
    generator: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self) -> None:
        if not isinstance(self.policy.model.denoiser, NetDenoiser):
            name = type(self.policy.model.denoiser).__name__
            raise TypeError(f"RAFT regresses on a network's target and {name} has none; use ddpo or alignprop")

    def experience(self, batch: Prompts) -> Iterator[Iterator[Kept]]:
        """Samples, scores and weighs a batch, then yields what has weight, shuffled, in ``updates`` slices a pass, with
        fresh times and noise each pass."""
        latents, reward, weight = self.sampled(batch)
        info = reward_statistics(reward, batch.group)
        rows = weight.nonzero().flatten()
        latents, weight = latents[rows], weight[rows].to(latents)
        cond = take(self.policy.told(self.policy.model.encode(batch.text)), rows)
        for _ in range(self.epochs):
            t = (0.001 + 0.999 * torch.rand(len(rows), generator=self.generator)).to(latents.device)
            eps = self.policy.noise(len(rows), self.generator)
            shown = self._dropped(cond, len(rows))
            order = torch.randperm(len(rows), generator=self.generator)
            for parts in slices(order, self.updates, self.minibatch, self.policy.processes):
                yield (Kept(latents[i], t[i], eps[i], weight[i], take(shown, i), info) for i in parts)

    def sampled(self, batch: Prompts) -> tuple[Tensor, Tensor, Tensor]:
        """Clean latents (B, ...), their rewards (B,) and weights (B,)."""
        latents, reward = scored_draw(self.policy, self.reward, batch, self.generator)
        return latents, reward, self.weigh(reward.cpu(), batch.group)

    def loss(self, kept: Kept) -> Loss:
        """The denoising error in the network's own target, at uniform times, weighted."""
        error = denoising_error(self.policy.model.denoiser, kept.x0, kept.eps, kept.t, kept.cond)
        weight = kept.weight.cpu().double().sum()  # exact: sums of parts are the sum of all
        return Loss((kept.weight * error).sum(), weight, {"denoising_error": error.detach().mean()})

    def _dropped(self, cond: Cond, count: int) -> dict[str, Tensor]:
        """Some rows without their prompt, so that guidance keeps its meaning."""
        null = self.policy.told(self.policy.model.null())
        dropped = torch.rand(count, generator=self.generator) < self.drop
        rows = {}
        for name, value in cond.items():
            mask = dropped.to(value.device).reshape(-1, *[1] * (value.ndim - 1))
            rows[name] = torch.where(mask, null[name].to(value), value)
        return rows

    def after_step(self) -> None:
        """Nothing moves but the parameters."""


@dataclass(frozen=True)
class Settings(MethodSettings):
    """Fine-tuning on the best of each prompt's images."""

    updates: int = 1
    """Optimizer steps of one pass over the kept images."""
    epochs: int = 4
    """Passes over the kept images of a step."""
    drop: float = 0.1
    """Share of rows trained without their prompt, for classifier-free guidance."""
    keep: float = 0.125
    """Best share of each prompt's images that is kept, at least one."""

    def check(self) -> None:
        """As the shared settings; ranking needs a group."""
        super().check()
        if self.images_per_prompt < 2:
            raise ValueError(
                f"images_per_prompt is {self.images_per_prompt}; wanted at least 2: there must be a choice"
            )
        if self.epochs < 1 or self.updates < 1 or not 0 <= self.drop < 1:
            raise ValueError(
                f"epochs is {self.epochs}, updates {self.updates} and drop {self.drop}; wanted 1 or "
                "more, 1 or more, and 0 to 1"
            )
        self.weigh()

    def weigh(self) -> Weigh:
        """Which images count."""
        return best_of_group(self.keep)

    def build(self, model: TextToImage, reward: Reward, generator: torch.Generator) -> RAFT:
        """The method on this model; it samples by ancestral steps, or a flow along the ODE."""
        policy = self.policy(model, solver(model.denoiser, 1.0))
        return RAFT(policy, reward, self.weigh(), self.minibatch, self.updates, self.epochs, self.drop, generator)
