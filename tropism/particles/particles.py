"""Weighted samples of every prompt, and what is asked of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tropism.particles.resampling import Resample, systematic
from tropism.randomness import Randomness


def ess(log_weight: Tensor) -> Tensor:
    """The effective sample size (sum w)^2 / sum w^2 of (..., K) logs, float64: K for equal weights, 1 for a single one.

    NaN where all are -inf.
    """
    weight = log_weight.double().softmax(-1)
    return 1 / weight.square().sum(-1)


def log_mean(log_weight: Tensor) -> Tensor:
    """log of the mean weight, (..., K) -> (...), float64."""
    return log_weight.double().logsumexp(-1) - math.log(log_weight.shape[-1])


def unique(index: Tensor) -> Tensor:
    """How many different values each row has: (P, K) int64 -> (P,) int64."""
    ordered = index.sort(-1).values
    return 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(-1)


@dataclass(frozen=True)
class Particles:
    """K weighted samples of each of P prompts. As rows (B = P * K) the particles of a prompt are contiguous.

    ``log_weight`` is not normalised: it is what has been collected since the prompt was last resampled, and equal (0)
    right after. ``log_evidence`` is the log of an unbiased estimate of the target's normaliser and has everything,
    these weights too. Weights are float64 on the CPU.
    """

    x: Tensor  # (P, K, ...) clean latents
    log_weight: Tensor  # (P, K) float64
    ancestor: Tensor  # (P, K) int64, from which particle of the start each comes
    log_evidence: Tensor  # (P,) float64
    reward: Tensor  # (P, K) of the clean sample; NaN = no score

    @property
    def weight(self) -> Tensor:
        """(P, K) normalised, float64."""
        return self.log_weight.softmax(-1)

    @property
    def ess(self) -> Tensor:
        """(P,) between 1 and K, of ``log_weight``."""
        return ess(self.log_weight)

    @property
    def unique_ancestors(self) -> Tensor:
        """(P,) int64: how many particles of the start have a descendant."""
        return unique(self.ancestor)

    @property
    def rows(self) -> Tensor:
        """(P * K, ...) the samples one below another."""
        return self.x.flatten(0, 1)

    def mean(self, values: Tensor | None = None) -> Tensor:
        """Weighted mean of ``values`` (P, K, ...), or of the samples: (P, ...), float64."""
        values = self.x if values is None else values
        weight = self.weight.to(values.device).reshape(*self.weight.shape, *[1] * (values.ndim - 2))
        return (weight * values.double()).sum(1)

    def best(self) -> Tensor:
        """(P,) int64: the particle with the highest reward, of several the first; by weight where there is no score.

        The highest reward is not a draw from the target: it is what best-of-n shows.
        """
        scored = ~self.reward.isnan()
        by_reward = self.reward.nan_to_num(nan=-math.inf, neginf=-math.inf).argmax(-1)
        return by_reward.where(scored.any(-1), self.log_weight.argmax(-1).to(by_reward.device))

    def draw(self, generator: Randomness = None, resample: Resample = systematic) -> Tensor:
        """(P,) int64: one particle of each prompt, in proportion to its weight."""
        return resample(self.log_weight, 1, generator)[:, 0]

    def at(self, index: Tensor) -> Tensor:
        """Samples by particle: index (P,) or (P, N) -> (P, ...) or (P, N, ...)."""
        many = index if index.ndim == 2 else index[:, None]
        found = self.x[torch.arange(len(self.x))[:, None].to(self.x.device), many.to(self.x.device)]
        return found if index.ndim == 2 else found[:, 0]

    def resampled(self, generator: Randomness = None, resample: Resample = systematic) -> Particles:
        """The same law with equal weights; the evidence stays."""
        index = resample(self.log_weight, self.log_weight.shape[-1], generator)
        return Particles(
            self.at(index),
            torch.zeros_like(self.log_weight),
            self.ancestor.gather(-1, index),
            self.log_evidence,
            self.reward.gather(-1, index.to(self.reward.device)),
        )
