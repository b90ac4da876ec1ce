"""Flow-GRPO: Training Flow Matching Models via Online RL (Liu et al. 2025, 2505.05470).

DDPO on the marginal-preserving SDE of a rectified flow (``FlowSDE``), with group-relative advantages over the batch's
standard deviation, the unconditional branch detached, few moves in training and many in evaluation.

Departures from yifan123/flow_grpo: those of ``FlowSDE`` and ``DDPO``; in particular the KL is the exact one of the move
(theirs lacks the step length, its issue 78), so that their weight 0.04 is about 0.04 x the step length here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tropism.base import Reward, TextToImage
from tropism.credit import group_relative_global
from tropism.methods.ddpo import DDPO, build
from tropism.methods.settings import PolicyGradientSettings
from tropism.samplers import FlowSDE


@dataclass(frozen=True)
class Settings(PolicyGradientSettings):
    """Group-relative policy gradient for flow-matching models."""

    inference_steps: int = 10
    group_relative: bool = True
    noise_level: float = 0.7
    """Noise of the SDE; 0 would be the ODE, which has no likelihood."""

    def check(self) -> None:
        """As the shared settings; a policy needs noise."""
        super().check()
        if self.noise_level <= 0:
            raise ValueError(f"noise_level is {self.noise_level}; wanted above 0, such as 0.7")

    def build(self, model: TextToImage, reward: Reward, generator: torch.Generator) -> DDPO:
        """The method on this model. Raises TypeError when sampling if it is not a rectified flow."""
        kernel = FlowSDE(self.noise_level)
        return build(self, model, reward, generator, kernel, group_relative_global, detach_null=True, skip_last=True)
