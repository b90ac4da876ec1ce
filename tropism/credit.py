"""Who is credited for a reward: rules from (prompts, rewards, groups) to advantages, for policy gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from tropism.advantages import PerPromptStats, by_group

Credit = Callable[[Sequence[str], Tensor, Tensor], Tensor]
"""credit(prompts, reward (B,), group (B,)) -> advantage (B,); 0 where there is no score."""


@dataclass(frozen=True)
class PerPrompt:
    """DDPO's: against the running statistics of the same prompt. ``stats`` is what a checkpoint keeps."""

    stats: PerPromptStats

    def __call__(self, prompts: Sequence[str], reward: Tensor, group: Tensor) -> Tensor:
        """Remembers the rewards, then standardises them."""
        return self.stats.update(prompts, reward)


def per_prompt(buffer: int = 32, min_count: int = 16) -> PerPrompt:
    """A fresh tracker."""
    return PerPrompt(PerPromptStats(buffer, min_count))


def group_relative(prompts: Sequence[str], reward: Tensor, group: Tensor) -> Tensor:
    """GRPO's: against the images of the same group in this batch."""
    return by_group(reward, group)


def group_relative_global(prompts: Sequence[str], reward: Tensor, group: Tensor) -> Tensor:
    """Flow-GRPO's code: the group's mean, and the standard deviation of the whole batch."""
    return by_group(reward, group, scale="global")
