"""LinearAG: at some moves the answer without prompt is not asked for but foretold from what was said before.

Castillo et al.: Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models, 2023 (2312.12487), their
section 5. The coefficients are fitted before the drawing, on ``fitted_on`` chains of the task's own prompts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tropism.adaptive import adaptive, remembered
from tropism.base import take
from tropism.guidance.adaptive import Memory, fit_linear
from tropism.policy import Policy
from tropism.randomness import row_generators, row_seeds
from tropism.steering.settings import SteererSettings
from tropism.steering.task import Task


@dataclass(frozen=True)
class Settings(SteererSettings):
    """Guidance half of which is foretold."""

    threshold: float = 0.99
    """Cosine of what is believed with and without the prompt, from which on a sample is asked with it alone."""
    asked_every: int = 2
    """Moves of which one is really asked without the prompt."""
    fitted_on: int = 64
    """Fully guided chains that the coefficients are fitted on; they are drawn once, and counted."""

    def check(self) -> None:
        """As every steerer's, and the ranges above."""
        super().check()
        if not -1 <= self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold}; wanted a cosine from -1 to 1, such as 0.99")
        if self.asked_every < 1 or self.fitted_on < 1:
            raise ValueError(
                f"asked_every is {self.asked_every} and fitted_on {self.fitted_on}; wanted at least 1 of each"
            )

    @torch.no_grad()
    def guide(self, task: Task) -> Task:
        """Fits, then walks so. Raises TypeError for a policy without classifier-free guidance, ValueError for a
        guidance that changes on the way."""
        policy = task.policy
        scale = policy.model.guidance_scale if policy.guidance is None else policy.guidance
        if callable(scale):
            raise ValueError("guidance changes along the chain, and LinearAG is fitted for one scale; give a number")
        asked = [move % self.asked_every == 0 for move in range(policy.steps)]
        linear = fit_linear(self._chains(task, policy), policy.ts, float(scale), asked)
        return replace(task, policy=policy.with_(walker=adaptive(self.threshold, linear)))

    def _chains(self, task: Task, policy: Policy) -> list[Memory]:
        """What chains of the task's prompts remember, by micro-batches, from noise of their own."""
        rows = torch.arange(self.fitted_on) % task.count
        generators = row_generators(row_seeds(self.fitted_on, torch.Generator().manual_seed(0)))
        x, cond = policy.noise(self.fitted_on, generators), take(task.cond(), rows.to(policy.device))
        parts = torch.arange(self.fitted_on).split(policy.microbatch)
        return [
            remembered(
                policy.kernel, policy.denoiser, x[part], policy.ts, take(cond, part), [generators[i] for i in part]
            )
            for part in parts
        ]
