"""Shortcut models: one step diffusion via shortcut models (Frans et al. 2024, 2410.12557, algorithm 1).

The network is told how long a jump is, d, as the time that it leads to: u(x, t, t - d). In most rows d = 0 and the
target is the velocity v = eps - x_0 (flow matching). In the others d is one of 1, 1/2, 1/4, ... 2 / M, t a multiple of
it, and a jump must be two jumps of half its length, as an average of the student makes them:

    target = (u(x, t, t - d/2) + u(x', t - d/2, t - d)) / 2,   x' = x - (d/2) u(x, t, t - d/2)

where the shortest half, 1 / M, is asked as d = 0. Even jumps, as many as a power of 2 up to M, then draw. Guidance is
learnt as in the paper: the shortest halves are guided, and the longer jumps follow from them.

Departures from kvfrans/shortcut-models:
- the network is told t and t - d, theirs t and log2 of 1 / d;
- d = 0 is told as such, as in the paper's equation 5; their code tells 1 / M there;
- targets are not clipped to 4, and rows are drawn, not dealt out, to the two kinds;
- the distance is the squared one, as theirs; weight decay (0.1 there) is a setting, 0 here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tropism.base import Cond, Distillable, Reward, bcast, take
from tropism.distillation import Distillation, Pairs, Pictures
from tropism.distillation.velocity import check_straight, null_rows, velocity
from tropism.ema import Ema
from tropism.losses.consistency import MeanSquare
from tropism.methods.flow_training import FlowTrainingSettings


@dataclass
class Shortcut(Distillation):
    """Distillation in which a jump is what two jumps of half its length are; ``longest`` is M."""

    scale: float = 1.0
    longest: int = 128

    @torch.no_grad()
    def wanted(self, pairs: Pairs) -> Tensor:
        """(N, ...) the velocity where t is the end, and elsewhere the mean of two halves."""
        assert pairs.x0 is not None and pairs.eps is not None
        v = pairs.eps - pairs.x0
        long = (pairs.t > pairs.end).nonzero().flatten()
        if not len(long):
            return v
        with self.judging():
            halves = self.halved(pairs.x[long], pairs.t[long], pairs.end[long], take(pairs.cond, long))
        return v.index_copy(0, long, halves)

    def halved(self, x: Tensor, t: Tensor, end: Tensor, cond: Cond) -> Tensor:
        """(N, ...) the mean velocity of two jumps of half the way."""
        half = (t - end) / 2
        first = self.half(x, t, half, cond)
        return (first + self.half(x - bcast(half, x) * first, t - half, half, cond)) / 2

    def half(self, x: Tensor, t: Tensor, length: Tensor, cond: Cond) -> Tensor:
        """(N, ...) one jump's velocity; the shortest is the velocity at t, guided."""
        model, shortest = self.policy.model, length < 1.5 / self.longest
        said = velocity(model.denoiser, x, t, t.where(shortest, t - length), cond)
        if self.scale == 1:
            return said
        null = velocity(model.denoiser, x, t, t, null_rows(model.null(), len(x)))
        return said.where(bcast(~shortest, x), null + self.scale * (said - null))


@dataclass(frozen=True)
class Times:
    """In a share of rows d = 1 / 2^k and t one of its multiples; elsewhere t is uniform and s is t."""

    share: float
    longest: int

    def __call__(self, rows: int, made: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """(rows,) each: t, t - d, and weight 1."""
        counts = 2 ** torch.randint(self.longest.bit_length() - 1, (rows,), generator=generator)  # 1 to M / 2
        place = (torch.rand(rows, generator=generator) * counts).floor().clamp(max=counts - 1)
        long = torch.rand(rows, generator=generator) < self.share
        even = torch.rand(rows, generator=generator)
        return ((place + 1) / counts).where(long, even), (place / counts).where(long, even), torch.ones(rows)


@dataclass(frozen=True)
class Settings(FlowTrainingSettings):
    """Jumps that are two jumps of half their length, learnt from pictures."""

    bootstrap: float = 0.25
    """Share of rows that learn jumps; the others learn the velocity. Theirs is 0.125 to 0.25."""
    longest: int = 128
    """Moves of the longest chain (M), a power of 2."""
    target_decay: float = 0.999
    """Of the average of the student that makes the two halves; 0: the student itself."""

    def check(self) -> None:
        """As the shared settings, and the ranges above."""
        super().check()
        if not 0 <= self.bootstrap <= 1 or not 0 <= self.target_decay < 1:
            raise ValueError(
                f"bootstrap is {self.bootstrap} and target_decay {self.target_decay}; wanted 0 to 1, and 0 to below 1"
            )
        for name, most in (("longest", 2**20), ("student_steps", self.longest)):
            value = getattr(self, name)
            if value not in (2**power for power in range(int(name == "longest"), most.bit_length())):
                raise ValueError(f"{name} is {value}; wanted a power of 2 up to {most}: jumps are learnt by halving")

    def build(self, model: Distillable, reward: Reward, generator: torch.Generator, pictures: Pictures) -> Shortcut:
        """The method on this model; the reward is not learnt from."""
        check_straight(model.denoiser)
        student = self.student(model, "jump")
        return Shortcut(
            student,
            student,
            self.pairs(model, pictures, Times(self.bootstrap, self.longest), generator),
            generator,
            MeanSquare(),
            Ema(model.parameters(), self.target_decay) if self.target_decay else None,
            carry=velocity,
            scale=self.scale(model),
            longest=self.longest,
        )
