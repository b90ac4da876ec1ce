"""DMD2: Improved Distribution Matching Distillation (Yin et al. 2024, 2405.14867).

What the student says, x, is noised to a time t, and x moves to where the teacher finds it likelier than the student's
own law does:

    L = 0.5 |x - sg(x - g)|^2,   g = ((x - D_real(x_t)) - (x - D_fake(x_t))) / mean|x - D_real(x_t)|

with D_real the guided teacher and D_fake a network that learns, by denoising what the student says, between the
student's updates (``distillation.matching``). No chain of the teacher is drawn and no pair of noise and picture needed.
A student of several moves is asked at states of its own chain (section 4.4), so that training sees what drawing sees.

Departures from tianweiy/DMD2:
- ``fake_updates`` of the fake score follow an update on the same answers, each with fresh noise, where theirs draw
  fresh answers for each; one is the default, as their five are not needed by small networks (docs/methods/dmd2.md);
- D_fake is unguided and may begin as the student (``fake_from``), then with a warm-up of its own;
- the adversarial term is hinge loss by a small network on clean latents and prompt, as in SCott here, where theirs is
  a head on D_fake's features of noised ones;
- with ``any_count`` updates take turns with every number of moves up to ``student_steps``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from tropism.base import Distillable, Reward
from tropism.distillation import Before, Pictures
from tropism.distillation.adversarial import Adversarial, Discriminator
from tropism.distillation.matching import FakeScore, Matching
from tropism.methods.distilling import StudentSettings
from tropism.policy import Policy
from tropism.samplers import solver


@dataclass(frozen=True)
class Settings(StudentSettings):
    """Distribution matching: the student's samples get the law of the guided teacher's."""

    student_steps: int = 1
    """Moves of the student, for which it is made."""
    any_count: bool = False
    """Learn every number of moves up to student_steps, in turn by chance."""
    inference_steps: int = 20
    """Not used: no chain of the teacher is drawn while training."""
    prompts_per_step: int = 512
    """Prompts of a step (on all processes together)."""
    updates: int = 4
    """Optimizer steps of one pass over a step's prompts."""
    learning_rate: float = 3e-4
    fake_learning_rate: float = 1e-3
    """Of the fake score."""
    fake_updates: int = 1
    """Of the fake score, after each of the student's; the paper's is 5."""
    fake_from: Literal["teacher", "student"] = "teacher"
    """What the fake score begins as; the student where a model cannot go back to how it was."""
    warmup: int = 20
    """Updates of the fake score before the student's first."""
    adversarial_weight: float = 0.0
    """Of an adversarial term, for which pictures are needed (a column image; those of scenes are drawn)."""
    discriminator_width: int = 64
    """Channels of its layers."""
    discriminator_rate: float = 1e-3
    """Its learning rate."""

    def check(self) -> None:
        """As the settings of a student, and the ranges above."""
        super().check()
        if not 0 < self.fake_learning_rate < 1 or self.fake_updates < 1 or self.warmup < 0:
            raise ValueError(
                f"fake_learning_rate is {self.fake_learning_rate}, fake_updates {self.fake_updates} and warmup "
                f"{self.warmup}; wanted between 0 and 1, at least 1, and 0 or more"
            )
        if self.adversarial_weight < 0 or self.discriminator_width < 1 or not 0 < self.discriminator_rate < 1:
            raise ValueError(
                f"adversarial_weight is {self.adversarial_weight}, discriminator_width {self.discriminator_width} and "
                f"discriminator_rate {self.discriminator_rate}; wanted 0 or more, at least 1, and between 0 and 1"
            )
        if self.any_count and self.student_steps == 1:
            raise ValueError("any_count is given with student_steps 1; wanted at least 2, or leave any_count out")

    @property
    def needs_pictures(self) -> bool:
        """Whether ``build`` is given pictures."""
        return self.adversarial_weight > 0

    def build(
        self, model: Distillable, reward: Reward, generator: torch.Generator, pictures: Pictures | None = None
    ) -> Matching:
        """The method on this model; the reward is not learnt from."""
        student = self.student(model, "consistency")
        was = Before(model, student.model.grid)
        own = solver(model.denoiser)
        return Matching(
            student,
            Policy(was, own, self.inference_steps, self.guidance_scale, microbatch=self.sample_batch),
            FakeScore.of(model, self.fake_learning_rate, self.fake_from == "teacher"),
            generator,
            self.minibatch,
            self.updates,
            self.passes,
            self.fake_updates,
            self.warmup,
            self.any_count,
            self._adversary(model, generator) if pictures is not None else None,
            pictures,
        )

    def _adversary(self, model: Distillable, generator: torch.Generator) -> Adversarial:
        """As precise as the student."""
        example = next(iter(model.parameters()))
        net = Discriminator(model.latent_shape, model.null(), self.discriminator_width, generator)
        dtype = torch.promote_types(example.dtype, torch.float32)
        return Adversarial(net.to(example.device), self.adversarial_weight, self.discriminator_rate, dtype)
