"""TFG: guidance by the gradient of a reward, without training, with every knob of its family.

Ye et al.: TFG: Unified Training-Free Guidance for Diffusion Models, 2024 (2409.15761). ``dps``, ``freedom``, ``mpgd``
and ``universal`` are points of it. Strengths are in units of the law p(x_0) exp(scale r(x_0)): 1 follows it to first
order. ``guidance.reward`` has the formulas and the departures.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch

from tropism.guidance import RewardGuided, window
from tropism.samplers import recurrent_walk
from tropism.steering.settings import GradientSettings
from tropism.steering.task import Task


@dataclass(frozen=True)
class Settings(GradientSettings):
    """The gradient of the reward, through the network and beside it."""

    rho: float = 1.0
    """Strength of the gradient through the network."""
    mu: float = 0.0
    """Strength of the gradient on the believed sample itself, which needs no pass back through the network."""
    iterations: int = 1
    """Steps of that second gradient."""
    smoothing: int = 0
    """Samples around the belief over which the reward is averaged; 0: the belief itself."""
    recurrence: int = 1
    """Times that each move is made, with noise in between."""
    keep_noise: bool = True
    """Leave the believed noise as it was."""

    def check(self) -> None:
        """As the shared settings, and the ranges above."""
        super().check()
        if self.iterations < 1 or self.recurrence < 1 or self.smoothing < 0:
            raise ValueError(
                f"iterations is {self.iterations}, recurrence {self.recurrence} and smoothing {self.smoothing}; wanted "
                "at least 1, at least 1, and 0 or more"
            )

    def guide(self, task: Task) -> Task:
        """Raises TypeError for a reward without a gradient."""
        task.score.check_gradient()
        low, high = self.times
        noise = None
        if self.smoothing:  # the same for every sample, so that none depends on what it is drawn with
            generator = torch.Generator().manual_seed(0)
            noise = torch.randn(self.smoothing, *task.policy.model.latent_shape, generator=generator)
        guided = task.guided(
            lambda inner: RewardGuided(
                inner,
                lambda x0, rows: self.scale * task.score.value(x0, rows),
                window(self.rho, low, high),
                window(self.mu, low, high),
                self.iterations,
                noise=noise,
                limit=self.limit,
                keep_noise=self.keep_noise,
            )
        )
        if self.recurrence == 1:
            return guided
        walker = partial(recurrent_walk, times=self.recurrence, low=low, high=high)
        return replace(guided, policy=guided.policy.with_(walker=walker))
