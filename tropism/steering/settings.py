"""Settings that steerers share. A name means the same in every steerer that has it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SteererSettings:
    """Flags and YAML keys of every steerer."""

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
