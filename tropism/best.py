"""Which evaluation was the best so far, and whether there has been none better for too long."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self


class EnoughSeen(Exception):
    """Training stops here, as a finished run; the message says why."""


@dataclass
class Best:
    """``value`` of the reward ``by`` at ``step``; the untrained model counts as step 0. Higher is better."""

    by: str
    value: float = math.nan
    step: int = 0
    since: int = 0  # evaluations after it

    def see(self, step: int, value: float) -> bool:
        """Takes note of an evaluation; True when it is better than all before. A missing value is never better."""
        better = value > self.value or (math.isnan(self.value) and not math.isnan(value))
        self.value, self.step, self.since = (value, step, 0) if better else (self.value, self.step, self.since + 1)
        return better

    def check(self, patience: int, step: int) -> None:
        """Raises EnoughSeen after ``patience`` evaluations that were not better; 0 waits for ever."""
        if patience and self.since >= patience:
            raise EnoughSeen(
                f"stopping after step {step}: in {self.since} evaluations {self.by} has not been better than the "
                f"{self.value:.4g} of step {self.step}"
            )

    def state_dict(self) -> dict[str, Any]:
        """Plain values; JSON has no NaN."""
        return asdict(self) | {"value": None if math.isnan(self.value) else self.value}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The other way round."""
        return cls(**{**state, "value": math.nan if state["value"] is None else state["value"]})
