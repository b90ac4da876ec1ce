"""DPS: the gradient of the reward through the network, at every move.

Chung et al.: Diffusion Posterior Sampling for General Noisy Inverse Problems, 2022 (2209.14687, algorithm 1). The point
``rho`` of TFG's family; ``guidance.reward`` has the formula and the departures.
"""

from __future__ import annotations

from dataclasses import dataclass

from tropism.steering import tfg
from tropism.steering.settings import GradientSettings
from tropism.steering.task import Task


@dataclass(frozen=True)
class Settings(GradientSettings):
    """The gradient of the reward through the network."""

    rho: float = 1.0
    """Strength of the gradient through the network."""

    def check(self) -> None:
        """As the family's."""
        self.tfg().check()

    def guide(self, task: Task) -> Task:
        """Raises TypeError for a reward without a gradient."""
        return self.tfg().guide(task)

    def tfg(self) -> tfg.Settings:
        """What it is in the family."""
        return tfg.Settings(self.scale, self.times, self.limit, rho=self.rho)
