"""Resampling: from log-weights to indices, so that particle k is expected count * w_k times among the offspring.

All four schemes are unbiased (Douc, Cappe and Moulines 2005, cs/0507025): multinomial draws are independent; residual,
stratified and systematic have never a larger variance, systematic the smallest in practice. Weights come as logs of any
scale, are normalised in float64, and -inf is a weight of 0. Offspring of one particle lie next to one another.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tropism.randomness import Randomness

Resample = Callable[[Tensor, int, Randomness], Tensor]
"""resample(log_weights (..., K), count, generator) -> indices (..., count) int64, on the device of the weights."""

BELOW_ONE = 1 - 2.0**-53


def normalised(log_weights: Tensor) -> Tensor:
    """(..., K) logs of any scale -> (..., K) float64 weights that sum to 1.

    Raises ValueError for no weight at all, NaN, +inf, or rows in which all weights are 0 (-inf).
    """
    if log_weights.ndim < 1 or log_weights.shape[-1] < 1:
        raise ValueError(f"log-weights have shape {tuple(log_weights.shape)}; wanted (..., K) with K >= 1")
    logs = log_weights.detach().cpu().double()
    if bool(logs.isnan().any()) or bool((logs == torch.inf).any()):
        raise ValueError("log-weights contain NaN or +inf; give particles without a score a finite weight or -inf")
    if bool((logs == -torch.inf).all(-1).any()):
        raise ValueError("every particle of a prompt has weight 0 (log-weight -inf); there is nothing to resample from")
    return logs.softmax(-1)


def _uniform(shape: torch.Size, width: int, randomness: Randomness) -> Tensor:
    """float64 in [0, 1), (*shape, width); of several generators each fills one row of the leading dimensions."""
    if randomness is None or isinstance(randomness, torch.Generator):
        home = None if randomness is None else randomness.device
        return torch.rand(*shape, width, generator=randomness, device=home, dtype=torch.float64).cpu()
    if len(randomness) != shape.numel():
        raise ValueError(f"{len(randomness)} generators for {shape.numel()} rows of weights; wanted one a row, or one")
    rows = [torch.rand(width, generator=each, device=each.device, dtype=torch.float64).cpu() for each in randomness]
    return torch.stack(rows).reshape(*shape, width)


def _invert(weights: Tensor, points: Tensor) -> Tensor:
    """The first particle whose cumulated weight exceeds each point: never one of weight 0, never out of range."""
    total = weights.cumsum(-1)
    total = total / total[..., -1:]  # a sum that ends below 1 would leave the largest points without a particle
    return torch.searchsorted(total.contiguous(), points.clamp(max=BELOW_ONE).contiguous(), right=True)


def _checked(count: int) -> None:
    if count < 1:
        raise ValueError(f"count must be at least 1; got {count}")


def multinomial(log_weights: Tensor, count: int, generator: Randomness = None) -> Tensor:
    """Independent draws: (..., K) -> (..., count), sorted. Raises ValueError as ``normalised``."""
    _checked(count)
    weights = normalised(log_weights)
    points = _uniform(weights.shape[:-1], count, generator).sort(-1).values
    return _invert(weights, points).to(log_weights.device)


def stratified(log_weights: Tensor, count: int, generator: Randomness = None) -> Tensor:
    """One point in each of ``count`` equal strata: (..., K) -> (..., count). Raises ValueError as ``normalised``."""
    _checked(count)
    weights = normalised(log_weights)
    points = (torch.arange(count) + _uniform(weights.shape[:-1], count, generator)) / count
    return _invert(weights, points).to(log_weights.device)


def systematic(log_weights: Tensor, count: int, generator: Randomness = None) -> Tensor:
    """One uniform shift of ``count`` even points: (..., K) -> (..., count). Raises ValueError as ``normalised``.

    Particle k has floor(count w_k) or ceil(count w_k) offspring; equal weights and count = K give everyone one.
    """
    _checked(count)
    weights = normalised(log_weights)
    points = (torch.arange(count) + _uniform(weights.shape[:-1], 1, generator)) / count
    return _invert(weights, points).to(log_weights.device)


def residual(log_weights: Tensor, count: int, generator: Randomness = None) -> Tensor:
    """floor(count w_k) offspring for certain, the rest multinomial in what is left over: (..., K) -> (..., count).

    Raises ValueError as ``normalised``.
    """
    _checked(count)
    weights = normalised(log_weights)
    certain = (count * weights).floor()
    left = count * weights - certain
    left = left.where(left.sum(-1, keepdim=True) > 0, weights)  # nothing left over: never read, but must be a law
    drawn = _invert(left, _uniform(weights.shape[:-1], count, generator))
    place = torch.arange(count, dtype=torch.float64).expand(drawn.shape)
    copied = torch.searchsorted(certain.cumsum(-1).contiguous(), place.contiguous(), right=True)
    index = drawn.where(copied == weights.shape[-1], copied)
    return index.sort(-1).values.to(log_weights.device)


SCHEMES: dict[str, Resample] = {
    "systematic": systematic,
    "stratified": stratified,
    "multinomial": multinomial,
    "residual": residual,
}
"""By name, for settings."""
