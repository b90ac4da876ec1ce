"""From rewards to advantages. A NaN reward means "no score": it is left out of every statistic and its advantage is 0.

Standard deviations are population ones, as in the authors' trackers. Where all scores of a group are equal, its
advantages are exactly 0. Results are float32 (B,); statistics are computed in float64.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor


def _scores(reward: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) rewards -> float64 scores without a graph, and which of them count."""
    if reward.ndim != 1 or bool(reward.isinf().any()):
        raise ValueError(f"reward must be (B,) and finite, or NaN for 'no score'; got {tuple(reward.shape)}: {reward}")
    return reward.detach().double(), ~reward.isnan()


def _standardised(score: Tensor, among: Tensor, eps: float) -> Tensor:
    """(N,) scores against the mean and spread of (M,) others; 0 where those are all equal."""
    if among.numel() == 0 or bool(among.max() == among.min()):
        return torch.zeros_like(score)
    return (score - among.mean()) / (among.std(correction=0) + eps)


def by_batch(reward: Tensor, eps: float = 1e-6) -> Tensor:
    """(reward - mean) / (std + eps) over the batch, (B,) -> (B,). Raises ValueError on an infinite reward."""
    score, valid = _scores(reward)
    return _standardised(score, score[valid], eps).where(valid, 0.0).float()


def by_group(
    reward: Tensor, group: Tensor, scale: Literal["group", "global", "none"] = "group", eps: float = 1e-4
) -> Tensor:
    """reward minus its group's mean, over (std + eps): reward (B,), group ids (B,) int64 -> (B,).

    ``scale``: "group" divides by the group's own std (GRPO, 2402.03300), "global" by the std of all the batch's rewards
    (Flow-GRPO's code, global_std), "none" by nothing (Dr. GRPO, 2503.20783). A group of one has advantage 0.
    """
    if scale not in ("group", "global", "none"):
        raise ValueError(f"unknown scale {scale!r}; wanted group, global or none")
    if group.shape != reward.shape:
        raise ValueError(f"group {tuple(group.shape)} and reward {tuple(reward.shape)} must have the same shape (B,)")
    score, valid = _scores(reward)
    spread = float(score[valid].std(correction=0)) + eps if scale == "global" and bool(valid.any()) else 1.0
    advantage = torch.zeros_like(score)
    for name in set(group.tolist()):
        rows = valid & (group == name)
        members = score[rows]
        if members.numel() and bool(members.max() > members.min()):
            own = float(members.std(correction=0)) + eps if scale == "group" else spread
            advantage[rows] = (members - members.mean()) / own
    return advantage.float()


@dataclass
class PerPromptStats:
    """DDPO's per-prompt tracker (2305.13301; stat_tracking.py of kvablack/ddpo-pytorch): each prompt keeps its last
    rewards.

    ``update`` first stores the new rewards, then standardises them by their prompt's own history when it holds at least
    ``min_count`` values and by the batch otherwise. Key on the prompt as written.
    """

    buffer: int = 32
    min_count: int = 16
    eps: float = 1e-6
    _history: dict[str, deque[float]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 1 <= self.min_count <= self.buffer:
            raise ValueError(
                f"wanted 1 <= min_count <= buffer; got min_count {self.min_count} and buffer {self.buffer}"
            )

    def update(self, prompts: Sequence[str], rewards: Tensor) -> Tensor:
        """B prompts and rewards (B,) -> advantages (B,)."""
        if len(prompts) != rewards.shape[0]:
            raise ValueError(f"{len(prompts)} prompts and {rewards.shape[0]} rewards; wanted one reward per prompt")
        score, valid = _scores(rewards)
        rows: dict[str, list[int]] = {}
        for row, prompt in enumerate(prompts):
            rows.setdefault(prompt, []).append(row)
        advantage = torch.zeros_like(score)
        for prompt, members in rows.items():
            history = self._history.setdefault(prompt, deque(maxlen=self.buffer))
            history.extend(score[row].item() for row in members if valid[row])
            among = score[valid] if len(history) < self.min_count else score.new_tensor(list(history))
            advantage[members] = _standardised(score[members], among, self.eps)
        return advantage.where(valid, 0.0).float()

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and strings: fit for JSON, which reads them back bit for bit."""
        history = {prompt: list(values) for prompt, values in self._history.items()}
        return {"buffer": self.buffer, "min_count": self.min_count, "history": history}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replaces the history. Raises ValueError when the state was kept with another buffer or min_count."""
        kept = {"buffer": state["buffer"], "min_count": state["min_count"]}
        if kept != {"buffer": self.buffer, "min_count": self.min_count}:
            raise ValueError(
                f"the state has {kept}, this tracker buffer {self.buffer}, min_count {self.min_count}; match them"
            )
        self._history = {prompt: deque(values, maxlen=self.buffer) for prompt, values in state["history"].items()}
