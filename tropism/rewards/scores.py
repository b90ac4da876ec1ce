"""What a reward hands back, and the checks every reward shares.

Scores are (B,) float32, higher is better. NaN means "no score for this sample" and nothing else does.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tropism.base import Reward


class RewardError(ValueError):
    """A reward that could not be computed or cannot be used; the message is one sentence that names the reward."""


class Scores(NamedTuple):
    """Scores, and whatever else the reward has to say for the logs. Nothing is kept on the reward itself."""

    values: Tensor  # (B,) float32, NaN = no score
    info: Mapping[str, Any]


def score(reward: Reward, samples: Any, prompts: Sequence[str], **columns: Any) -> Scores:
    """Scores with the reward's own info where it offers any (a ``score`` method), with empty info otherwise."""
    own = getattr(reward, "score", None)
    if own is None:
        return Scores(reward(samples, prompts, **columns), {})
    scores: Scores = own(samples, prompts, **columns)
    return scores


def check_scores(values: Tensor, count: int, name: str = "the reward") -> Tensor:
    """``values`` unchanged, fit to learn from: (count,), not infinite, at least one present.

    Raises RewardError otherwise. The training loop calls it on every batch; rewards themselves may lack all scores.
    """
    check_shape(values, count, name)
    _check_finite(values, name)
    if count and bool(values.isnan().all()):
        raise RewardError(f"{name} gave no score for any of the {count} samples; look for None or NaN in its results")
    return values


def statistics(values: Tensor) -> dict[str, float]:
    """mean, std (population), min, max of the scores present in ``values`` (B,), and the missing share in [0, 1].

    The first four are NaN when no score is present.
    """
    given = values.detach().float()
    present = given[~given.isnan()]
    missing = 1.0 - present.numel() / max(given.numel(), 1)
    if not present.numel():
        return {key: float("nan") for key in ("mean", "std", "min", "max")} | {"missing": missing}
    std = present.std(correction=0)
    summary = {"mean": present.mean(), "std": std, "min": present.min(), "max": present.max()}
    return {key: float(value) for key, value in summary.items()} | {"missing": missing}


def as_images(samples: Any, prompts: Sequence[str], name: str) -> Tensor:
    """``samples`` as (B, 3, H, W) floats of at least single precision; keeps the graph.

    Raises RewardError for anything that is not B images for B prompts.
    """
    if not isinstance(samples, Tensor) or samples.ndim != 4 or samples.shape[1] != 3:
        got = tuple(samples.shape) if isinstance(samples, Tensor) else type(samples).__name__
        raise RewardError(f"{name} got samples {got}; wanted images (B, 3, H, W)")
    if not samples.is_floating_point():
        raise RewardError(f"{name} got images of {samples.dtype}; wanted floats in [0, 1], so divide bytes by 255")
    if samples.shape[0] != len(prompts):
        raise RewardError(f"{name} got {samples.shape[0]} images and {len(prompts)} prompts; wanted as many of each")
    return samples if samples.dtype == torch.float64 else samples.float()


def to_values(raw: Any, count: int, name: str, device: torch.device | None = None) -> Tensor:
    """Whatever a callable returned as (count,) float32 on ``device``; keeps the graph of tensors.

    Accepts a tensor or array (float, int or bool), any iterable of numbers, 0-d tensors and None, and one number when
    ``count`` is 1. Raises RewardError for a wrong shape, for what is not a number, and for infinities.
    """
    values = _tensor(raw, name)
    if values.ndim == 0 and count == 1:
        values = values.reshape(1)
    check_shape(values, count, name)
    if values.is_complex():
        raise RewardError(f"{name} returned {values.dtype} scores; wanted real numbers")
    values = values.to(device=device, dtype=torch.float32)
    _check_finite(values, name)
    return values


def _tensor(raw: Any, name: str) -> Tensor:
    """Any accepted result as a tensor of whatever shape it has."""
    if isinstance(raw, Tensor):
        return raw
    if isinstance(raw, np.ndarray) and raw.dtype.kind in "fiub":
        return torch.from_numpy(raw.astype(np.float64))
    if isinstance(raw, numbers.Real | np.bool_):
        return torch.tensor(_entry(raw, "", name), dtype=torch.float64)
    if isinstance(raw, Iterable) and not isinstance(raw, str | bytes | Mapping | set) and getattr(raw, "ndim", 1) == 1:
        return _stack([_entry(value, f" at entry {index}", name) for index, value in enumerate(raw)])
    raise RewardError(f"{name} returned {_describe(raw)}; wanted a list, array or tensor of numbers")


def _entry(value: Any, where: str, name: str) -> Tensor | float:
    """One score: a 0-d tensor keeps its graph, None is missing."""
    if value is None:
        return float("nan")
    if isinstance(value, Tensor) and value.ndim == 0:
        return value
    if isinstance(value, np.generic | np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, numbers.Real):
        try:
            return float(value)
        except OverflowError:
            return float("inf")
    raise RewardError(f"{name} returned {_describe(value)}{where}; wanted a number or None")


def _stack(entries: Sequence[Tensor | float]) -> Tensor:
    tensors = [entry for entry in entries if isinstance(entry, Tensor)]
    if not tensors:
        return torch.tensor(entries, dtype=torch.float64)
    return torch.stack([torch.as_tensor(entry, dtype=torch.float32, device=tensors[0].device) for entry in entries])


def _describe(value: Any) -> str:
    """A value in a few words: shapes for arrays, the beginning of the rest."""
    if hasattr(value, "shape"):
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"


def check_shape(values: Tensor, count: int, name: str) -> Tensor:
    """``values`` unchanged when they are (count,), so that nothing broadcasts. Raises RewardError otherwise."""
    if values.shape != (count,):
        raise RewardError(f"{name} returned scores of shape {tuple(values.shape)}; wanted ({count},), one a sample")
    return values


def _check_finite(values: Tensor, name: str) -> None:
    infinite = values.isinf().nonzero().flatten().tolist()
    if infinite:
        raise RewardError(f"{name} returned an infinite score (or one beyond float32) for sample {infinite[0]}")
