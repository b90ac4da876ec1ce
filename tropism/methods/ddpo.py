"""DDPO: Training Diffusion Models with Reinforcement Learning (Black et al. 2023, 2305.13301, section 4.3).

The K moves of a chain are the actions of a policy whose last state is rewarded. DDPO-IS is ``objective=importance()``
(eq. 4, PPO's clipped surrogate), DDPO-SF is ``objective=score_function`` (eq. 3) with one update a rollout. With
``kl_weight`` it has DPOK's regulariser (2305.16381, eq. 9): the exact KL of each move to the model before training.
Flow-GRPO and DanceGRPO are this file with another kernel and another credit.

Departures from kvablack/ddpo-pytorch:
- an update takes a shuffled slice of *(image, move)* cells where theirs accumulates over all moves of a slice of
  images; the sum over one rollout is the same;
- images without a score and moves without a density are not in the table;
- log-probabilities are exact sums; ``per_dimension`` divides them by the number of dimensions as their code does,
  which is what makes a clip range of 1e-4 sensible.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tropism.base import Kernel, Loss, Prompts, Reward, Rollout, TextToImage, Transition
from tropism.credit import Credit, group_relative, per_prompt
from tropism.explore import Exploration
from tropism.losses import policy as losses
from tropism.methods.settings import PolicyGradientSettings
from tropism.overlap import scored_chains
from tropism.policy import Policy, reward_statistics
from tropism.randomness import row_generators, row_seeds
from tropism.rollout import Cells, gather, slices, trainable
from tropism.samplers import FlowSDE, noise_until, stochastic_solver
from tropism.transitions import Gaussian

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]
"""objective(log_prob (N,), acting log_prob (N,), advantage (N,)) -> (N,), to be minimised."""


def importance(clip: float = 1e-4) -> Objective:
    """The clipped surrogate with ratio to the acting policy."""
    return lambda now, acting, advantage: losses.clipped(now - acting, advantage, clip, clip)


def score_function(now: Tensor, acting: Tensor, advantage: Tensor) -> Tensor:
    """REINFORCE: on-policy only, so one update a rollout."""
    return losses.score_function(now, advantage)


@dataclass
class DDPO:
    """``minibatch`` cells a backward pass, ``updates`` optimizer steps a pass, ``inner_epochs`` passes over a rollout
    and ``move_fraction`` of its moves (drawn per image), advantages clamped to +-``max_advantage``. ``same_noise``
    starts the images of a group from one noise; ``skip_last`` leaves the last move out where a kernel draws noise that
    is only ever seen as noise. ``noise_weighting`` multiplies a move's term by its standard deviation, as TempFlow-GRPO
    (2508.04324): the gradient of a log-probability grows as the noise shrinks, so that late moves drown the early ones.
    """

    policy: Policy
    reward: Reward
    credit: Credit = field(default_factory=per_prompt)
    objective: Objective = field(default_factory=importance)
    minibatch: int = 64
    updates: int = 1
    inner_epochs: int = 1
    move_fraction: float = 1.0
    max_advantage: float = 5.0
    per_dimension: bool = True
    kl_weight: float = 0.0
    noise_weighting: bool = False
    same_noise: bool = False
    skip_last: bool = False
    explore: Exploration | None = None
    ratio_tolerance: float = 1e-4
    generator: torch.Generator = field(default_factory=torch.Generator)
    _updated: bool = field(default=False, init=False)

    def experience(self, batch: Prompts) -> Iterator[Iterator[Cells]]:
        """Samples and scores a batch, then yields its cells, shuffled, in ``updates`` slices a pass."""
        rollout = self.rollout(batch)
        info = reward_statistics(rollout.reward, rollout.group)
        rows, columns = trainable(rollout, self.move_fraction, self.skip_last, self.generator)
        self._updated = False
        for _ in range(self.inner_epochs):
            order = torch.randperm(len(rows), generator=self.generator)
            for parts in slices(order, self.updates, self.minibatch, self.policy.processes):
                yield (gather(rollout, rows[index], columns[index], not self._updated, info) for index in parts)

    def rollout(self, batch: Prompts) -> Rollout:
        """Chains for every prompt of the batch, their rewards and advantages."""
        cond = self.policy.model.encode(batch.text)
        if self.explore is not None:
            cond = self.explore(self.policy.model, batch.text, cond, self.generator)
        generators = row_generators(row_seeds(len(batch.text), self.generator))
        x = self.policy.noise(len(batch.text), generators)
        if self.same_noise:
            x = x[(batch.group[:, None] == batch.group[None, :]).int().argmax(1)]
        chains, reward = scored_chains(self.policy, self.reward, batch, x, cond, generators)
        advantage = self.credit(batch.text, reward.cpu(), batch.group).to(reward.device)
        advantage = advantage.clamp(-self.max_advantage, self.max_advantage)
        return Rollout(chains.xs, chains.ts, chains.log_prob, chains.mask, cond, reward, advantage, batch.group)

    def loss(self, cells: Cells) -> Loss:
        """The objective, summed over cells. Raises RuntimeError when the ratio is not 1 before the first update."""
        law, _ = self.policy.kernel(self.policy.denoiser, cells.x, cells.t, cells.s, cells.cond)
        scale = 1 / law.event_size if self.per_dimension else 1.0
        now, acting = law.log_prob(cells.x_next) * scale, cells.log_prob * scale
        log_ratio = (now - acting).detach()
        if cells.on_policy:
            self._check_ratio(log_ratio)
        advantage = cells.advantage * _noise(law) if self.noise_weighting else cells.advantage
        total = self.objective(now, acting, advantage).sum()
        metrics = {"approx_kl": 0.5 * log_ratio.square().mean(), "ratio_max": log_ratio.exp().max()}
        if self.kl_weight:
            with torch.no_grad(), self.policy.model.reference():
                before, _ = self.policy.kernel(self.policy.denoiser, cells.x, cells.t, cells.s, cells.cond)
            kl = law.kl(before) * scale
            total = total + self.kl_weight * kl.sum()
            metrics["kl"] = kl.detach().mean()
        return Loss(total, torch.tensor(float(len(now))), metrics)

    def _check_ratio(self, log_ratio: Tensor) -> None:
        worst = float(log_ratio.abs().max())
        if worst > self.ratio_tolerance:
            raise RuntimeError(
                f"the log-ratio to the acting policy is {worst:.2e} before the first update, wanted 0 (up to "
                f"{self.ratio_tolerance:.0e}): the network answers differently in training than in sampling; use "
                "float32, or equal sizes of sampling and training batches"
            )

    def after_step(self) -> None:
        """The policy has moved: ratios may differ from 1 until the next rollout."""
        self._updated = True


def _noise(law: Transition) -> Tensor:
    """(B,) the standard deviation, which must be one a row."""
    if not isinstance(law, Gaussian) or law.std.ndim != 1:
        raise TypeError(f"noise_weighting needs Gaussian moves with one std a row; got {type(law).__name__}")
    return law.std


@dataclass(frozen=True)
class Settings(PolicyGradientSettings):
    """Clipped policy gradient with per-prompt statistics."""

    eta: float = 1.0
    """Noise of the DDIM kernel: 1 is the ancestral step. Flow models take Flow-GRPO's kernel instead."""
    buffer: int = 32
    """Rewards remembered for each prompt."""
    min_count: int = 16
    """Rewards of a prompt before its own statistics are used."""

    def check(self) -> None:
        """As the shared settings; a policy needs noise."""
        super().check()
        if not 0 < self.eta <= 1:
            raise ValueError(f"eta is {self.eta}; wanted above 0, up to 1: a policy without noise has no likelihood")
        if not 1 <= self.min_count <= self.buffer:
            raise ValueError(f"min_count is {self.min_count}; wanted 1 to buffer, which is {self.buffer}")

    def build(self, model: TextToImage, reward: Reward, generator: torch.Generator) -> DDPO:
        """The method on this model."""
        kernel = stochastic_solver(model.denoiser, self.eta)
        credit: Credit = group_relative if self.group_relative else per_prompt(self.buffer, self.min_count)
        return build(self, model, reward, generator, kernel, credit, skip_last=isinstance(kernel, FlowSDE))


def build(
    settings: PolicyGradientSettings,
    model: TextToImage,
    reward: Reward,
    generator: torch.Generator,
    kernel: Kernel,
    credit: Credit,
    *,
    detach_null: bool = False,
    same_noise: bool = False,
    skip_last: bool = False,
) -> DDPO:
    """DDPO with any kernel and credit: what the methods that share this file differ in."""
    explore = settings.exploration()
    return DDPO(
        settings.policy(model, noise_until(kernel, settings.noise_until), explore, detach_null),
        reward,
        credit=credit,
        objective=importance(settings.clip) if settings.clip else score_function,
        minibatch=settings.minibatch,
        updates=settings.updates,
        inner_epochs=settings.inner_epochs,
        move_fraction=settings.move_fraction,
        kl_weight=settings.kl_weight,
        noise_weighting=settings.noise_weighting,
        same_noise=same_noise,
        skip_last=skip_last,
        explore=explore,
        generator=generator,
    )
