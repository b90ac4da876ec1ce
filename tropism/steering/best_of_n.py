"""Best of n: draw several samples of each prompt and show the one that scores highest.

The baseline of every search (Stiennon et al. 2020, 2009.01325, call it rejection sampling). Its first sample is the one
that is drawn without steering, so at equal seeds it is never worse by its own reward.
"""

from __future__ import annotations

from dataclasses import dataclass

from tropism.particles import best_of_n
from tropism.steering.settings import SearchSettings
from tropism.steering.task import Steered, Task, of_particles


@dataclass(frozen=True)
class Settings(SearchSettings):
    """Several samples of each prompt, of which the best is shown."""

    def draw(self, task: Task) -> Steered:
        """As the policy draws; a sample without a score is never the best while another has one."""
        x, cond, generators, score = task.particles(self.particles)
        return of_particles(*best_of_n(task.policy, x, cond, score, generator=generators))
