"""LCM: Latent Consistency Models (Luo et al. 2023, 2310.04378, algorithm 1), with a LoRA LCM-LoRA (2311.05556).

Consistency distillation (2303.01469, algorithm 2) of a guided teacher: two neighbouring states of one of its chains
must lead the student to one clean sample; the nearer state is judged by an average of the student (decay 0.95). The
student noises its answer again between its moves (``samplers.Consistency``) and needs no guidance: the teacher's is
folded in.

Departures from luosiallen/latent-consistency-model:
- states come from the teacher's own chains (2406.05768), so that no data are needed, unless ``data`` is pictures as
  theirs; the teacher has ``inference_steps`` moves where they step by ``skip`` = 20 of 1000;
- one guidance scale, ``guidance_scale``, unless ``told`` is the range from which every row draws its own, as theirs do:
  the network then reads it from an input of its own (2210.03142), here in the convention in which 1 is no guidance;
- huber with c = 0.01, of the size of what a latent differs by;
- ``direct`` asks the student nothing about the nearer state: the teacher's chain says where it ends, so that nothing
  drifts (docs/methods/lcm.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from tropism.base import Distillable, Reward
from tropism.distillation import Distillation, Pictures, Source, Stepped
from tropism.distillation.noised import rungs
from tropism.distillation.pairs import adjacent, straight
from tropism.ema import Ema
from tropism.methods.distilling import DirectDistillationSettings, ToldSettings, latent_size


@dataclass(frozen=True)
class Settings(ToldSettings, DirectDistillationSettings):
    """Consistency distillation, from the teacher's own chains or from pictures."""

    data: Literal["chains", "pictures"] = "chains"
    """Where states come from: the teacher's chains, or pictures with noise (a column image; those of scenes are drawn).
    """
    skip: int = 1
    """Moves of the teacher between the two states of a pair."""
    target_decay: float = 0.95
    """Of the average of the student that judges the nearer state; 0: the student itself."""

    def check(self) -> None:
        """As the shared settings, and the ranges above."""
        super().check()
        if self.direct and self.data == "pictures":
            raise ValueError("direct is given with data pictures, which have no chain of the teacher; leave one out")
        if not 1 <= self.skip <= self.inference_steps or not 0 <= self.target_decay < 1:
            raise ValueError(
                f"skip is {self.skip} and target_decay {self.target_decay}; wanted 1 to inference_steps, which is "
                f"{self.inference_steps}, and 0 to below 1"
            )

    @property
    def needs_pictures(self) -> bool:
        """Whether ``build`` is given pictures."""
        return self.data == "pictures"

    def build(
        self, model: Distillable, reward: Reward, generator: torch.Generator, pictures: Pictures | None = None
    ) -> Distillation:
        """The method on this model; the reward is not learnt from."""
        student = self.student(model, "consistency")
        teacher = self.teacher(model, student)
        places = straight(1, self.student_steps, self.asked) if self.direct else adjacent(self.skip)
        source: Source = self.chains(places, generator)
        if pictures is not None:
            times = rungs(teacher.ts, self.skip)
            sizes = (self.minibatch, self.updates, self.passes)
            source = Stepped(model, pictures, times, *sizes, generator, told=self.told)
        return Distillation(
            student,
            teacher,
            source,
            generator,
            self.measure(latent_size(student)),
            Ema(model.parameters(), self.target_decay) if self.target_decay and not self.direct else None,
        )
