"""How much a run needed to reach a goal, and what several runs needed, in words."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence


def needed(curve: Iterable[tuple[float, float]], goal: float) -> float:
    """The count of the first (count, reward) at or above the goal; infinite when there is none."""
    return next((count for count, reward in curve if reward >= goal), math.inf)


def told(counts: Sequence[float], plain: float, of: str, digits: int = 0) -> str:
    """Every run, the median, and its ratio to ``plain``, the median of ``of``."""
    each = ", ".join("never" if math.isinf(count) else f"{count:.{digits}f}" for count in counts)
    median = statistics.median(counts)
    return f"{each}; median {'never' if math.isinf(median) else f'{median:.{digits}f}'}, {median / plain:.2f} of {of}'s"
