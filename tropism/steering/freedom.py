"""FreeDoM: DPS that makes each move several times, with noise in between.

Yu et al.: FreeDoM: Training-Free Energy-Guided Conditional Diffusion Model, 2023 (2303.09833, algorithm 2). The point
``rho`` with recurrence of TFG's family; ``guidance.reward`` has the formula and the departures.
"""

from __future__ import annotations

from dataclasses import dataclass

from tropism.steering import tfg
from tropism.steering.settings import GradientSettings
from tropism.steering.task import Task


@dataclass(frozen=True)
class Settings(GradientSettings):
    """The gradient of the reward through the network, with time travel."""

    rho: float = 1.0
    """Strength of the gradient through the network."""
    recurrence: int = 2
    """Times that each move is made, with noise in between."""

    def check(self) -> None:
        """As the family's."""
        self.tfg().check()

    def guide(self, task: Task) -> Task:
        """Raises TypeError for a reward without a gradient."""
        return self.tfg().guide(task)

    def tfg(self) -> tfg.Settings:
        """What it is in the family."""
        return tfg.Settings(self.scale, self.times, self.limit, rho=self.rho, recurrence=self.recurrence)
