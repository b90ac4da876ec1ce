"""What happened on the way, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Step:
    """The particles at one step where they were weighed."""

    index: int  # of the move; the number of moves for the end
    t: float
    ess: Tensor  # (P,) before resampling
    resampled: Tensor  # (P,) bool
    unique_ancestors: Tensor  # (P,) int64, after resampling
    reward: Tensor  # (P,) mean of the rewards that there are, before resampling; NaN where there are none


@dataclass(frozen=True)
class Trace:
    """Steps in order, and the rows that network and reward were asked for; guidance asks the network for two."""

    steps: tuple[Step, ...]
    network_rows: int
    reward_rows: int
