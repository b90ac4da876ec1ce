"""sLCT: consistency training in a latent space (Dao et al. 2025, 2502.01441), ``ict`` with five switches.

Latents have rare very large values, which rule a distance that grows with them:
- ``cauchy``: log(1 + |d|^2 / (2 c^2)), whose gradient falls to 0 for what is far off, in place of pseudo-huber;
- ``adaptive_c``: c falls as the levels come closer, exp(-1.18 ln(N - 1) - 0.72) for 32 x 32 x 4 latents;
- ``transport``: noise goes to the samples nearest to it, within a prompt (minibatch optimal transport);
- ``diffusion_weight``: the error of what the student says, for the lowest ``diffusion_share`` of the levels;
- ``unscaled_norms``: layer norms without a learnt scale (training in full only).

Departures (quandao10/sLCT has released networks and sampling scripts only; the formula of c, the share and the weight
could not be checked against either):
- c goes with sqrt(D / 4096) for D dimensions, and the distance is c log(1 + |d|^2 / (2 c^2)), so that its gradient
  keeps the size of pseudo-huber's while c falls;
- the diffusion loss is |said - x0|^2 / D weighed as the pair is, so that it does not vanish beside it;
- a network that was trained with scales starts from scales of 1, hence worse than it was.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tropism.base import Distillable, Reward
from tropism.distillation import Distillation, Noised, Pairs, Pictures
from tropism.distillation.coupling import optimal
from tropism.distillation.curriculum import Neighbours
from tropism.losses.consistency import Cauchy, Distance
from tropism.methods.distilling import latent_size
from tropism.methods.training import LognormalTrainingSettings

DIMENSIONS = 32 * 32 * 4  # for which the formula of c is given


def robust_c(count: int, size: int) -> float:
    """c for ``count`` levels and vectors of ``size`` dimensions."""
    return math.exp(-1.18 * math.log(count - 1) - 0.72) * math.sqrt(size / DIMENSIONS)


@dataclass(frozen=True)
class Robust:
    """c log(1 + |d|^2 / (2 c^2)), c by the number of levels at the source's update, or of the first one."""

    source: Noised
    times: Neighbours
    adaptive: bool
    scale: float = 1.0

    @property
    def c(self) -> float:
        """As of now, for one dimension; the square root of their number goes with it."""
        return self.scale * robust_c(self.times.count(self.source.made if self.adaptive else 0), 1)

    def __call__(self, said: Tensor, wanted: Tensor) -> Tensor:
        """(N, ...) twice -> (N,)."""
        c = self.c * math.sqrt(said[0].numel())
        return c * Cauchy(c)(said, wanted)


@dataclass(frozen=True)
class Denoising:
    """``Term``: the mean squared error of what the student says, for pairs among the lowest ``share`` of the levels."""

    source: Noised
    times: Neighbours
    share: float
    weight: float

    def __call__(self, recipe: Distillation, pairs: Pairs, said: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum over rows, and the error of the rows it counts (their share of it times all rows)."""
        assert pairs.x0 is not None
        small = pairs.t <= self.limit(self.source.made).to(pairs.t.device)
        error = (said.float() - pairs.x0.float()).flatten(1).square().mean(1).where(small, 0.0)
        return self.weight * (pairs.weight * error).sum(), {"small_noise_error": error.detach().mean()}

    def limit(self, made: int) -> Tensor:
        """The largest time t of a pair that counts, (): that of pair floor(share N) of the N - 1; -1 for none."""
        levels = self.times.levels(made)
        pair = int(self.share * len(levels))
        if pair == 0:
            return torch.tensor(-1.0)
        place = min(pair, len(levels) - 1)
        return self.times.span.times(levels[place : place + 1], levels[place - 1 : place])[0][0]


@dataclass(frozen=True)
class Settings(LognormalTrainingSettings):
    """Consistency training that bears outliers, from pictures."""

    last_pairs: int = 640
    """Pairs of neighbouring levels at the end."""
    cauchy: bool = True
    """The robust distance, in place of ``distance``."""
    cauchy_scale: float = 1.0
    """What c is multiplied by."""
    adaptive_c: bool = True
    """c falls as the levels come closer."""
    transport: bool = True
    """Noise goes to the nearest samples of the same prompt."""
    diffusion_share: float = 0.25
    """The lowest levels, on which the diffusion loss is added."""
    diffusion_weight: float = 1.0
    """Of the diffusion loss; 0: none."""
    unscaled_norms: bool = False
    """Layer norms lose their learnt scale; for training in full."""

    def check(self) -> None:
        """As the shared settings, and the ranges above."""
        super().check()
        if not 0 <= self.diffusion_share <= 1 or self.diffusion_weight < 0:
            raise ValueError(
                f"diffusion_share is {self.diffusion_share} and diffusion_weight {self.diffusion_weight}; wanted 0 to "
                "1, and 0 or more"
            )
        if self.cauchy_scale <= 0:
            raise ValueError(f"cauchy_scale is {self.cauchy_scale}; wanted above 0")

    def build(self, model: Distillable, reward: Reward, generator: torch.Generator, pictures: Pictures) -> Distillation:
        """The method on this model; the reward is not learnt from. Raises ValueError where norms have no scale."""
        if self.unscaled_norms:
            _unscale(model)
        student, times = self.student(model, "consistency"), self.times(model)
        source = self.pairs(model, pictures, times, generator, optimal if self.transport else None)
        distance: Distance = self.measure(latent_size(student))
        if self.cauchy:
            distance = Robust(source, times, self.adaptive_c, self.cauchy_scale)
        terms = [Denoising(source, times, self.diffusion_share, self.diffusion_weight)] if self.diffusion_weight else []
        return Distillation(student, self.teacher(model, student), source, generator, distance, terms=terms)


def _unscale(model: Distillable) -> None:
    """Raises ValueError for a model whose norms cannot lose their scales."""
    unscale = getattr(model, "unscale_norms", None)
    if unscale is None:
        raise ValueError("unscaled_norms is True, and this model has no layer norms; leave it out")
    unscale()
