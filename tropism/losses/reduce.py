"""From unreduced entries to (total, weight). Nothing here divides by a batch: ``train`` does, once, by the summed
weight.

A masked entry (False) counts for nothing and its value, NaN included, is never read.
"""

from __future__ import annotations

import torch
from torch import Tensor


def same_shape(**tensors: Tensor) -> None:
    """Raises ValueError, naming each argument, unless all shapes are equal: losses never broadcast."""
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        got = " and ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(
            f"{got} must have the same shape; expand per-row values first: value[:, None].expand_as(other)"
        )


def _masked(value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    if mask is None:
        mask = torch.ones_like(value, dtype=torch.bool)
    same_shape(value=value, mask=mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, True where an entry counts; got {mask.dtype}")
    return value.where(mask, 0.0), mask


def per_entry(value: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Every unmasked entry counts once (DAPO, 2503.14476): value and mask (B, ...) -> total () and weight ()."""
    kept, mask = _masked(value, mask)
    return kept.sum(), mask.sum().to(kept.dtype)


def per_row(value: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Every row that has unmasked entries counts once, by their mean (GRPO, 2402.03300, eq. 3): as ``per_entry``."""
    if value.ndim < 2:
        raise ValueError(f"per_row wants (B, K) or more dimensions; got {tuple(value.shape)}; use per_entry")
    kept, mask = _masked(value, mask)
    count = mask.flatten(1).sum(1)
    return (kept.flatten(1).sum(1) / count.clamp(min=1)).sum(), (count > 0).sum().to(kept.dtype)
