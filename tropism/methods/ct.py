"""CT: consistency training (Song et al. 2023, 2303.01469, algorithm 3), the baseline of iCT.

Two neighbouring levels of one noise on one picture, drawn evenly, must lead the student to one clean sample; the nearer
is judged by an average of the student. The number of levels N grows as a square root, and the decay of the average with
it: exp(s_0 ln(mu_0) / N) (appendix C). The distance is l2, all pairs weigh the same.

Departures: those of ``ict``, and l2 where they use LPIPS on pictures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from tropism.base import Distillable, Reward
from tropism.distillation import Distillation, Pictures
from tropism.distillation.curriculum import Neighbours, rooted, uniform
from tropism.ema import Ema
from tropism.methods.distilling import latent_size
from tropism.methods.training import ConsistencyTrainingSettings, check_levels


@dataclass(frozen=True)
class Settings(ConsistencyTrainingSettings):
    """Plain consistency training, from pictures."""

    distance: Literal["huber", "l2", "pseudo-huber"] = "l2"
    """Between what student and target say."""
    first_pairs: int = 2
    """Pairs of neighbouring levels at first."""
    last_pairs: int = 150
    """Pairs of neighbouring levels at the end."""
    first_decay: float = 0.95
    """Of the average of the student that judges the nearer state, at first; it grows with the number of levels."""

    def check(self) -> None:
        """As the shared settings, and the ranges above."""
        super().check()
        check_levels(self.first_pairs, self.last_pairs)
        if not 0 < self.first_decay < 1:
            raise ValueError(f"first_decay is {self.first_decay}; wanted between 0 and 1")

    def build(self, model: Distillable, reward: Reward, generator: torch.Generator, pictures: Pictures) -> Distillation:
        """The method on this model; the reward is not learnt from."""
        student = self.student(model, "consistency")
        growth = rooted(self.first_pairs, self.last_pairs, self.total_updates)
        times = Neighbours(self.span(model), growth, uniform, weighted=False)
        return Distillation(
            student,
            self.teacher(model, student),
            self.pairs(model, pictures, times, generator),
            generator,
            self.measure(latent_size(student)),
            Ema(model.parameters(), self.first_decay),
            decay=lambda made: math.exp(self.first_pairs * math.log(self.first_decay) / growth(made)),
        )
