"""Universal guidance: forward and backward gradients of the reward, and moves that are made several times.

Bansal et al.: Universal Guidance for Diffusion Models, 2023 (2302.07121, algorithm 1). The point ``rho``, ``mu``,
``iterations`` and recurrence of TFG's family; ``guidance.reward`` has the formula and the departures.
"""

from __future__ import annotations

from dataclasses import dataclass

from tropism.steering import tfg
from tropism.steering.settings import GradientSettings
from tropism.steering.task import Task


@dataclass(frozen=True)
class Settings(GradientSettings):
    """Forward and backward gradients of the reward."""

    rho: float = 1.0
    """Strength of the gradient through the network."""
    mu: float = 1.0
    """Strength of the gradient on the believed sample itself, which needs no pass back through the network."""
    iterations: int = 2
    """Steps of that second gradient."""
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
        return tfg.Settings(
            self.scale, self.times, self.limit, self.rho, self.mu, self.iterations, 0, self.recurrence, False
        )
