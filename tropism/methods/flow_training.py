"""What the methods share that learn velocities from pictures: their settings, and where states come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from tropism.base import Distillable
from tropism.distillation import Noised, Pictures
from tropism.distillation.noised import Times
from tropism.methods.distilling import StudentSettings


@dataclass(frozen=True)
class FlowTrainingSettings(StudentSettings):
    """Flags and YAML keys of every method that learns velocities from pictures. No chain is drawn while training."""

    needs_pictures: ClassVar[bool] = True

    inference_steps: int = 20
    """Not used: nothing is drawn while training."""
    guidance_scale: float | None = None
    """Classifier-free guidance that the student learns, so that it needs none; none: the model's default; 1: none."""
    prompts_per_step: int = 64
    """Prompts of a step (on all processes together)."""
    images_per_prompt: int = 1
    """Pictures of each prompt."""
    updates: int = 4
    """Optimizer steps of one pass over a step's pictures."""
    passes: int = 5
    """Passes over the pictures of a step, each with its own noise and times."""
    drop: float = 0.1
    """Share of rows that are trained without their prompt."""

    def check(self) -> None:
        """As the settings of a student, and the ranges above."""
        super().check()
        if not 0 <= self.drop < 1:
            raise ValueError(f"drop is {self.drop}; wanted 0 to below 1")
        images = self.prompts_per_step * self.images_per_prompt
        if self.updates > images:
            raise ValueError(f"updates is {self.updates}; wanted at most the {images} pictures of a step")

    def scale(self, model: Distillable) -> float:
        """The guidance that is learnt."""
        return model.guidance_scale if self.guidance_scale is None else self.guidance_scale

    def pairs(
        self, model: Distillable, pictures: Pictures, times: Times, generator: torch.Generator, near: bool = True
    ) -> Noised:
        """Noised pictures at t, which lead to s, or to their clean end."""
        passing = (self.minibatch, self.updates, self.passes, generator)
        return Noised(model, pictures, times, *passing, drop=self.drop, near=near)
