"""Feynman-Kac correctors: samples of guidance's own law, or of a colder model, instead of mixed scores.

Skreta et al.: Feynman-Kac Correctors in Diffusion: Annealing, Guidance, and Product of Experts, 2025 (2503.02819). The
law is p(x) ** (1 - w) p(x | prompt) ** w with w the guidance, to the power ``power``; the particles' weights make up
for what mixing the scores gets wrong. No reward is followed; it only says which particle is shown. ``particles.fkc``
has the method and its departures. In many dimensions weights collapse, which ``clamp`` bounds, at a bias.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tropism.guidance import network_cond
from tropism.particles import fkc, guidance
from tropism.steering.settings import SearchSettings
from tropism.steering.task import Steered, Task, of_particles


@dataclass(frozen=True)
class Settings(SearchSettings):
    """Particles of the law that guidance means."""

    power: float = 1.0
    """Of the whole law; above 1 is colder."""
    zeta: float = 1.0
    """Noise of the moves; the law does not depend on it."""
    clamp: float | None = 1.0
    """Most that a move adds to a log-weight, about the mean of its prompt; none: exact, until weights collapse."""
    ess_below: float = 0.5
    """Resample where the effective number of particles is below this share of them; 1: always."""

    def check(self) -> None:
        """As a search's, and the ranges above."""
        super().check()
        if not self.power > 0 or self.zeta < 0 or not 0 < self.ess_below <= 1:
            raise ValueError(
                f"power is {self.power}, zeta {self.zeta} and ess_below {self.ess_below}; wanted above 0, 0 or more, "
                "and above 0, up to 1"
            )
        if self.clamp is not None and self.clamp < 0:
            raise ValueError(f"clamp is {self.clamp}; wanted 0 or more, or none")

    def draw(self, task: Task) -> Steered:
        """Raises ValueError with guides, and for a guidance that changes on the way: the law would be another."""
        policy, model = task.policy, task.policy.model
        scale = model.guidance_scale if policy.guidance is None else policy.guidance
        if policy.guide is not None or callable(scale):
            raise ValueError("fkc samples the law of one guidance; leave other guides, or guidance that changes, out")
        x, cond, generators, score = task.particles(self.particles)
        factors = guidance(model.denoiser, network_cond(cond), model.null(), float(scale))
        found = fkc(
            [replace(each, power=each.power * self.power) for each in factors if each.power],
            x,
            with_signal(task, policy.ts),
            zeta=self.zeta,
            clamp=self.clamp,
            ess_below=self.ess_below,
            score=score,
            microbatch=policy.microbatch,
            generator=generators,
        )
        return of_particles(*found)


def with_signal(task: Task, ts: Tensor) -> Tensor:
    """ts (K + 1,) from a time on at which there is some signal: a straight path begins at 0.99 instead of 1."""
    alpha = task.policy.model.denoiser.schedule.alpha(ts[:1])
    return ts if float(alpha) > 0 else torch.cat([ts.new_tensor([max(0.99, float(1 + ts[1]) / 2)]), ts[1:]])
