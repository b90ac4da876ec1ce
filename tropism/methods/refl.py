"""ReFL: reward feedback learning (Xu et al. 2023, ImageReward, 2304.05977, algorithm 1).

AlignProp with a window of one move, at a random place late in the chain, whose predicted x0 is decoded and rewarded.

Departures from THUDM/ImageReward: the early moves are guided like all others (theirs are not), and the pre-training
term is left out. Their hinge, relu(2 - r), is the reward's business: see ``tropism.rewards.Hinge``.
"""

from __future__ import annotations

from dataclasses import dataclass

from tropism.methods import alignprop
from tropism.windows import OneStep, Window


@dataclass(frozen=True)
class Settings(alignprop.Settings):
    """Reward gradients of one predicted x0, late in the chain."""

    eta: float = 0.0
    low: float = 0.75
    """The window is drawn from this share of the chain"""
    high: float = 1.0
    """up to this one."""

    def check(self) -> None:
        """As the shared settings; 0 <= low < high <= 1."""
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"low is {self.low} and high {self.high}; wanted 0 <= low < high <= 1")
        super().check()

    def window(self) -> Window:
        """One move."""
        return OneStep(self.low, self.high)
