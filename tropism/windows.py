"""Gradient windows: which moves of a chain keep a graph when a reward is differentiated through it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class Span:
    """Moves ``first`` to ``last`` (exclusive) keep a graph; ``jump`` ends the chain there, at its predicted x0;
    ``repeats`` re-noises the result that many times for further one-move gradients."""

    first: int
    last: int
    jump: bool = False
    repeats: int = 0


class Window(Protocol):
    """Draws which moves keep a graph, once a batch."""

    def __call__(self, steps: int, generator: torch.Generator | None = None) -> Span: ...


@dataclass(frozen=True)
class LastK:
    """DRaFT-K: the last ``k`` moves."""

    k: int = 1

    def __call__(self, steps: int, generator: torch.Generator | None = None) -> Span:
        return Span(steps - _within(self.k, steps, "k"), steps)


@dataclass(frozen=True)
class RandomCut:
    """AlignProp: the last K moves, K uniform in 1..``longest`` (all of them by default)."""

    longest: int | None = None

    def __call__(self, steps: int, generator: torch.Generator | None = None) -> Span:
        longest = steps if self.longest is None else _within(self.longest, steps, "longest")
        k = int(torch.randint(1, longest + 1, (), generator=generator))
        return Span(steps - k, steps)


@dataclass(frozen=True)
class LowVariance:
    """DRaFT-LV: the last move, and ``repeats`` more gradients from the result noised again to the last level."""

    repeats: int = 2

    def __call__(self, steps: int, generator: torch.Generator | None = None) -> Span:
        return Span(steps - 1, steps, repeats=self.repeats)


@dataclass(frozen=True)
class OneStep:
    """ReFL: one move with a graph at a uniform place in the share [``low``, ``high``) of the chain, then its x0."""

    low: float = 0.75
    high: float = 1.0

    def __call__(self, steps: int, generator: torch.Generator | None = None) -> Span:
        start, stop = int(self.low * steps), max(int(self.high * steps), int(self.low * steps) + 1)
        place = min(int(torch.randint(start, stop, (), generator=generator)), steps - 1)
        return Span(place, place + 1, jump=True)


def _within(k: int, steps: int, name: str) -> int:
    if not 1 <= k <= steps:
        raise ValueError(f"{name} is {k}; wanted 1 to {steps}, the number of sampling steps")
    return k
