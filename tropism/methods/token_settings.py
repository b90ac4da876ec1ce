"""What the distillations of token models share: their settings, and the teacher that these describe."""

from __future__ import annotations

from dataclasses import dataclass

from tropism.base import Distillable
from tropism.distillation import Before
from tropism.methods.distilling import StudentSettings
from tropism.policy import Policy
from tropism.samplers import solver


@dataclass(frozen=True)
class TokenDistillationSettings(StudentSettings):
    """Flags and YAML keys of every distillation of a model of image tokens."""

    student_steps: int = 1
    """Moves of the student: it says all tokens, keeps the first part of them, and says the rest anew."""
    inference_steps: int = 20
    """Not used: the teacher has a move a token."""
    prompts_per_step: int = 512
    """Prompts of a step (on all processes together)."""
    updates: int = 4
    """Optimizer steps of one pass over a step's prompts."""

    def teacher(self, model: Distillable) -> Policy:
        """The model as it was, token by token."""
        was, own = Before(model), solver(model.denoiser)
        return Policy(was, own, model.latent_shape[0], self.guidance_scale, microbatch=self.sample_batch)
