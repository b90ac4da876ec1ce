"""Potentials: how a reward of unfinished samples becomes weights on the way (2501.06848).

Every choice has the same target, since the last step corrects whatever was spent; they differ in variance. A potential
is a function (reward, memory) -> log G / scale, all (B,), float64, and ``None`` is importance sampling: G = 1 until the
end. ``memory`` is what a particle's lineage has seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Memory:
    """What the lineage of each particle has seen at the steps where it was scored; all (B,), float64."""

    last: Tensor  # the reward when it last had one; 0 before
    best: Tensor  # the highest so far; -inf before
    total: Tensor  # the sum so far
    spent: Tensor  # log of the product of its potentials, over scale
    known: Tensor  # bool: whether it ever had one

    @staticmethod
    def empty(rows: int) -> Memory:
        """Before the first score."""
        zero = torch.zeros(rows, dtype=torch.float64)
        return Memory(zero, torch.full_like(zero, -torch.inf), zero, zero, zero.bool())

    def after(self, reward: Tensor, log_g: Tensor) -> Memory:
        """With this reward (B,), which cost ``log_g`` (B,); rows where the reward is NaN stay as they are."""
        seen = ~reward.isnan()
        return Memory(
            reward.where(seen, self.last),
            torch.maximum(reward, self.best).where(seen, self.best),
            (self.total + reward).where(seen, self.total),
            (self.spent + log_g).where(seen, self.spent),
            self.known | seen,
        )

    def rows(self, index: Tensor) -> Memory:
        """Those of particles ``index`` (B,)."""
        return Memory(self.last[index], self.best[index], self.total[index], self.spent[index], self.known[index])


Potential = Callable[[Tensor, Memory], Tensor]
"""potential(reward (B,), memory) -> log G / scale (B,); where the reward is NaN the answer is not used."""


def difference(reward: Tensor, memory: Memory) -> Tensor:
    """G = exp(scale (r_t - r_before)): credit for what the last steps gained. Telescopes."""
    return reward - memory.last


def maximum(reward: Tensor, memory: Memory) -> Tensor:
    """G = exp(scale max of the rewards so far)."""
    return torch.maximum(reward, memory.best)


def total(reward: Tensor, memory: Memory) -> Tensor:
    """G = exp(scale sum of the rewards so far)."""
    return memory.total + reward


def immediate(reward: Tensor, memory: Memory) -> Tensor:
    """G = exp(scale r_t)."""
    return reward


POTENTIALS: Mapping[str, Potential | None] = {
    "difference": difference,
    "max": maximum,
    "sum": total,
    "immediate": immediate,
    "importance": None,
}
"""By name, for settings."""
