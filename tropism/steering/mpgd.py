"""MPGD: the gradient of the reward on the believed sample, without a pass back through the network.

He et al.: Manifold Preserving Guided Diffusion, 2023 (2311.16424, algorithm 1, without its projection). The point
``mu`` of TFG's family; ``guidance.reward`` has the formula and the departures.
"""

from __future__ import annotations

from dataclasses import dataclass

from tropism.steering import tfg
from tropism.steering.settings import GradientSettings
from tropism.steering.task import Task


@dataclass(frozen=True)
class Settings(GradientSettings):
    """The gradient of the reward on the believed sample."""

    mu: float = 1.0
    """Strength of the gradient on the believed sample itself, which needs no pass back through the network."""

    def check(self) -> None:
        """As the family's."""
        self.tfg().check()

    def guide(self, task: Task) -> Task:
        """Raises TypeError for a reward without a gradient."""
        return self.tfg().guide(task)

    def tfg(self) -> tfg.Settings:
        """What it is in the family."""
        return tfg.Settings(self.scale, self.times, self.limit, rho=0.0, mu=self.mu)
