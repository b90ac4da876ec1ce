"""What a drawing costs: the rows that a network is asked for, counted where the denoiser is called.

By rows and not by passes, so that guidance, which asks a network twice, costs twice as much however it is batched.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tropism.base import Cond, Denoiser, Prediction


class Counted:
    """A ``base.TextToImage`` that counts the rows its denoiser is asked for; all else is the model's."""

    def __init__(self, model: Any) -> None:
        self.model, self.rows = model, 0

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
        self._owner.rows += len(x)
        answer: Prediction = self._inner(x, t, cond)
        return answer
