"""Beam search over noise: at some moves each chain draws several next states, and the best of all go on.

With one chain and every move it is SVDD with a temperature of 0 (Li et al. 2024: Derivative-Free Guidance in Continuous
and Discrete Diffusion Models with Soft Value-Based Decoding, 2408.08252). It looks for a high reward and has no law.
"""

from __future__ import annotations

from dataclasses import dataclass

from tropism.particles import beam_search
from tropism.steering.settings import ResamplingSettings
from tropism.steering.task import Steered, Task, of_particles


@dataclass(frozen=True)
class Settings(ResamplingSettings):
    """Chains that branch while they are drawn, of which the best go on."""

    particles: int = 4
    """Chains of each sample."""
    expand: int = 2
    """Next states that each chain draws where it branches."""

    def check(self) -> None:
        """As the shared settings, and at least one next state."""
        super().check()
        if self.expand < 1:
            raise ValueError(f"expand is {self.expand}; wanted at least 1")

    def draw(self, task: Task) -> Steered:
        """Raises ValueError for a model whose moves draw no noise."""
        task = task.noisy(self.eta, self.noise_level)
        x, cond, generators, score = task.particles(self.particles)
        at = self.decisions(task.policy.steps)
        return of_particles(*beam_search(task.policy, x, cond, score, expand=self.expand, at=at, generator=generators))
