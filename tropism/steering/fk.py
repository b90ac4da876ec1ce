"""Feynman-Kac steering: particles that are resampled on the way by what they are going to be.

Singhal et al.: A General Framework for Inference-time Scaling and Steering of Diffusion Models, 2025 (2501.06848). The
particles are weighted samples of p(x_0) exp(scale r(x_0)) / Z; the best of them is shown. ``particles.fk`` has the
method and its departures from the authors' code. The reward needs no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tropism.particles import POTENTIALS, SCHEMES, fk_steer
from tropism.steering.settings import ResamplingSettings
from tropism.steering.task import Steered, Task, of_particles


@dataclass(frozen=True)
class Settings(ResamplingSettings):
    """Particles that are weighed and resampled while they are drawn."""

    scale: float = 10.0
    """Of the reward in the law exp(scale reward) that the samples are tilted by."""
    potential: Literal["difference", "max", "sum", "immediate", "importance"] = "difference"
    """How rewards on the way become weights; the law is the same with each, the spread is not."""
    resampling: Literal["systematic", "stratified", "multinomial", "residual"] = "systematic"
    """How particles are drawn in proportion to their weights."""
    ess_below: float = 1.0
    """Resample where the effective number of particles is below this share of them; 1: always."""

    def check(self) -> None:
        """As the shared settings, and the ranges above."""
        super().check()
        if not 0 < self.ess_below <= 1:
            raise ValueError(f"ess_below is {self.ess_below}; wanted above 0, up to 1")

    def draw(self, task: Task) -> Steered:
        """Raises ValueError for a model whose moves draw no noise."""
        task = task.noisy(self.eta, self.noise_level)
        x, cond, generators, score = task.particles(self.particles)
        found = fk_steer(
            task.policy,
            x,
            cond,
            score,
            scale=self.scale,
            potential=POTENTIALS[self.potential],
            at=self.decisions(task.policy.steps),
            resample=SCHEMES[self.resampling],
            ess_below=self.ess_below,
            generator=generators,
        )
        return of_particles(*found)
