"""Editing without inversion: the denoising diffusion consistent model of InfEdit (Xu et al. 2023, 2312.04965).

A picture x_0 with its own caption and another caption. Both are walked from the same noises; of the first the clean end
is known, so its state at any time is alpha x_0 + sigma noise and needs no inversion. What is believed of the second is

    x0 = x_0 + (belief under the other caption at its state) - (belief under the own caption at the known state),

so that only the difference of two beliefs moves the picture: with the same caption twice it comes back exactly.

Departures from sled-group/InfEdit: both captions have the same guidance, without which the picture would not come back;
eta is 1, multistep consistency sampling. Its control of attention is the model's affair (``Attending``).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tropism.base import Cond, Denoiser, Kernel, Prediction, bcast, concat, take
from tropism.denoisers import consistent
from tropism.randomness import Randomness
from tropism.samplers.chain import Move
from tropism.transitions import Gaussian


class Mask(Protocol):
    """What was found out while the network was asked."""

    def __call__(self, like: Tensor) -> Tensor | None:
        """Of moves ``like`` (B, C, h, w): (B, 1, h, w) of 1 where they are made and 0 elsewhere; None: they are."""
        ...


class Attending(Protocol):
    """How the network attends in a pass over B known states and, below them, their B others."""

    def __call__(self, rows: Tensor, done: float) -> AbstractContextManager[Mask]:
        """While the network is asked for rows (B,) of ``source``, with the share ``done`` in [0, 1) of moves made."""
        ...


@dataclass(frozen=True, eq=False)
class DDCM:
    """A ``Walk`` that edits: ``source`` (P, ...) clean, ``told`` its P conditions, ``row`` the entry of cond (B,) that
    says which of them a row belongs to. ``attending`` says how the second caption's attention follows the first's.

    ``strength`` in (0, 1] is the share of the moves that are made, the last ones: the rest of the picture's structure
    is kept. Raises ValueError outside.
    """

    source: Tensor
    told: Cond
    row: str
    strength: float = 1.0
    attending: Attending | None = None

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength is {self.strength}; wanted above 0, up to 1")

    def __call__(
        self, kernel: Kernel, denoiser: Denoiser, x: Tensor, ts: Tensor, cond: Cond, generator: Randomness = None
    ) -> Iterator[Move]:
        """From noise x (B, ...) along the last ``strength`` of ts (K + 1,); the kernel is not asked: the law of a move
        is that of ``Consistency``."""
        del kernel
        schedule, there = denoiser.schedule, cond[self.row].to(self.source.device)
        clean, told = self.source[there].to(x.device, torch.float32), take(self.told, there)
        ts = ts[len(ts) - 1 - max(1, round(self.strength * (len(ts) - 1))) :].to(x.device, torch.float32)
        start = ts[:1].expand(len(x))
        x = bcast(schedule.alpha(start), x) * clean + bcast(schedule.sigma(start), x) * x.float()
        moved = torch.zeros_like(clean)  # how far the belief is from the picture
        for move, (now, after) in enumerate(itertools.pairwise(ts)):
            t, s = now.expand(len(x)), after.expand(len(x))
            known = x - bcast(schedule.alpha(t), x) * moved
            done = move / (len(ts) - 1)
            with nullcontext() if self.attending is None else self.attending(there, done) as mask:
                moved = self._difference(denoiser, known, x, t, told, cond)
            kept = None if mask is None else mask(moved)
            moved = moved if kept is None else moved * kept
            alpha = schedule.alpha(s).where(s > 0, 1.0)
            law = Gaussian(bcast(alpha, x) * (clean + moved), schedule.sigma(s).where(s > 0, 0.0))
            at = bcast(schedule.alpha(t), x), bcast(schedule.sigma(t), x)
            x_next = law.sample(generator)
            yield Move(x, t, s, law, consistent(clean + moved, x, *at), x_next)
            x = x_next

    def _difference(self, denoiser: Denoiser, known: Tensor, x: Tensor, t: Tensor, told: Cond, cond: Cond) -> Tensor:
        """Of both beliefs, in one pass of 2B rows."""
        own = {name: value for name, value in cond.items() if name not in told}
        both: Prediction = denoiser(torch.cat([known, x]), torch.cat([t, t]), concat({**own, **told}, cond))
        before, after = both.x0.chunk(2)
        return after - before
