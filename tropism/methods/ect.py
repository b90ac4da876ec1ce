"""ECT: easy consistency tuning (Geng et al. 2024, 2406.14548, section 3; code locuslab/ect).

A denoiser becomes a consistency model: the nearer level r is a share of the level t, none at first (which is what the
denoiser was trained for) and ever more in stages: r = max(0, t (1 - n(t) / q^(a + 1))), n(t) = 1 + k sigmoid(-b t).
Where r is 0 the target is the picture itself; elsewhere it is what the student says at r, with the same noise. The
distance is the norm of the difference, divided by t - r.

Departures from their code:
- AdamW, where they use RAdam; no dropout;
- sqrt(|d|^2 + c^2) - c with c = 0.00054 sqrt(D): theirs is 0 there, without a gradient where the answers are equal;
- a stage lasts ``total_updates`` / ``stages``; theirs changes every so many images;
- levels are scaled to the data and mapped to the times of any schedule; the student has the boundary of the pipeline's
  few-step sampler while it is trained, where theirs has EDM's preconditioning without it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tropism.base import Distillable, Reward
from tropism.distillation import Distillation, Pictures
from tropism.distillation.curriculum import Ratio
from tropism.methods.distilling import latent_size
from tropism.methods.training import ConsistencyTrainingSettings


@dataclass(frozen=True)
class Settings(ConsistencyTrainingSettings):
    """Easy consistency tuning of a denoiser, from pictures."""

    stages: int = 8
    """Stages of training; in each the two levels come closer by the factor q."""
    q: float = 2.0
    """Factor between the stages; 256 with one stage is their one-hour recipe."""
    k: float = 8.0
    """How much further apart the levels of little noise are."""
    b: float = 1.0
    """How fast that ends as the level grows."""
    level_mean: float = -1.1
    """Mean of the logarithm of the level."""
    level_std: float = 2.0
    """Standard deviation of the logarithm of the level."""

    def check(self) -> None:
        """As the shared settings, and the ranges above."""
        super().check()
        if self.stages < 1 or self.stages > self.total_updates:
            raise ValueError(f"stages is {self.stages}; wanted at least 1, and at most an update each")
        if self.q <= 1:
            raise ValueError(f"q is {self.q}; wanted above 1: the levels must come closer")
        if self.k < 0 or self.b < 0 or self.level_std <= 0:
            raise ValueError(f"k is {self.k}, b {self.b} and level_std {self.level_std}; wanted 0 or more, and above 0")

    def times(self, model: Distillable) -> Ratio:
        """Which pairs of levels are drawn, as training goes on."""
        every = self.total_updates // self.stages
        return Ratio(self.span(model), self.level_mean, self.level_std, self.q, self.k, self.b, every, self.stages)

    def build(self, model: Distillable, reward: Reward, generator: torch.Generator, pictures: Pictures) -> Distillation:
        """The method on this model; the reward is not learnt from."""
        student = self.student(model, "consistency")
        source = self.pairs(model, pictures, self.times(model), generator)
        return Distillation(
            student, self.teacher(model, student), source, generator, self.measure(latent_size(student))
        )
