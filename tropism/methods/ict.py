"""iCT: improved consistency training (Song and Dhariwal 2023, 2310.14189, section 3).

A consistency model from data alone. Two neighbouring levels of one noise on one picture must lead the student to one
clean sample; the nearer is judged by the student itself (no average: section 3.2). Levels are drawn from a discretised
lognormal law (eq. 10), their number doubles over training (section 3.4), the distance is pseudo-huber of the whole
vector with c = 0.00054 sqrt(D) (section 3.3), and a pair weighs one over the distance of its levels.

There is no official code. Departures from the paper, and from Kinyugo/consistency_models:
- AdamW, where they use RAdam; no dropout, hence no masks to share;
- the lowest level counts as clean, so that the boundary condition is the data's whatever the network says there;
- levels are scaled to the data (``data_std``) and mapped to the times of any schedule, so that a pipeline's network is
  trained as it is: theirs starts from nothing;
- theirs (Kinyugo's) is an element-wise pseudo-huber.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tropism.base import Distillable, Reward
from tropism.distillation import Distillation, Pictures
from tropism.methods.distilling import latent_size
from tropism.methods.training import LognormalTrainingSettings


@dataclass(frozen=True)
class Settings(LognormalTrainingSettings):
    """Improved consistency training, from pictures."""

    def build(self, model: Distillable, reward: Reward, generator: torch.Generator, pictures: Pictures) -> Distillation:
        """The method on this model; the reward is not learnt from."""
        student = self.student(model, "consistency")
        source = self.pairs(model, pictures, self.times(model), generator)
        return Distillation(
            student, self.teacher(model, student), source, generator, self.measure(latent_size(student))
        )
