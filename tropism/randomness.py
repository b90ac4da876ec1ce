"""Randomness is an argument: one generator for a batch, or one for each row of it.

A row with a generator of its own gets the same draws whichever rows it is batched with, so that micro-batches bound
memory and change nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Randomness = torch.Generator | Sequence[torch.Generator] | None
"""One generator, or one a row; None is torch's global one."""


def row_seeds(count: int, generator: torch.Generator | None = None) -> Tensor:
    """(count,) int64 seeds. However many there are, ``generator`` moves on by one draw, and the first are the same."""
    device = None if generator is None else generator.device
    start = int(torch.randint(2**62, (), generator=generator, device=device))
    return torch.randint(2**62, (count,), generator=torch.Generator().manual_seed(start))


def branches(seeds: Tensor, count: int) -> Tensor:
    """(P,) seeds -> (P, count) int64: the first of each is the seed itself, the others are drawn from it alone."""
    rest = [row_seeds(count, torch.Generator().manual_seed(seed))[1:] for seed in seeds.tolist()]
    return torch.cat([seeds[:, None], torch.stack(rest)], dim=1)


def row_generators(seeds: Tensor) -> list[torch.Generator]:
    """A fresh generator for each seed (N,), on the CPU: one seed means the same noise on every device."""
    return [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]


def each_row(randomness: Randomness, count: int) -> Sequence[torch.Generator]:
    """A generator for each of ``count`` rows: those that are given, or seeded by the single one."""
    if randomness is None or isinstance(randomness, torch.Generator):
        return row_generators(row_seeds(count, randomness))
    return randomness


def normal(shape: Sequence[int], randomness: Randomness, device: torch.device) -> Tensor:
    """Standard normal (B, ...) on ``device``, drawn where its generators live.

    Raises ValueError unless there is one generator, or B.
    """
    if randomness is None or isinstance(randomness, torch.Generator):
        home = device if randomness is None else randomness.device
        return torch.randn(list(shape), generator=randomness, device=home).to(device)
    if len(randomness) != shape[0]:
        raise ValueError(f"{len(randomness)} generators for {shape[0]} rows; wanted one a row, or a single one")
    rows = [torch.randn(list(shape[1:]), generator=each, device=each.device) for each in randomness]
    return torch.stack(rows).to(device)


def exponential(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Standard exponential (B, ...), where the generators live. Raises ValueError unless there are B."""
    if len(generators) != shape[0]:
        raise ValueError(f"{len(generators)} generators for {shape[0]} rows; wanted one a row")
    rows = [torch.empty(list(shape[1:]), device=each.device).exponential_(generator=each) for each in generators]
    return torch.stack(rows)
