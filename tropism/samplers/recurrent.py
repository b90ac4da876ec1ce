"""Recurrence, or time travel: after each move down the path the state is noised back up, and the move is made again.

RePaint (2201.09865, algorithm 1), FreeDoM (2303.09833), universal guidance (2302.07121) and TFG (2409.15761) let a
guide work longer at one level so. The draws in between are chance of the chain's own, and a kernel returns a law and
draws nothing; so this is a walk on a longer path, whose moves up are those of the forward process and have a law too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from tropism.base import Cond, Denoiser, Kernel, Schedule, bcast
from tropism.randomness import Randomness
from tropism.samplers.chain import Move, walk
from tropism.transitions import Gaussian


def noised_up(schedule: Schedule, x: Tensor, s: Tensor, t: Tensor) -> Gaussian:
    """The law of x_t given x (B, ...) at s (B,), s <= t (B,): mean (alpha_t / alpha_s) x and what is missing of
    sigma_t^2."""
    ratio = schedule.alpha(t) / schedule.alpha(s)
    return Gaussian(
        bcast(ratio, x) * x, (schedule.sigma(t) ** 2 - (ratio * schedule.sigma(s)) ** 2).clamp(min=0).sqrt()
    )


def recurrent_walk(
    kernel: Kernel,
    denoiser: Denoiser,
    x: Tensor,
    ts: Tensor,
    cond: Cond,
    generator: Randomness = None,
    *,
    times: int = 1,
    low: float = 0.0,
    high: float = 1.0,
) -> Iterator[Move]:
    """``samplers.walk`` in which every move from a t with low <= t <= high is made ``times`` times, with a move up (t <
    s, and the prediction of the move before it) between them.

    At a t without signal a move is made once: what is noised up from it remembers nothing. Raises ValueError for no
    grid, and for ``times`` below 1.
    """
    if times < 1:
        raise ValueError(f"times is {times}; wanted 1 or more")
    if not 0 <= low <= high <= 1:
        raise ValueError(f"wanted 0 <= low <= high <= 1; got {low} and {high}")
    schedule = denoiser.schedule
    for pair in itertools.pairwise(ts) if ts.ndim == 1 and len(ts) > 2 else [tuple(ts)]:
        again = times if low <= float(pair[0]) <= high and float(schedule.alpha(pair[0][None])) > 0 else 1
        for left in reversed(range(again)):
            (move,) = walk(kernel, denoiser, x, torch.stack(pair), cond, generator)
            yield move
            x = move.x_next
            if left:
                law = noised_up(schedule, x, move.s, move.t)
                x = law.sample(generator)
                yield Move(move.x_next, move.s, move.t, law, move.prediction, x)
