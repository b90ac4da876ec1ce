"""Best of n: draw several samples of each prompt and show the one that scores highest.

The baseline of every search (Stiennon et al. 2020, 2009.01325, call it rejection sampling). Its first sample is the one
that is drawn without steering, so at equal seeds it is never worse by its own reward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tropism.particles import Particles
from tropism.steering.settings import SearchSettings
from tropism.steering.task import Steered, Task, chains


@dataclass(frozen=True)
class Settings(SearchSettings):
    """Several samples of each prompt, of which the best is shown."""

    def draw(self, task: Task) -> Steered:
        """As the policy draws; a sample without a score is never the best while another has one."""
        latents, shape = chains(task, self.particles), (task.count, self.particles)
        rows = torch.arange(task.count).repeat_interleave(self.particles)
        reward, equal = task.score(latents, rows).reshape(shape), torch.zeros(shape, dtype=torch.float64)
        every = torch.arange(self.particles).expand(shape)
        found = Particles(latents.unflatten(0, shape), equal, every, equal[:, 0], reward)
        return Steered(found.at(found.best()), particles=found)
