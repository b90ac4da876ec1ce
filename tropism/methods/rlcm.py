"""RLCM: RL for Consistency Models (Oertell, Chang, Zhang, Brantley and Sun 2024, 2404.03673).

DDPO on a model that draws in a few hops: the action is the noise that a hop adds to the predicted clean sample,
x_s ~ N(alpha(s) f(x_t, t), sigma(s)^2), ``samplers.Consistency``. The last hop shows f(x_t, t) itself and has no
density, so H hops are H - 1 actions, and a model of one hop cannot be trained this way.

Departures from Owen-Oertell/rlcm, besides those of ``DDPO``: they store a log-probability for the last hop too, of
noise that no reward sees; advantages are clamped at 5 and not 10; the times are the model's own grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tropism.base import Reward, TextToImage
from tropism.credit import group_relative, per_prompt
from tropism.denoisers import ConsistencyDenoiser
from tropism.methods.ddpo import DDPO, build
from tropism.methods.settings import PolicyGradientSettings
from tropism.samplers import Consistency

MOVES = (2, 8)


@dataclass(frozen=True)
class Settings(PolicyGradientSettings):
    """Clipped policy gradient on the hops of a consistency model."""

    inference_steps: int = 4
    """Hops of a chain while training, 2 to 8; evaluate with as many."""
    buffer: int = 32
    """Rewards remembered for each prompt."""
    min_count: int = 16
    """Rewards of a prompt before its own statistics are used."""

    def check(self) -> None:
        """As the shared settings; few hops, one of them random."""
        super().check()
        least, most = MOVES
        if not least <= self.inference_steps <= most:
            raise ValueError(f"inference_steps is {self.inference_steps}; wanted {least} to {most} hops, such as 4")
        if not 1 <= self.min_count <= self.buffer:
            raise ValueError(f"min_count is {self.min_count}; wanted 1 to buffer, which is {self.buffer}")

    def build(self, model: TextToImage, reward: Reward, generator: torch.Generator) -> DDPO:
        """The method on this model. Raises ValueError for one that does not draw in hops."""
        check_hops(model)
        credit = group_relative if self.group_relative else per_prompt(self.buffer, self.min_count)
        return build(self, model, reward, generator, Consistency(), credit)


def check_hops(model: TextToImage) -> None:
    """Raises ValueError for a model that is no consistency model."""
    if not isinstance(model.denoiser, ConsistencyDenoiser):
        name = type(model.denoiser).__name__
        raise ValueError(
            f"got {name}; wanted a consistency model, such as scenes-lcm or what tropism distill lcm makes"
        )
