"""Best of n: draw several samples of each prompt and show the one that scores highest.

The baseline of every search (Stiennon et al. 2020, 2009.01325, call it rejection sampling). Its first sample is the one
that is drawn without steering, so at equal seeds it is never worse by its own reward.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tropism.base import pick
from tropism.steering.settings import SearchSettings
from tropism.steering.task import Plain, Steered, Task


@dataclass(frozen=True)
class Settings(SearchSettings):
    """Several samples of each prompt, of which the best is shown."""

    def draw(self, task: Task) -> Steered:
        """Plain samples; one without a score is never the best while another has one."""
        rows = torch.arange(task.count).repeat_interleave(self.particles)
        wide = replace(task, prompts=pick(task.prompts, rows), seeds=task.branched(self.particles))
        latents = Plain().draw(wide).latents
        scores = task.score(latents, rows).reshape(task.count, self.particles)
        best = scores.nan_to_num(-torch.inf).argmax(1)
        every = latents.reshape(task.count, self.particles, *latents.shape[1:])
        return Steered(every[torch.arange(task.count), best.to(latents.device)])
