"""Where pairs of states come from: the teacher's own chains, or data that are noised."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tropism.base import Cond, Prompts, Schedule, bcast, pick, take
from tropism.denoisers import TOLD
from tropism.policy import Chains as Walked
from tropism.policy import Policy, run_chains
from tropism.randomness import row_generators, row_seeds
from tropism.rollout import slices


@dataclass(frozen=True)
class Pairs:
    """Rows of two states each of one path; both lead to the same state at ``end``."""

    x: Tensor  # (N, ...) at t
    t: Tensor  # (N,)
    y: Tensor  # (N, ...) at s
    s: Tensor  # (N,) end <= s < t
    end: Tensor  # (N,)
    cond: Cond  # N rows
    weight: Tensor  # (N,)
    x0: Tensor | None = None  # (N, ...) the clean end of the path, where it is known
    eps: Tensor | None = None  # (N, ...) its noise, where x and y are x0 with noise
    prompts: Prompts | None = None  # N rows: what is shown, as it is written
    info: Mapping[str, float] = field(default_factory=dict)


Source = Callable[[Policy, Prompts], Iterator[Iterator[Pairs]]]
"""source(teacher, batch) -> updates, each an iterator of minibatches."""
Places = Callable[[int, int, torch.Generator], tuple[Tensor, Tensor, Tensor]]
"""places(rows, moves, generator) -> indices (rows,) of x, y and the end on a chain; 0 is noise, ``moves`` is clean."""


@dataclass
class Chains:
    """Pairs along the teacher's own chains from fresh noise: no data are needed (MLCM, 2406.05768).

    A batch of B prompts gives B chains of K moves, and a pass ``each`` pairs of each chain (K unless told) in
    ``updates`` steps. ``places`` says which states of a chain make a pair. The chain is what the teacher itself walks,
    so no pair is off its path. With ``between`` x lies anywhere on the way from its state to y's (``part_way``). With
    ``told`` every chain has a scale of guidance of its own, even in that range (2210.03142; 2310.04378, section 4.3),
    which its rows are told. ``drop`` is the share of chains without prompt.
    """

    places: Places
    minibatch: int
    updates: int
    passes: int
    generator: torch.Generator
    each: int | None = None
    between: bool = False
    told: tuple[float, float] | None = None
    drop: float = 0.0

    def __call__(self, teacher: Policy, batch: Prompts) -> Iterator[Iterator[Pairs]]:
        """One batch of chains, its pairs shuffled."""
        cond = teacher.model.encode(batch.text)
        cond = unasked(cond, teacher.model.null(), self.drop, self.generator) if self.drop else cond
        cond = scaled(cond, self.told, self.generator)
        generators = row_generators(row_seeds(len(batch.text), self.generator))
        with teacher.model.reference():
            chains = run_chains(teacher, teacher.noise(len(generators), generators), cond, generators)
        count, moves = len(batch.text) * (self.each or teacher.steps), teacher.steps
        for _ in range(self.passes):
            rows = torch.arange(count) % len(batch.text)
            first, second, end = self.places(count, moves, self.generator)
            order = torch.randperm(count, generator=self.generator)
            shares = torch.rand(count, generator=self.generator) if self.between else torch.zeros(count)
            for parts in slices(order, self.updates, self.minibatch, teacher.processes):
                made = ((i, self._gather(chains, batch, cond, rows[i], first[i], second[i], end[i])) for i in parts)
                yield (self._moved(teacher, pairs, shares[i]) for i, pairs in made)

    def _gather(
        self, chains: Walked, batch: Prompts, cond: Cond, rows: Tensor, first: Tensor, second: Tensor, end: Tensor
    ) -> Pairs:
        """The pairs at these places of these chains."""
        xs, times = chains.xs, chains.ts.to(chains.xs.device)
        return Pairs(
            x=xs[rows, first],
            t=times[first],
            y=xs[rows, second],
            s=times[second],
            end=times[end],
            cond=take(cond, rows),
            weight=torch.ones(len(rows), device=xs.device),
            x0=xs[rows, -1],
            prompts=pick(batch, rows),
        )

    def _moved(self, teacher: Policy, pairs: Pairs, shares: Tensor) -> Pairs:
        """The pairs with x so much (N,) of the way to y."""
        if not self.between:
            return pairs
        u = torch.lerp(pairs.t, pairs.s, shares.to(pairs.t))
        return replace(pairs, x=part_way(teacher.denoiser.schedule, pairs, u), t=u)


def part_way(schedule: Schedule, pairs: Pairs, u: Tensor) -> Tensor:
    """(N, ...) the states at times u (N,), s <= u <= t, on the way from x to y: alpha x_0 + sigma eps for the one x_0
    and eps that both share, which is where a move of Euler's or DDIM's goes through."""
    (at, bt), (ay, by), (au, bu) = ((schedule.alpha(v), schedule.sigma(v)) for v in (pairs.t, pairs.s, u))
    apart = at * by - ay * bt
    of_x, of_y = (au * by - ay * bu) / apart, (at * bu - au * bt) / apart
    return bcast(of_x, pairs.x) * pairs.x + bcast(of_y, pairs.y) * pairs.y


def scaled(cond: Cond, told: tuple[float, float] | None, generator: torch.Generator) -> Cond:
    """cond (B rows) with a scale of guidance a row, drawn evenly from ``told``; as it is without."""
    if told is None:
        return cond
    some, (low, high) = next(iter(cond.values())), told
    drawn = low + (high - low) * torch.rand(len(some), generator=generator)
    return {**cond, TOLD: drawn.to(some.device)}


def unasked(cond: Cond, null: Cond, share: float, generator: torch.Generator) -> Cond:
    """cond (B rows) in which a ``share`` of rows, each by chance, is the null row (1 row)."""
    some = next(iter(cond.values()))
    gone = (torch.rand(len(some), generator=generator) < share).to(some.device)
    return {
        name: torch.where(gone.reshape(-1, *[1] * (value.ndim - 1)), null[name].to(value), value)
        for name, value in cond.items()
    }


def adjacent(skip: int = 1) -> Places:
    """Two states ``skip`` moves apart, anywhere on the chain, both carried to its clean end."""

    def places(rows: int, moves: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        first = torch.randint(moves, (rows,), generator=generator)
        return first, (first + skip).clamp(max=moves), torch.full((rows,), moves)

    return places


def within(segments: int, skip: int = 1) -> Places:
    """Two states of one of ``segments`` equal parts of the chain, both carried to the part's end (2406.05768)."""

    def places(rows: int, moves: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        first = torch.randint(moves, (rows,), generator=generator)
        end = _end(first, moves // segments)
        return first, torch.minimum(first + skip, end), end

    return places


def _end(first: Tensor, length: int) -> Tensor:
    """Where the part of ``length`` moves ends that ``first`` (N,) lies in."""
    return (first // length + 1) * length


def across(segments: int) -> Places:
    """The starts of two neighbouring parts of the chain, both carried to its clean end (2406.05768, stage 2)."""

    def places(rows: int, moves: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        length = moves // segments
        first = torch.randint(segments, (rows,), generator=generator) * length
        return first, first + length, torch.full((rows,), moves)

    return places


def straight(segments: int, asked: int, share: float = 0.0) -> Places:
    """A state and the end of its part of the chain: what the teacher says, with nothing in between.

    A ``share`` of the states are at the ``asked`` even times at which a student of so many moves is asked.
    """

    def places(rows: int, moves: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        anywhere = torch.randint(moves, (rows,), generator=generator)
        even = torch.randint(asked, (rows,), generator=generator) * (moves // asked)
        first = even.where(torch.rand(rows, generator=generator) < share, anywhere)
        end = _end(first, moves // segments)
        return first, end, end

    return places


def anywhere(most: int) -> Places:
    """Two states up to ``most`` moves apart, h of them with a chance in proportion to h, both carried to a state drawn
    from the nearer one to the clean end (2310.02279, in the released code's weighting)."""

    def places(rows: int, moves: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        chances = torch.arange(1.0, min(most, moves) + 1)
        apart = 1 + torch.multinomial(chances, rows, replacement=True, generator=generator)
        first = _up_to(moves - apart, generator)
        return first, first + apart, first + apart + _up_to(moves - first - apart, generator)

    return places


def _up_to(last: Tensor, generator: torch.Generator) -> Tensor:
    """A draw from 0 to ``last`` (N,), both included."""
    drawn = torch.rand(len(last), generator=generator, dtype=torch.float64)
    return (drawn * (last + 1)).long()
