"""Adaptive guidance: stop asking a network twice once both its answers agree.

Castillo et al.: Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models, 2023 (2312.12487), their
AG. Fewer network calls at nearly the same pictures; no reward is followed. ``guidance.adaptive`` has the departures.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from tropism.adaptive import adaptive
from tropism.steering.settings import SteererSettings
from tropism.steering.task import Task


@dataclass(frozen=True)
class Settings(SteererSettings):
    """Guidance only while it matters."""

    rewarded: ClassVar[bool] = False

    threshold: float = 0.99
    """Cosine of what is believed with and without the prompt, from which on a sample is asked with it alone."""

    def check(self) -> None:
        """As every steerer's, and a cosine."""
        super().check()
        if not -1 <= self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold}; wanted a cosine from -1 to 1, such as 0.99")

    def guide(self, task: Task) -> Task:
        """Raises TypeError, when it is drawn, for a policy without classifier-free guidance."""
        return replace(task, policy=task.policy.with_(walker=adaptive(self.threshold)))
