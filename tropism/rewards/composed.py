"""Rewards made of rewards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tropism.base import Reward

from .scores import RewardError, Scores, check_shape


class Weighted:
    """A weighted sum of rewards: sum_i weight_i * r_i, or sum_i weight_i * r_i / std_i when ``normalise``.

    std_i is the population standard deviation of r_i over the samples of *this batch* that have a score, detached, so
    that no gradient flows through the scale. It is 1 with fewer than two scores, and where it is at most 1e-6 of the
    mean size of the scores (a part that says nothing is not blown up to say something). Nothing is centred: a constant
    cancels in every advantage. Because of std_i the score of a sample depends on its batch, so compare models without
    ``normalise``. Advantages per reward and group (GDPO, 2601.05242) are made from ``parts``, in ``advantages``.

    A sample that lacks one part lacks the sum. A part of weight 0 is computed and logged but never summed.
    """

    def __init__(
        self, rewards: Sequence[tuple[Reward, float]], normalise: bool = False, name: str | None = None
    ) -> None:
        names = [reward.name for reward, _ in rewards]
        if not rewards:
            raise RewardError("a weighted sum of no rewards was asked for; give at least one (reward, weight)")
        if len(set(names)) < len(names):
            raise RewardError(f"two of the rewards {names} share a name; give one of them another")
        if not all(math.isfinite(weight) for _, weight in rewards):
            raise RewardError(f"the weights {[weight for _, weight in rewards]} are not all finite")
        unit = "/std" if normalise else ""
        self.rewards = tuple(rewards)
        self.normalise = normalise
        self.name = name or " + ".join(f"{weight:g}*{reward.name}{unit}" for reward, weight in rewards)
        self.differentiable = all(reward.differentiable for reward, weight in rewards if weight)
        # A spread is that of the whole batch, and parts of a batch may come one by one.
        self.concurrent = not normalise and any(getattr(reward, "concurrent", False) for reward, _ in rewards)

    def parts(self, samples: Any, prompts: Sequence[str], **columns: Any) -> dict[str, Tensor]:
        """Every part as its reward gave it, by name: neither weighted nor normalised, each (B,)."""
        parts = {reward.name: reward(samples, prompts, **columns) for reward, _ in self.rewards}
        return {name: check_shape(part, len(prompts), f"reward '{name}'") for name, part in parts.items()}

    def combine(self, parts: Mapping[str, Tensor]) -> Tensor:
        """What ``parts`` returned -> the sum (B,)."""
        first = next(iter(parts.values()))
        total = torch.zeros_like(first)
        for reward, weight in self.rewards:
            if weight:
                part = parts[reward.name].to(first.device)
                total = total + weight * (part / _spread(part) if self.normalise else part)
        return total

    def score(self, samples: Any, prompts: Sequence[str], **columns: Any) -> Scores:
        """The sum, with the parts (detached) as info."""
        parts = self.parts(samples, prompts, **columns)
        return Scores(self.combine(parts), {name: part.detach() for name, part in parts.items()})

    def __call__(self, samples: Any, prompts: Sequence[str], **columns: Any) -> Tensor:
        return self.combine(self.parts(samples, prompts, **columns))


class Hinge:
    """min(r - target, 0): 0, and no gradient, once a sample reaches the target. ReFL's loss is -Hinge (2304.05977)."""

    def __init__(self, reward: Reward, target: float) -> None:
        self.reward, self.target = reward, target
        self.name, self.differentiable = f"{reward.name} up to {target:g}", reward.differentiable

    def __call__(self, samples: Any, prompts: Sequence[str], **columns: Any) -> Tensor:
        return (self.reward(samples, prompts, **columns) - self.target).clamp(max=0)


class Negated:
    """-r, for what should be small."""

    def __init__(self, reward: Reward) -> None:
        self.reward = reward
        self.name, self.differentiable = f"-{reward.name}", reward.differentiable

    def __call__(self, samples: Any, prompts: Sequence[str], **columns: Any) -> Tensor:
        return -self.reward(samples, prompts, **columns)


class Elsewhere:
    """A reward that computes on a device of its own; scores, and gradients, come back to that of the samples."""

    def __init__(self, reward: Reward, device: torch.device) -> None:
        self.reward, self.device = reward, device
        self.name, self.differentiable = reward.name, reward.differentiable

    def __call__(self, samples: Any, prompts: Sequence[str], **columns: Any) -> Tensor:
        if not isinstance(samples, Tensor):
            return self.reward(samples, prompts, **columns)
        return self.reward(samples.to(self.device), prompts, **columns).to(samples.device)


def _spread(values: Tensor) -> Tensor:
    """The scale () that a part is divided by; see ``Weighted``."""
    present = values.detach()[~values.detach().isnan()]
    if present.numel() < 2:
        return torch.ones((), device=values.device)
    std = present.std(correction=0)
    return torch.where(std > 1e-6 * present.abs().mean(), std, torch.ones_like(std))
