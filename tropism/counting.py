"""What a drawing costs: the rows that a network is asked for, counted where the denoiser is called.

By rows and not by passes, so that guidance, which asks a network twice, costs twice as much however it is batched.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tropism.base import Cond, Denoiser, Prediction


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
        return _Counting(self)


class _Counting:
    """A denoiser that tells its model of every call."""

    def __init__(self, owner: Counted) -> None:
        self._owner, self._inner = owner, owner.model.denoiser

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        self._owner._counts[0] += len(x)
        answer: Prediction = self._inner(x, t, cond)
        return answer
