"""Several processes that make one update: who works on what, and how all of them come to know all of it.

Every process draws the same random numbers for the whole batch, works on its share of the rows and hears of the other
results. So each knows every reward and advantage, and 1, 2 and 4 processes do the same work up to the order of sums.
Nothing is pickled: tensors are added up, and what has a name travels as JSON.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """Number ``index`` of ``count``. Alone, everything is a no-op."""

    index: int = 0
    count: int = 1
    device: str = "cpu"  # where tensors must be to be exchanged

    @property
    def first(self) -> bool:
        """The process that writes and prints."""
        return self.index == 0

    def share(self, rows: Tensor) -> Tensor:
        """Those of ``rows`` (N,) that this process works on: every ``count``-th."""
        return rows if self.count == 1 else rows[self.index :: self.count]

    def parts(self, rows: Tensor, size: int) -> list[Tensor]:
        """This process's share in parts of at most ``size``; of at least ``count`` rows, as many for every process."""
        own = self.share(rows)
        if self.count == 1 or not len(own):
            return list(own.split(size)) if len(own) else []
        return list(own.tensor_split(math.ceil(math.ceil(len(rows) / self.count) / size)))

    def joined(self, own: Tensor, rows: Tensor, total: int) -> Tensor:
        """(total, ...) from what every process has of its ``rows`` (n,): ``own`` (n, ...). The same bits for all."""
        if self.count == 1:
            return own
        whole = torch.zeros(total, *own.shape[1:], dtype=own.dtype, device=own.device)
        whole[rows.to(own.device)] = own
        flag = whole.dtype == torch.bool
        return self.summed(whole.byte() if flag else whole).to(own.dtype)

    def summed(self, value: Tensor) -> Tensor:
        """The sum over the processes."""
        if self.count == 1:
            return value
        here = value.detach().to(self.device, copy=True)
        dist.all_reduce(here)
        return here.to(value.device)

    def any(self, flag: bool) -> bool:
        """Whether it holds for one of them."""
        return bool(self.summed(torch.tensor(float(flag))))

    def every(self, facts: dict[str, Any]) -> list[dict[str, Any]]:
        """What each of them says, as JSON can hold it."""
        if self.count == 1:
            return [facts]
        said = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)
        mine = torch.tensor([self.index])
        lengths = self.joined(torch.tensor([len(said)]), mine, self.count)
        padded = torch.zeros(1, int(lengths.max()), dtype=torch.uint8)
        padded[0, : len(said)] = said
        table = self.joined(padded, mine, self.count)
        return [json.loads(bytes(row[:length].tolist())) for row, length in zip(table, lengths.tolist(), strict=True)]


ALONE = Processes()


def join(cpu: bool) -> Processes:
    """The processes that a launcher (accelerate launch, torchrun) has started; ``ALONE`` without one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    from accelerate import PartialState

    state = PartialState(cpu=cpu)
    return Processes(state.process_index, state.num_processes, str(state.device))


def leave() -> None:
    """The others are no longer waited for."""
    if dist.is_initialized():
        dist.destroy_process_group()
