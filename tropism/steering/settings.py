"""Settings that steerers share. A name means the same in every steerer that has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


def check_times(times: tuple[float, float]) -> None:
    """Raises ValueError unless the two are from 0 to 1, the smaller first."""
    low, high = times
    if not 0 <= low < high <= 1:
        raise ValueError(f"times is {low} {high}; wanted two times from 0 to 1, the smaller first")


@dataclass(frozen=True)
class SteererSettings:
    """Flags and YAML keys of every steerer."""

    rewarded: ClassVar[bool] = True  # whether the reward is asked for anything

    def check(self) -> None:
        """Raises ValueError in one sentence that names the field, the value and what was expected."""


@dataclass(frozen=True)
class SearchSettings(SteererSettings):
    """Flags and YAML keys of every search."""

    particles: int = 8
    """Chains of each sample."""

    def check(self) -> None:
        """As every steerer's, and at least one chain."""
        super().check()
        if self.particles < 1:
            raise ValueError(f"particles is {self.particles}; wanted at least 1")


@dataclass(frozen=True)
class ResamplingSettings(SearchSettings):
    """Flags and YAML keys of searches that decide on the way."""

    every: int = 4
    """Moves between decisions."""
    window: tuple[float, float] = (0.2, 0.8)
    """Shares of the chain between which is decided."""
    eta: float = 1.0
    """Noise of the moves of a diffusion model (DDIM's eta): without it chains of one origin would stay equal."""
    noise_level: float = 0.7
    """Noise of the moves of a flow (Flow-GRPO's SDE)."""

    def decisions(self, moves: int) -> tuple[int, ...]:
        """Every ``every``-th of so many moves within the window; of a chain too short for one, the middle move."""
        low, high = (share * moves for share in self.window)
        found = tuple(move for move in range(0, moves, self.every) if low <= move <= high)
        return found or ((moves - 1) // 2,) * (moves > 1)

    def check(self) -> None:
        """As a search's, and the ranges above."""
        super().check()
        low, high = self.window
        if self.every < 1:
            raise ValueError(f"every is {self.every}; wanted at least 1 move between decisions")
        if not 0 <= low <= high <= 1:
            raise ValueError(f"window is {low} {high}; wanted two shares of the chain from 0 to 1, the smaller first")
        if not 0 < self.eta <= 1 or self.noise_level <= 0:
            raise ValueError(
                f"eta is {self.eta} and noise_level {self.noise_level}; wanted above 0 (eta up to 1): chains of one "
                "origin must part"
            )


@dataclass(frozen=True)
class GradientSettings(SteererSettings):
    """Flags and YAML keys of guides that follow a reward's gradient."""

    scale: float = 10.0
    """Of the reward in the law exp(scale reward) that the samples are tilted by."""
    times: tuple[float, float] = (0.0, 0.9)
    """Times (1 is noise, 0 is clean) between which is guided."""
    limit: float | None = 0.3
    """How far the believed sample is moved at most, as a root mean square (latents have about 1); none: no limit."""

    def check(self) -> None:
        """As every steerer's, and the ranges above."""
        super().check()
        check_times(self.times)
        if self.limit is not None and not self.limit > 0:
            raise ValueError(f"limit is {self.limit}; wanted above 0, or none")
