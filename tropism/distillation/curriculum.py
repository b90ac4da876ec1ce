"""Which two noise levels make a pair of consistency training, and how close they are as training goes on.

Levels are noise-to-signal ratios for data of standard deviation 0.5, as the papers have them; ``Span`` turns them into
the times of a schedule, for data of any standard deviation. ``made`` is the number of updates made so far.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tropism.base import Schedule
from tropism.distillation.levels import highest, level, time_at
from tropism.schedules import DDPMTable

DATA_STD, LOWEST, HIGHEST, RHO = 0.5, 0.002, 80.0, 7.0  # of 2206.00364, 2303.01469 and what follows them
Drawn = tuple[Tensor, Tensor, Tensor]
"""Times t, s < t, and a weight, (rows,) each."""


def doubling(first: int, last: int, total: int) -> Callable[[int], int]:
    """made -> N: ``first`` + 1 levels, doubled at even intervals up to ``last`` + 1 (2310.14189, section 3.4)."""
    every = max(1, total // (int(math.log2(last // first)) + 1))

    def count(made: int) -> int:
        return int(min(first * 2 ** min(made // every, 32), last)) + 1

    return count


def rooted(first: int, last: int, total: int) -> Callable[[int], int]:
    """made -> N, growing as a square root from ``first`` + 1 at most to ``last`` + 1 (2303.01469, appendix C)."""

    def count(made: int) -> int:
        share = min(made / total, 1.0)
        return math.ceil(math.sqrt(share * ((last + 1) ** 2 - first**2) + first**2) - 1) + 1

    return count


def karras(count: int, low: float = LOWEST, high: float = HIGHEST) -> Tensor:
    """(count,) rising levels, float64: even steps of level^(1/7) (2206.00364, eq. 5)."""
    levels = torch.linspace(low ** (1 / RHO), high ** (1 / RHO), count, dtype=torch.float64) ** RHO
    levels[0], levels[-1] = low, high
    return levels


def lognormal(mean: float, std: float) -> Callable[[Tensor], Tensor]:
    """levels (N,) -> (N - 1,) chances of the pairs of neighbours, those of ln(level) ~ N(mean, std^2) between the two
    (2310.14189, eq. 10)."""

    def chances(levels: Tensor) -> Tensor:
        below = torch.erf((levels.log() - mean) / (math.sqrt(2) * std))
        return below.diff() / (below[-1] - below[0])

    return chances


def uniform(levels: Tensor) -> Tensor:
    """levels (N,) -> (N - 1,) equal chances."""
    return torch.full((len(levels) - 1,), 1 / (len(levels) - 1), dtype=levels.dtype)


@dataclass(frozen=True)
class Span:
    """The levels of a schedule, in units in which the data's standard deviation is 0.5."""

    schedule: Schedule
    data_std: float

    @property
    def unit(self) -> float:
        """The schedule's level of level 1 here."""
        return self.data_std / DATA_STD

    @property
    def high(self) -> float:
        """The largest level: 80, or where the schedule ends."""
        return highest(self.schedule, HIGHEST * self.unit) / self.unit

    def times(self, far: Tensor, near: Tensor) -> Drawn:
        """Levels (rows,) with near < far -> times, and one over their distance in level.

        The highest level is t = 1, where drawing begins, and the lowest is clean. On a table the two differ by one
        entry at least, and the distance is that of the entries.
        """
        t = time_at(self.schedule, (far * self.unit).float()).where(far < self.high, 1.0)
        s = time_at(self.schedule, (near * self.unit).float()).where(near > LOWEST, 0.0)
        if not isinstance(self.schedule, DDPMTable):
            return t, s, (1 / (far - near)).float()
        entry = 1 / self.schedule.size
        s = torch.minimum(s, t - entry).clamp(min=0)
        gap = level(self.schedule, t).clamp(max=self.high * self.unit) - level(self.schedule, s)
        return t, s, self.unit / gap.clamp(min=LOWEST * self.unit)


@dataclass(frozen=True)
class Neighbours:
    """``Times`` of two neighbours among N levels, N growing: with the chances of ``chances``, and the weight one over
    their distance if ``weighted``."""

    span: Span
    count: Callable[[int], int]
    chances: Callable[[Tensor], Tensor]
    weighted: bool = True

    def levels(self, made: int) -> Tensor:
        """(N,) rising."""
        return karras(self.count(made), high=self.span.high)

    def __call__(self, rows: int, made: int, generator: torch.Generator) -> Drawn:
        """(rows,) each."""
        levels = self.levels(made)
        first = torch.multinomial(self.chances(levels), rows, replacement=True, generator=generator)
        t, s, weight = self.span.times(levels[first + 1], levels[first])
        return t, s, weight if self.weighted else torch.ones_like(weight)


@dataclass(frozen=True)
class Ratio:
    """``Times`` of a lognormal level t and r = max(0, t (1 - n(t) / q^(a + 1))), n(t) = 1 + k sigmoid(-b t), with the
    stage a rising every ``every`` updates (2406.14548, section 3; locuslab/ect). The weight is 1 / (t - r)."""

    span: Span
    mean: float
    std: float
    q: float
    k: float
    b: float
    every: int
    stages: int

    def nearer(self, far: Tensor, made: int) -> Tensor:
        """r for levels t (rows,)."""
        stage = min(made // self.every, self.stages - 1)
        return (far * (1 - (1 + self.k * torch.sigmoid(-self.b * far)) / self.q ** (stage + 1))).clamp(min=0)

    def __call__(self, rows: int, made: int, generator: torch.Generator) -> Drawn:
        """(rows,) each."""
        far = (torch.randn(rows, generator=generator, dtype=torch.float64) * self.std + self.mean).exp()
        far = far.clamp(LOWEST, self.span.high)
        near = self.nearer(far, made)
        return self.span.times(far, near.where(near > LOWEST, 0.0))


@dataclass(frozen=True)
class Alone:
    """``Times`` of a lognormal level and the clean end, where no second level is needed; the weight is 1."""

    span: Span
    mean: float
    std: float

    def __call__(self, rows: int, made: int, generator: torch.Generator) -> Drawn:
        """(rows,) each."""
        far = (torch.randn(rows, generator=generator, dtype=torch.float64) * self.std + self.mean).exp()
        t, s, weight = self.span.times(far.clamp(LOWEST, self.span.high), torch.zeros_like(far))
        return t, s, torch.ones_like(weight)
