"""A rollout as a table of (image, move) cells, from which minibatches are gathered in any mixture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tropism.base import Cond, Rollout, take
from tropism.processes import ALONE, Processes


@dataclass(frozen=True)
class Cells:
    """N (image, move) pairs of one rollout."""

    x: Tensor  # (N, ...)
    t: Tensor  # (N,)
    s: Tensor  # (N,)
    x_next: Tensor  # (N, ...)
    log_prob: Tensor  # (N,) under the policy that acted
    advantage: Tensor  # (N,)
    cond: Cond  # N rows
    on_policy: bool  # no update has happened since the rollout
    info: Mapping[str, float] = field(default_factory=dict)


def trainable(
    rollout: Rollout, move_fraction: float, skip_last: bool, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Rows (N,) and columns (N,) of the cells to learn from: credited, random, and drawn at ``move_fraction`` of each
    image's moves (rounded up). ``skip_last`` leaves the last move out."""
    usable = (rollout.mask & (rollout.advantage != 0)[:, None]).cpu()
    if skip_last:
        usable[:, -1] = False
    if move_fraction < 1:
        chance = torch.rand(usable.shape, generator=generator).masked_fill(~usable, 2.0)
        rank = chance.argsort(1).argsort(1)
        usable &= rank < (move_fraction * usable.sum(1, keepdim=True)).ceil()
    rows, columns = usable.nonzero(as_tuple=True)
    return rows, columns


def slices(order: Tensor, updates: int, minibatch: int, processes: Processes = ALONE) -> list[Sequence[Tensor]]:
    """``order`` (N,) in ``updates`` nearly equal parts, and of each this process's share, in minibatches. A part may
    have none: there are always ``updates`` of them, so that processes agree on how often to step."""
    return [processes.parts(part, minibatch) for part in order.tensor_split(updates)]


def gather(rollout: Rollout, rows: Tensor, columns: Tensor, on_policy: bool, info: Mapping[str, float]) -> Cells:
    """The cells at rows (N,) and columns (N,)."""
    device = rollout.xs.device
    return Cells(
        x=rollout.xs[rows, columns],
        t=rollout.ts[columns].to(device),
        s=rollout.ts[columns + 1].to(device),
        x_next=rollout.xs[rows, columns + 1],
        log_prob=rollout.log_prob[rows, columns],
        advantage=rollout.advantage[rows],
        cond=take(rollout.cond, rows),
        on_policy=on_policy,
        info=info,
    )
