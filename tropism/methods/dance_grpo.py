"""DanceGRPO: Unleashing GRPO on Visual Generation (Xue et al. 2025, 2505.07818).

DDPO with group-relative advantages on an SDE of constant noise (flow models) or ancestral DDIM steps (diffusion
models), the images of a group started from one noise, and a random share of the moves trained on.

Departures from XueZeyue/DanceGRPO: those of ``ConstantSDE`` and ``DDPO``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tropism.base import Kernel, Reward, TextToImage
from tropism.credit import group_relative
from tropism.methods.ddpo import DDPO, build
from tropism.methods.settings import PolicyGradientSettings
from tropism.samplers import ConstantSDE, solver
from tropism.schedules import RectifiedFlow


@dataclass(frozen=True)
class Settings(PolicyGradientSettings):
    """Group-relative policy gradient, equal starting noise within a group."""

    inference_steps: int = 16
    group_relative: bool = True
    move_fraction: float = 0.6
    eta: float = 0.3
    """Noise of the SDE on flow models; diffusion models take ancestral steps."""
    same_noise: bool = True
    """Start the images of a group from the same noise."""

    def check(self) -> None:
        """As the shared settings; a policy needs noise."""
        super().check()
        if self.eta <= 0:
            raise ValueError(f"eta is {self.eta}; wanted above 0, such as 0.3")

    def build(self, model: TextToImage, reward: Reward, generator: torch.Generator) -> DDPO:
        """The method on this model."""
        flow = isinstance(model.denoiser.schedule, RectifiedFlow)
        kernel: Kernel = ConstantSDE(self.eta) if flow else solver(model.denoiser, 1.0)
        return build(self, model, reward, generator, kernel, group_relative, same_noise=self.same_noise)
