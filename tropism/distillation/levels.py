"""Noise levels, the ratio sigma / alpha, of any schedule: the unit in which consistency training draws its pairs.

Published for a variance-exploding path (2303.01469, 2310.14189), where the level is the time; x / alpha is that path.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tropism.base import Schedule
from tropism.schedules import EDM, DDPMTable, RectifiedFlow

FINE = 2**14  # cells in which a schedule without a closed form is inverted


def level(schedule: Schedule, t: Tensor) -> Tensor:
    """(B,) -> (B,), float32; infinite where alpha is 0."""
    return schedule.sigma(t) / schedule.alpha(t)


def time_at(schedule: Schedule, levels: Tensor) -> Tensor:
    """``level`` backwards: (B,) >= 0 -> (B,) times; on a table the nearest entry by ratio, above 0 unless the level is.

    Closed on EDM's and flow schedules, else inverted on a table of 16,384 cells, linear inside a cell.
    """
    levels = levels.float()
    if isinstance(schedule, EDM):
        return schedule.time(levels)
    if isinstance(schedule, RectifiedFlow):
        return levels / (1 + levels)
    times, known = _known(schedule)
    if isinstance(schedule, DDPMTable):
        return times[torch.searchsorted((known[1:] * known[:-1]).sqrt(), levels)]
    above = torch.searchsorted(known, levels).clamp(1, len(known) - 1)
    low, high = known[above - 1], known[above]
    share = ((levels - low) / (high - low)).where(high.isfinite(), 0.0).clamp(0, 1)
    return torch.lerp(times[above - 1], times[above], share)


def highest(schedule: Schedule, limit: float) -> float:
    """The largest finite level of the schedule, at most ``limit``."""
    if isinstance(schedule, RectifiedFlow):
        return limit
    known = _known(schedule)[1]
    return min(limit, float(known[known.isfinite()].max()))


def _known(schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Times from 0 to 1 and their levels, rising; a table's own entries."""
    size = schedule.size if isinstance(schedule, DDPMTable) else FINE
    times = torch.linspace(0, 1, size + 1, dtype=torch.float64).float()
    return times, level(schedule, times)
