"""Reward-weighted regression (Peters and Schaal 2007), the baseline of DDPO (2305.13301, section 4.1).

RAFT's file with soft weights: every image counts, by the softmax of its reward over ``beta`` within its group.
"""

from __future__ import annotations

from dataclasses import dataclass

from tropism.methods import raft
from tropism.methods.raft import Weigh, softmax_of_group


@dataclass(frozen=True)
class Settings(raft.Settings):
    """Fine-tuning on all images, weighted by exp(reward / beta)."""

    epochs: int = 1
    beta: float = 0.2
    """Temperature, in units of the reward: smaller follows the best images more closely."""

    def weigh(self) -> Weigh:
        """Soft weights."""
        return softmax_of_group(self.beta)
