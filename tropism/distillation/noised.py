"""Pairs from data: one clean sample and one noise, at two times (consistency training: no teacher)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tropism.base import Cond, Distillable, Prompts, bcast, pick, take
from tropism.distillation.pairs import Pairs, scaled
from tropism.policy import Policy
from tropism.rollout import slices
from tropism.schedules import add_noise

Pictures = Callable[[Prompts, torch.Generator], Tensor]
"""pictures(prompts, generator) -> what the prompts show, (B, 3, H, W) in [0, 1] (points on a toy)."""
Times = Callable[[int, int, torch.Generator], tuple[Tensor, Tensor, Tensor]]
"""times(rows, updates made so far, generator) -> t, s <= t, and a weight, (rows,) each."""
Coupling = Callable[[Tensor, Tensor, Tensor], Tensor]
"""coupling(x0 (B, ...), eps (B, ...), which prompt (B,)) -> eps with its rows in another order."""


@dataclass
class Noised:
    """``updates`` slices of a batch of pictures a pass, each row with fresh noise and times.

    ``made`` counts the updates, for times that change over training. ``drop`` is the share of rows without prompt.
    x and y lead to the clean end of the path, or with ``near`` only to y. ``told`` as in ``pairs.Chains``.
    """

    model: Distillable
    pictures: Pictures
    times: Times
    minibatch: int
    updates: int
    passes: int
    generator: torch.Generator
    coupling: Coupling | None = None
    drop: float = 0.0
    near: bool = False
    made: int = 0
    told: tuple[float, float] | None = None

    def __call__(self, teacher: Policy, batch: Prompts) -> Iterator[Iterator[Pairs]]:
        """One batch of pictures, shuffled; the teacher is not asked."""
        shown = self.pictures(batch, self.generator)
        x0 = torch.cat([self.model.latents(part) for part in shown.split(teacher.microbatch)])
        cond, null, rows = self.model.encode(batch.text), self.model.null(), torch.arange(len(batch.text))
        place = {text: i for i, text in enumerate(batch.text)}
        prompt = torch.tensor([place[text] for text in batch.text])
        for _ in range(self.passes):
            eps = teacher.noise(len(x0), self.generator)
            eps = eps if self.coupling is None else self.coupling(x0, eps, prompt)
            dropped = torch.rand(len(x0), generator=self.generator) < self.drop
            asked: Cond = {name: value.clone() for name, value in cond.items()}
            for name, value in asked.items():
                value[dropped] = null[name].to(value)
            asked = scaled(asked, self.told, self.generator)
            order = torch.randperm(len(rows), generator=self.generator)
            for parts in slices(order, self.updates, self.minibatch, teacher.processes):
                t, s, weight = (each.to(x0.device) for each in self.times(len(rows), self.made, self.generator))
                drawn = (t, s, weight)
                yield (self._pairs(x0[i], eps[i], drawn, i, take(asked, i), pick(batch, i)) for i in parts)
                self.made += 1

    def _pairs(
        self, x0: Tensor, eps: Tensor, drawn: tuple[Tensor, Tensor, Tensor], i: Tensor, cond: Cond, prompts: Prompts
    ) -> Pairs:
        """Of rows i, whose times and weights are ``drawn`` for all."""
        t, s, weight = (each[i] for each in drawn)
        schedule = self.model.denoiser.schedule
        far, near = add_noise(schedule, x0, eps, t), add_noise(schedule, x0, eps, s)
        near = near.where(bcast(s > 0, near), x0)  # whatever level a table ends at
        return Pairs(far, t, near, s, s if self.near else torch.zeros_like(t), cond, weight, x0, eps, prompts)


@dataclass
class Stepped(Noised):
    """The nearer state is where one move of the teacher goes, as consistency distillation on data does (2303.01469,
    algorithm 2)."""

    def __call__(self, teacher: Policy, batch: Prompts) -> Iterator[Iterator[Pairs]]:
        """As ``Noised``; the teacher is asked when a minibatch is."""
        for update in super().__call__(teacher, batch):
            yield (self._step(teacher, pairs) for pairs in update)

    @torch.no_grad()
    def _step(self, teacher: Policy, pairs: Pairs) -> Pairs:
        law, _ = teacher.kernel(teacher.denoiser, pairs.x, pairs.t, pairs.s, pairs.cond)
        return replace(pairs, y=law.mode)


def rungs(grid: Tensor, skip: int = 1) -> Times:
    """A time of ``grid`` (K + 1,) but the last, drawn evenly, and the one ``skip`` further on; weight 1."""

    def times(rows: int, made: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        first = torch.randint(len(grid) - 1, (rows,), generator=generator)
        return grid[first], grid[(first + skip).clamp(max=len(grid) - 1)], torch.ones(rows)

    return times
