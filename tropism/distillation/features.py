"""What a frozen teacher's network sees in a state: a ``View`` by which distillation compares states as features.

SoundCTM (2405.18503): with T_m the features after block m of the teacher at (state, time, prompt), and n unit length
over channels,

    d(x, y) = sum over m of the mean over positions of |n(T_m(x)) - n(T_m(y))|^2,

which is the squared Euclidean distance (``losses.consistency.SquaredNorm``) of what ``Features`` returns. The gradient
flows through the teacher into x; its weights get none.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tropism.base import Cond, Denoiser, Schedule
from tropism.denoisers import END, untold
from tropism.schedules import EDM

SMALLEST, CLEAN = 0.002, 1e-3  # the level of EDM, the time of other schedules, below which no teacher has learnt


class Networked(Protocol):
    """A model whose network can be listened to."""

    @property
    def denoiser(self) -> Denoiser: ...

    @property
    def network(self) -> nn.Module:
        """What the denoiser calls: inside ``reference``, the network as it was."""
        ...

    def reference(self) -> AbstractContextManager[None]: ...


@dataclass(frozen=True, eq=False)
class Features:
    """``blocks`` are names of modules of the network of ``model``, which is listened to as it was before training.

    A block answers with features (N, C), (N, L, C) (with ``channels_last``, else (N, C, L)) or (N, C, H, W), or with a
    tuple, of which its tensors count. Raises ValueError for unknown names.
    """

    model: Networked
    blocks: Sequence[str]
    channels_last: bool = True

    def __post_init__(self) -> None:
        with self.model.reference():
            known = [name for name, _ in self.model.network.named_modules() if name]
        wrong = sorted(set(self.blocks) - set(known))
        if wrong or not self.blocks:
            raise ValueError(f"the network has no blocks {wrong or 'to name'}; wanted some of {', '.join(known[:20])}")

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """x (N, ...) at t (N,) -> (N, F): unit features of all blocks, each over the root of its positions.

        The clean end counts as the lowest noise that teachers learn. Raises ValueError for a block that is not called.
        """
        heard: dict[str, list[Tensor]] = {name: [] for name in self.blocks}
        with self.model.reference(), ExitStack() as hooks:
            denoiser, network = self.model.denoiser, self.model.network
            for name in self.blocks:
                hooks.callback(network.get_submodule(name).register_forward_hook(_keeper(heard[name])).remove)
            rows = {key: value for key, value in untold(denoiser, cond).items() if key != END}
            denoiser(x, t.clamp(min=lowest(denoiser.schedule)), rows)
        silent = [name for name, found in heard.items() if not found]
        if silent:
            raise ValueError(f"the network does not call its blocks {silent}, or gives no features; name others")
        return torch.cat([self._unit(each) for found in heard.values() for each in found], dim=1)

    def _unit(self, features: Tensor) -> Tensor:
        """(N, ...) -> (N, F) whose squared length is 1: the mean over positions of their own."""
        channels = -1 if features.ndim == 3 and self.channels_last else 1
        positions = features[0].numel() / features.shape[channels]
        unit = nn.functional.normalize(features.float(), dim=channels, eps=1e-10)
        flat: Tensor = unit.flatten(1) / positions**0.5
        return flat


def _keeper(found: list[Tensor]) -> Any:
    """A forward hook that keeps what a module answers."""

    def keep(module: nn.Module, given: Any, answer: Any) -> None:
        parts = answer if isinstance(answer, tuple) else (answer,)
        found.extend(part for part in parts if isinstance(part, Tensor))

    return keep


def lowest(schedule: Schedule) -> float:
    """The time that stands for the clean end where a network is asked what it sees."""
    return float(schedule.time(torch.tensor(SMALLEST))) if isinstance(schedule, EDM) else CLEAN


def blocks_of(network: nn.Module) -> list[str]:
    """Names of the members of the network's own lists, in which diffusers' networks keep their blocks, and of a
    ``mid_block`` between them. Raises ValueError for a network without lists."""
    found = []
    for name, child in network.named_children():
        if isinstance(child, nn.ModuleList):
            found += [f"{name}.{place}" for place in range(len(child))]
        elif name == "mid_block":
            found.append(name)
    if not found:
        raise ValueError(
            f"{type(network).__name__} keeps no list of blocks; name some of its modules as feature_blocks"
        )
    return found
