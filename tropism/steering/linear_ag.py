"""LinearAG: at some moves the answer without prompt is not asked for but foretold from what was said before.

Castillo et al.: Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models, 2023 (2312.12487), their
section 5. The coefficients are fitted before the drawing, on ``fitted_on`` chains of the task's own prompts.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

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
    """Guidance most of whose unguided half is foretold."""

    rewarded: ClassVar[bool] = False

    asked: list[int] = field(default_factory=lambda: [0, 1, 2, 4])
    """Moves at which it is really asked without the prompt, 0 among them; at all others the answer is foretold."""
    fitted_on: int = 64
    """Fully guided chains that the coefficients are fitted on; they are drawn once, and counted."""

    def check(self) -> None:
        """As every steerer's, and the ranges above."""
        super().check()
        if 0 not in self.asked or min(self.asked) < 0:
            said = " ".join(map(str, self.asked)) or "empty"
            raise ValueError(f"asked is {said}; wanted moves from 0 on, 0 among them, such as 0 1 2 4")
        if self.fitted_on < 1:
            raise ValueError(f"fitted_on is {self.fitted_on}; wanted at least 1 chain")

    @torch.no_grad()
    def guide(self, task: Task) -> Task:
        """Fits, then walks so. Raises TypeError for a policy without classifier-free guidance, ValueError for a
        guidance that changes on the way."""
        policy = task.policy
        scale = policy.model.guidance_scale if policy.guidance is None else policy.guidance
        if callable(scale):
            raise ValueError("guidance changes along the chain, and LinearAG is fitted for one scale; give a number")
        asked = [move in self.asked for move in range(policy.steps)]
        linear = fit_linear(self._chains(task, policy), policy.ts, float(scale), asked)
        return replace(task, policy=policy.with_(walker=adaptive(linear=linear)))

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
