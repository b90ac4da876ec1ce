"""What the methods share that learn from pictures: how many, how often, and how many without their prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tropism.methods.distilling import StudentSettings


@dataclass(frozen=True)
class PictureSettings(StudentSettings):
    """Flags and YAML keys of every method that learns from pictures. No chain is drawn while training."""

    needs_pictures: ClassVar[bool] = True

    inference_steps: int = 20
    """Not used: nothing is drawn while training."""
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
