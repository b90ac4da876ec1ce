"""A chain found in parallel: self-refining diffusion samplers (Selvam, Merchant, Ermon 2024, 2412.08292), which are
Parareal (Lions, Maday, Turinici 2001) on the flow of a denoiser.

K moves are cut into about sqrt(K) blocks. One coarse move over each block, in turn, gives a rough chain; then every
block is walked in fine moves at once from where the rough chain enters it, and a coarse sweep carries corrections on:

    x_(i+1) <- F(x_i of before) + G(x_i) - G(x_i of before)

After p iterations the first p blocks are exactly those of the chain walked in turn, so that as many iterations as there
are blocks give all of it; far fewer come close. The last iterate is compared with the one before.

Calls wait for as little as they can (the paper's section 4.1): a block is walked again as soon as its entry is known,
while later blocks are still being corrected. Every round asks the denoiser once, about all states that are ready. An
iteration then costs as many rounds as a block has moves, and the chain never more than K: with B blocks of J moves,
p J + B - p rounds for p iterations. What is begun for an iteration that turns out not to be needed is counted too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from tropism.base import Cond, Denoiser, Kernel, Prediction, Schedule, concat, take
from tropism.samplers.chain import check_grid


@dataclass(frozen=True)
class Refined:
    """Where the chain ends, and what it took."""

    x: Tensor  # (B, ...) float32
    iterations: int
    changes: tuple[float, ...]  # of each iteration: the mean absolute change of the end, of the row that moved most
    serial_calls: int  # of the denoiser, one after another; the chain in turn has those of its K moves
    total_calls: int  # of the denoiser, for each row of x
    widest: int  # most states that were asked about at once, for each row of x


class _Job(NamedTuple):
    """A move of block ``i``: the next fine one of its walk in iteration ``p``, or its coarse one from that entry."""

    fine: bool
    i: int
    p: int
    x: Tensor
    now: int  # places on ts
    after: int


@dataclass
class _Counted:
    """A denoiser that counts."""

    inner: Denoiser
    calls: int = 0
    rows: int = 0

    @property
    def schedule(self) -> Schedule:
        return self.inner.schedule

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        self.calls, self.rows = self.calls + 1, self.rows + len(x)
        return self.inner(x, t, cond)


@dataclass
class _Blocks:
    """What is known: entries (i, p) of block i after p iterations, coarse moves from them, and walks under way.

    An entry is final after i iterations, so that there are p <= i only.
    """

    edges: list[int]  # places on ts, B + 1
    entries: dict[tuple[int, int], Tensor]
    most: int
    waiting: bool  # for the end of an iteration before the next begins
    coarse: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    walks: dict[tuple[int, int], tuple[Tensor, int]] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """B."""
        return len(self.edges) - 1

    def end(self, p: int) -> Tensor | None:
        """The end of the chain after p iterations, where it is known."""
        return self.entries.get((self.count, p))

    def ready(self) -> Iterator[_Job]:
        """Every move that waits for nothing."""
        for (i, p), x in self.entries.items():
            if i == self.count:
                continue
            if (i, p) not in self.coarse:
                yield _Job(False, i, p, x, self.edges[i], self.edges[i + 1])
            if p < self.most and (not self.waiting or self.end(p) is not None):
                state, place = self.walks.get((i, p + 1), (x, self.edges[i]))
                if place < self.edges[i + 1]:
                    yield _Job(True, i, p + 1, state, place, place + 1)

    def done(self, job: _Job, x: Tensor) -> None:
        """The move ended at x."""
        if job.fine:
            self.walks[job.i, job.p] = (x, job.after)
        else:
            self.coarse[job.i, job.p] = x

    def advance(self) -> None:
        """Every entry that is now known."""
        for i in range(self.count):
            for p in range(min(i + 1, self.most) + 1):
                if (i + 1, p) not in self.entries and (entry := self._entry(i, p)) is not None:
                    self.entries[i + 1, p] = entry

    def _entry(self, i: int, p: int) -> Tensor | None:
        """Where block i ends after p iterations."""
        if p == 0:
            return self.coarse.get((i, 0))
        walked, place = self.walks.get((i, p), (None, 0))
        if walked is None or place < self.edges[i + 1] or p == i + 1:
            return walked if place == self.edges[i + 1] else None
        new, old = self.coarse.get((i, p)), self.coarse[i, p - 1]
        return None if new is None else walked + (new - old)


def refine(
    kernel: Kernel,
    denoiser: Denoiser,
    x: Tensor,
    ts: Tensor,
    cond: Cond,
    *,
    coarse: Kernel | None = None,
    tolerance: float = 0.0,
    max_iterations: int | None = None,
    blocks: int | None = None,
    microbatch: int | None = None,
    pipelined: bool = True,
) -> Refined:
    """The chain of ``chain.walk`` from x (B, ...) over ts (K + 1,), cond rows (B, ...), in fewer serial calls.

    It ends once no row's end has changed by more than ``tolerance`` (mean absolute change, in units of x), or after
    ``max_iterations`` (``blocks``, which is exact, unless given). ``coarse`` makes the moves over whole blocks; the
    same kernel unless given. ``blocks`` is the square root of K, rounded, unless given. At most ``microbatch`` states
    are asked about at once, which bounds memory and changes nothing but rounding. Without ``pipelined`` an iteration
    begins when the one before has ended: more serial calls, none for nothing. Gradients are the caller's.

    Raises ValueError for a kernel that draws, and for what is out of range.
    """
    check_grid(ts)
    moves = len(ts) - 1
    blocks = max(1, round(moves**0.5)) if blocks is None else blocks
    most = blocks if max_iterations is None else min(max_iterations, blocks)
    if not 1 <= blocks <= moves or most < 1 or tolerance < 0 or (microbatch is not None and microbatch < 1):
        raise ValueError(
            f"blocks is {blocks}, max_iterations {max_iterations}, tolerance {tolerance} and microbatch {microbatch}; "
            f"wanted 1 to {moves} blocks, at least 1 iteration, at least 0, and at least 1"
        )
    edges = [round(i * moves / blocks) for i in range(blocks + 1)]
    state, counted = _Blocks(edges, {(0, 0): x.float()}, most, not pipelined), _Counted(denoiser)
    ask = _Asked(kernel, coarse or kernel, counted, ts.to(x.device, torch.float32), cond, microbatch or len(x) * moves)
    changes, serial, widest = list[float](), 0, 0
    while len(changes) < most and not (changes and changes[-1] <= tolerance):
        last, now = state.end(len(changes)), state.end(len(changes) + 1)
        if last is not None and now is not None:
            changes.append(float((now - last).abs().flatten(1).mean(1).max()))
            continue
        jobs = list(state.ready())
        serial, widest = serial + ask(jobs, state), max(widest, len(jobs))
        state.advance()
    final = state.end(len(changes))
    assert final is not None
    return Refined(final, len(changes), tuple(changes), serial, counted.rows // len(x), widest)


@dataclass
class _Asked:
    """Makes the moves of a round."""

    kernel: Kernel
    coarse: Kernel
    denoiser: _Counted
    ts: Tensor
    cond: Cond
    most: int

    def __call__(self, jobs: list[_Job], state: _Blocks) -> int:
        """All of them, and how many calls waited for one another."""
        groups = (
            [jobs] if self.kernel is self.coarse else [[j for j in jobs if j.fine], [j for j in jobs if not j.fine]]
        )
        return max(self._together(group, state) for group in groups if group)

    def _together(self, jobs: list[_Job], state: _Blocks) -> int:
        """Those of one kernel."""
        kernel, rows = self.kernel if jobs[0].fine else self.coarse, len(jobs[0].x)
        x, cond = torch.cat([job.x for job in jobs]), concat(*[self.cond] * len(jobs))
        t = self.ts[[job.now for job in jobs]].repeat_interleave(rows)
        s = self.ts[[job.after for job in jobs]].repeat_interleave(rows)
        ends, longest = [], 0
        for part in torch.arange(len(x), device=x.device).split(self.most):
            before = self.denoiser.calls
            law, _ = kernel(self.denoiser, x[part], t[part], s[part], take(cond, part))
            if bool(law.is_random.any()):
                raise ValueError(
                    f"{kernel} draws its states, and a chain found in parallel must be the same whenever it is walked; "
                    "take a deterministic kernel, such as DDIM(0), EulerODE or Heun"
                )
            ends.append(law.mode.float())
            longest = max(longest, self.denoiser.calls - before)
        for job, end in zip(jobs, torch.cat(ends).split(rows), strict=True):
            state.done(job, end)
        return longest
