"""A kernel with more (or less) noise, for exploration: same means, scaled standard deviations."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from tropism.base import Cond, Denoiser, Kernel, Prediction
from tropism.transitions import Gaussian, as_gaussian


@dataclass(frozen=True)
class Widened:
    """The kernel ``inner`` with its standard deviation times ``factor``. Made by ``widen``."""

    inner: Kernel
    factor: float

    def __call__(self, denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, cond: Cond) -> tuple[Gaussian, Prediction]:
        """As the inner kernel. Raises TypeError when its law is not Gaussian."""
        law, prediction = self.inner(denoiser, x, t, s, cond)
        law = as_gaussian(law, self.inner, "be widened")
        return Gaussian(law.mean, law.std * self.factor), prediction


def widen(kernel: Kernel, factor: float) -> Kernel:
    """A kernel with ``factor`` (positive, finite) times the standard deviation; deterministic rows stay so."""
    if not (factor > 0 and math.isfinite(factor)):
        raise ValueError(f"factor must be positive and finite; got {factor}")
    return Widened(kernel, factor)
