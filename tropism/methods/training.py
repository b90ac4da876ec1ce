"""What the methods of consistency training share: a consistency model from pictures, without a teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from tropism.base import Distillable
from tropism.distillation import Noised, Pictures
from tropism.distillation.curriculum import Neighbours, Span, doubling, lognormal
from tropism.distillation.noised import Coupling, Times
from tropism.methods.distilling import DistillationSettings
from tropism.methods.picture_settings import PictureSettings


@dataclass(frozen=True)
class ConsistencyTrainingSettings(PictureSettings, DistillationSettings):
    """Flags and YAML keys of every consistency training. Nothing is asked of a teacher; guidance is not learnt."""

    total_updates: int = 4000
    """Updates over which pairs of states come closer: steps x updates x passes of the run, as it is planned."""
    data_std: float = 1.0
    """Standard deviation of clean latents, with which the levels of noise scale; the papers' images have 0.5."""
    distance: Literal["huber", "l2", "pseudo-huber"] = "pseudo-huber"
    """Between what student and target say."""
    huber_c: float = 0.00054
    """Where huber turns from a square into an absolute value, per dimension; pseudo-huber scales it by their number."""
    max_grad_norm: float = 0.0
    """Gradients are clipped to this norm; 0 does not clip, as pairs are weighed by one over their distance."""

    def check(self) -> None:
        """As the shared settings, and the ranges above."""
        super().check()
        if self.total_updates < 1:
            raise ValueError(f"total_updates is {self.total_updates}; wanted a whole number of at least 1")
        if not 0 < self.data_std < float("inf"):
            raise ValueError(f"data_std is {self.data_std}; wanted above 0; latents of most pipelines have about 1")

    def span(self, model: Distillable) -> Span:
        """The model's levels of noise."""
        return Span(model.denoiser.schedule, self.data_std)

    def pairs(
        self,
        model: Distillable,
        pictures: Pictures,
        times: Times,
        generator: torch.Generator,
        coupling: Coupling | None = None,
    ) -> Noised:
        """Two levels of one noise on each picture."""
        return Noised(model, pictures, times, self.minibatch, self.updates, self.passes, generator, coupling, self.drop)


def check_levels(first: int, last: int) -> None:
    """Raises ValueError unless so many pairs can grow to so many."""
    if not 1 <= first <= last:
        raise ValueError(f"first_pairs is {first} and last_pairs {last}; wanted at least 1, and the first not above")


@dataclass(frozen=True)
class LognormalTrainingSettings(ConsistencyTrainingSettings):
    """Neighbouring levels, drawn from a lognormal law, whose number doubles (2310.14189)."""

    first_pairs: int = 10
    """Pairs of neighbouring levels at first."""
    last_pairs: int = 1280
    """Pairs of neighbouring levels at the end."""
    level_mean: float = -1.1
    """Mean of the logarithm of the level."""
    level_std: float = 2.0
    """Standard deviation of the logarithm of the level."""

    def check(self) -> None:
        """As the shared settings, and the ranges above."""
        super().check()
        check_levels(self.first_pairs, self.last_pairs)
        if self.level_std <= 0:
            raise ValueError(f"level_std is {self.level_std}; wanted above 0")

    def times(self, model: Distillable) -> Neighbours:
        """Which pairs of levels are drawn, as training goes on."""
        growth = doubling(self.first_pairs, self.last_pairs, self.total_updates)
        return Neighbours(self.span(model), growth, lognormal(self.level_mean, self.level_std))
