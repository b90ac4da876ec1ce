"""MLCM: Multistep Consistency Distillation of latent diffusion models (Xie et al. 2024, 2406.05768).

The teacher's chain is cut into as many equal segments as the student has moves. Two neighbouring states of one segment
must lead the student to one state at the segment's end (phased consistency models, 2405.18407, do the same on noised
data), and at its first states the teacher's chain itself says where that is. The student then walks from end to end,
deterministically: plain DDIM or Euler steps without guidance. States come from the teacher's own chains, so no data
are needed. Stage 2 ties the segments together: the starts of two neighbours must lead to one clean sample.

Departures from the paper (OPPO-Mente-Lab/TLCM released inference only):
- the distance is a choice, theirs is l2;
- whole chains are walked and all their states are used, where they walk to one drawn state;
- ``direct`` compares with where the teacher's own chain is at the segment's end, not with where the student carries the
  nearer state;
- the states of stage 2 are the teacher's own as well, where theirs are the student's samples, noised again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from tropism.base import Distillable, Reward
from tropism.distillation import Distillation
from tropism.distillation.pairs import Places, across, straight, within
from tropism.methods.distilling import DirectDistillationSettings, latent_size


@dataclass(frozen=True)
class Settings(DirectDistillationSettings):
    """Segments of the teacher's chain, each learnt as one deterministic move."""

    skip: int = 1
    """Moves of the teacher between the two states of a pair."""
    stage: Literal[1, 2] = 1
    """2, after stage 1 (start_from its run): the starts of neighbouring segments must lead to one clean sample, so that
    fewer moves than segments do as well."""

    def check(self) -> None:
        """As the shared settings; segments are whole moves."""
        super().check()
        if self.inference_steps % self.student_steps:
            raise ValueError(
                f"inference_steps is {self.inference_steps}; wanted a multiple of student_steps, which is "
                f"{self.student_steps}: a segment is so many moves of the teacher"
            )
        if self.skip < 1:
            raise ValueError(f"skip is {self.skip}; wanted at least 1")
        if self.stage == 2 and self.direct:
            raise ValueError("direct is given with stage 2, which compares the student with itself; leave one out")

    def build(self, model: Distillable, reward: Reward, generator: torch.Generator) -> Distillation:
        """The method on this model; the reward is not learnt from."""
        student = self.student(model, "ode")
        chains = self.chains(self.places(), generator)
        return Distillation(
            student, self.teacher(model, student), chains, generator, self.measure(latent_size(student))
        )

    def places(self) -> Places:
        """Which states of a chain make a pair, and where they are carried."""
        segments = self.student_steps
        if self.stage == 2:
            return across(segments)
        return straight(segments, segments, self.asked) if self.direct else within(segments, self.skip)
