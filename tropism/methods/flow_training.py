"""What the methods share that learn velocities from pictures: their settings, and where states come from."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tropism.base import Distillable
from tropism.distillation import Noised, Pictures
from tropism.distillation.noised import Times
from tropism.methods.picture_settings import PictureSettings


@dataclass(frozen=True)
class FlowTrainingSettings(PictureSettings):
    """Flags and YAML keys of every method that learns velocities from pictures. No chain is drawn while training."""

    guidance_scale: float | None = None
    """Classifier-free guidance that the student learns, so that it needs none; none: the model's default; 1: none."""

    def scale(self, model: Distillable) -> float:
        """The guidance that is learnt."""
        return model.guidance_scale if self.guidance_scale is None else self.guidance_scale

    def pairs(
        self, model: Distillable, pictures: Pictures, times: Times, generator: torch.Generator, near: bool = True
    ) -> Noised:
        """Noised pictures at t, which lead to s, or to their clean end."""
        passing = (self.minibatch, self.updates, self.passes, generator)
        return Noised(model, pictures, times, *passing, drop=self.drop, near=near)
