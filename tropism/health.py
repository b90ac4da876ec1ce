"""Whether a run is still well: looked at in every step, at the cost of a few reductions over the pictures.

A trouble is a sentence: what happened, what was measured, the limit, and what to change. What follows from it (stop, go
back to the last checkpoint, or a warning) is the run's business.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tropism.base import Reward
from tropism.config import HealthSettings, RunFailed

CONSTANT = 2 / 255  # standard deviation of values below which a picture shows nothing
BLACK = 12 / 255  # a picture without any lighter value


class Unhealthy(RunFailed):
    """A run has gone wrong: one sentence with what was measured and what to change."""


def blank(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (B,) whether a picture is one colour, or black (no value above 12 / 255)."""
    values = images.detach().flatten(2)
    spread = values.float().std(2, correction=0)
    return (spread < CONSTANT).all(1) | (values.amax(2) < BLACK).all(1)


def check_finite_pictures(images: Tensor) -> None:
    """Raises Unhealthy when any of the images (B, ...) holds a NaN or an infinity."""
    broken = int((~torch.isfinite(images)).flatten(1).any(1).sum())
    if broken:
        raise Unhealthy(
            f"{broken} of {len(images)} pictures hold values that are not finite: the weights or the decoder have "
            "overflowed; lower learning_rate, or use mixed_precision no or bf16 instead of fp16"
        )


class Watched:
    """A reward that also looks at the pictures that pass. Raises Unhealthy for values that are not finite."""

    def __init__(self, reward: Reward) -> None:
        self.reward, self.name, self.differentiable = reward, reward.name, reward.differentiable
        self.concurrent = bool(getattr(reward, "concurrent", False))  # see ``overlap``
        self._seen = self._blank = 0

    def __call__(self, samples: Any, prompts: Sequence[str], **columns: Any) -> Tensor:
        """As the reward."""
        if isinstance(samples, Tensor) and samples.ndim == 4:
            self._look(samples.detach())
        return self.reward(samples, prompts, **columns)

    def _look(self, images: Tensor) -> None:
        check_finite_pictures(images)
        self._seen += len(images)
        self._blank += int(blank(images).sum())

    def taken(self) -> dict[str, float]:
        """{"images_blank": share since the last call}; nothing where no pictures were seen."""
        share = {"images_blank": self._blank / self._seen} if self._seen else {}
        self._seen = self._blank = 0
        return share


class HealthCheck:
    """Compares what steps and evaluations measured with the limits; remembers how long groups have been flat."""

    PATIENCE = 3  # steps in a row in which too many groups were flat

    def __init__(self, limits: HealthSettings) -> None:
        self.limits, self.flat = limits, 0

    def check(self, metrics: Mapping[str, float]) -> None:
        """Raises Unhealthy for the first trouble. ``metrics`` are those of a step or of an evaluation."""
        trouble = next(self._troubles(metrics), None)
        if trouble is not None:
            raise Unhealthy(trouble)

    def _troubles(self, metrics: Mapping[str, float]) -> Iterator[str]:
        limits, at = self.limits, {name: metrics.get(name, math.nan) for name in ("images_blank", "ratio_max")}
        if at["images_blank"] > limits.max_blank:
            yield (
                f"{at['images_blank']:.0%} of the step's pictures are black or of one colour, above max_blank "
                f"({limits.max_blank:.0%}): the policy has collapsed; lower learning_rate, or raise max_blank if such "
                "pictures are meant"
            )
        if at["ratio_max"] > limits.max_ratio:
            yield (
                f"the ratio to the acting policy is {at['ratio_max']:.3g}, above max_ratio ({limits.max_ratio:g}): "
                "an update went too far; lower learning_rate, or updates and inner_epochs"
            )
        yield from self._flat_groups(metrics)
        drift = metrics.get("eval_kl", math.nan)
        if limits.max_kl is not None and drift > limits.max_kl:
            yield (
                f"the KL to the model before training is {drift:.3g} nats, above max_kl ({limits.max_kl:g}); stop "
                "here, lower learning_rate, or give the method a kl_weight"
            )

    def _flat_groups(self, metrics: Mapping[str, float]) -> Iterator[str]:
        share = metrics.get("zero_std_ratio")
        if share is None:
            return
        self.flat = self.flat + 1 if share > self.limits.max_flat else 0
        if self.flat >= self.PATIENCE:
            yield (
                f"{share:.0%} of the prompts had images that all score the same, above max_flat "
                f"({self.limits.max_flat:.0%}), {self.flat} steps in a row, so that most of the sampling teaches "
                "nothing; use prompts that the model gets right now and then, more images_per_prompt, or a reward "
                "with finer steps"
            )
