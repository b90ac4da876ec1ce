"""Settings of ``tropism report`` and ``tropism compare``."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ReportSettings:
    """Settings of ``tropism report``."""

    run: str | None = None
    """Folder of the run."""
    out: str | None = None
    """The .html file to write; none: report.html in the run's folder."""


@dataclass(frozen=True)
class CompareSettings:
    """Settings of ``tropism compare``."""

    runs: list[str] = field(default_factory=list)
    """Folders of the runs, at least two."""
    out: str = "compare.html"
    """The .html file to write."""
