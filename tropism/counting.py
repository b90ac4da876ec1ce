"""What a drawing costs: the rows that a network is asked for, counted where the denoiser is called.

By rows and not by passes, so that guidance, which asks a network twice, costs twice as much however it is batched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tropism.base import Cond, Denoiser, Prediction, Schedule


class Counting:
    """A denoiser that tells ``add`` how many rows it was asked for; otherwise the one inside."""

    def __init__(self, inner: Denoiser, add: Callable[[int], None]) -> None:
        self.inner, self._add = inner, add

    @property
    def schedule(self) -> Schedule:
        """The inner denoiser's."""
        return self.inner.schedule

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        """x (B, ...), t (B,)."""
        self._add(len(x))
        return self.inner(x, t, cond)


class Counted:
    """A ``base.TextToImage`` that counts the rows its denoiser is asked for; all else is the model's."""

    def __init__(self, model: Any, counts: list[int] | None = None) -> None:
        self.model = model
        self._counts = [0] if counts is None else counts

    @property
    def rows(self) -> int:
        """Asked for so far."""
        return self._counts[0]

    def instead(self, model: Any) -> Counted:
        """Another model, whose rows are counted here as well."""
        return Counted(model, self._counts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    @property
    def denoiser(self) -> Denoiser:
        """Unguided, as the model's."""
        return Counting(self.model.denoiser, self._add)

    def _add(self, rows: int) -> None:
        self._counts[0] += rows
