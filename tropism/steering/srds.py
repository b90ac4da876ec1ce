"""SRDS: the same chain found in fewer serial network calls, by refining a rough one everywhere at once.

Selvam, Merchant, Ermon: Self-Refining Diffusion Samplers: Enabling Parallelization via Parareal Iterations, 2024
(2412.08292). No reward is followed. It is worth its calls where a device has room for a wider batch, and many moves are
made. ``samplers.parallel`` has the method and its departures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from tropism.base import take
from tropism.samplers import refine
from tropism.steering.settings import SteererSettings
from tropism.steering.task import Steered, Task


@dataclass(frozen=True)
class Settings(SteererSettings):
    """A chain that is refined in parallel."""

    rewarded: ClassVar[bool] = False

    tolerance: float = 0.001
    """Stop once no end has changed by more than this (mean absolute change of a latent); 0: exact."""
    refinements: int | None = None
    """Most iterations; none: until it is exact."""

    def check(self) -> None:
        """As every steerer's, and the ranges above."""
        super().check()
        if self.tolerance < 0 or (self.refinements is not None and self.refinements < 1):
            raise ValueError(
                f"tolerance is {self.tolerance} and refinements {self.refinements}; wanted 0 or more, and at least 1 "
                "or none"
            )

    @torch.no_grad()
    def draw(self, task: Task) -> Steered:
        """Samples are refined together by micro-batches, each as long as the slowest of them needs. Raises ValueError
        for a model whose moves draw noise, and with guides that walk in their own way."""
        task.check_walk()
        policy, (x, _), cond = task.policy, task.start(), task.cond()
        ends, steps = [], []
        for rows in torch.arange(task.count).split(policy.microbatch):
            found = refine(
                policy.kernel,
                policy.denoiser,
                x[rows],
                policy.ts,
                take(cond, rows.to(x.device)),
                tolerance=self.tolerance,
                max_iterations=self.refinements,
                microbatch=policy.microbatch,
            )
            ends.append(found.x)
            steps.append(
                {
                    "iterations": float(found.iterations),
                    "serial_calls": float(found.serial_calls),
                    "change": found.changes[-1],
                    "widest": float(found.widest),
                }
            )
        return Steered(torch.cat(ends), steps)
