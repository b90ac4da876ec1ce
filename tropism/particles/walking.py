"""What a particle system walks: a kernel, its denoiser and a grid; and how, by micro-batches, with every call counted.

``policy.Policy`` is a ``Walk``. Everything that asks a network or a reward goes by micro-batches of its ``microbatch``
rows, and every row has its own generator, so that a micro-batch bounds memory and changes nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from tropism.base import Cond, Denoiser, Kernel, Prediction, Transition, take
from tropism.counting import Counting
from tropism.randomness import Randomness, row_generators, row_seeds

Score = Callable[[Tensor, Tensor], Tensor]
"""score(clean latents (N, ...), rows (N,) int64) -> (N,), NaN for no score; row b is of prompt b // K."""


class Walk(Protocol):
    """``steps`` moves of a kernel through a denoiser."""

    @property
    def kernel(self) -> Kernel: ...

    @property
    def denoiser(self) -> Denoiser: ...

    @property
    def ts(self) -> Tensor:
        """(steps + 1,) decreasing."""
        ...

    @property
    def microbatch(self) -> int: ...


@dataclass(frozen=True)
class Walker:
    """A ``Walk`` without a pipeline."""

    kernel: Kernel
    denoiser: Denoiser
    ts: Tensor
    microbatch: int = 1 << 30


@dataclass
class Cost:
    """Rows that the network and the reward were asked for; a guided prediction asks the network for two."""

    network_rows: int = 0
    reward_rows: int = 0

    def asked(self, rows: int) -> None:
        """The network, so many rows more."""
        self.network_rows += rows


def counted(denoiser: Denoiser, cost: Cost) -> Denoiser:
    """The same denoiser, counting as far inside as it goes: below guidance and other wrappers with an ``inner``."""
    inner: Denoiser | None = getattr(denoiser, "inner", None)
    if inner is None or not hasattr(type(denoiser), "__dataclass_fields__"):
        return Counting(denoiser, cost.asked)
    replaced: Any = dataclasses.replace
    wrapped: Denoiser = replaced(denoiser, inner=counted(inner, cost))
    return wrapped


@dataclass(frozen=True)
class Seen:
    """Particles in the middle of a chain, as intermediate rewards and proposals see them."""

    x: Tensor  # (B, ...) at t
    t: Tensor  # (B,)
    s: Tensor  # (B,) where the next move goes
    prediction: Prediction  # of the denoiser at (x, t)
    cond: Cond  # B rows
    rows: Tensor  # (B,) int64, place in the whole batch
    generators: Sequence[torch.Generator]  # B
    walk: Walker  # what is walked, counting
    cost: Cost = field(repr=False)

    def of(self, index: Tensor) -> Seen:
        """Rows ``index`` (N,)."""
        return dataclasses.replace(
            self,
            x=self.x[index],
            t=self.t[index],
            s=self.s[index],
            prediction=Prediction(self.prediction.x0[index], self.prediction.eps[index]),
            cond=take(self.cond, index),
            rows=self.rows[index],
            generators=[self.generators[place] for place in index.tolist()],
        )


def law_rows(law: Transition, index: Tensor) -> Transition:
    """The laws of rows ``index`` (N,) of a law that is a dataclass of tensors with B rows, as the house's are."""
    named: Any = law
    return type(law)(*(getattr(law, each.name)[index] for each in dataclasses.fields(named)))


def laws_below(laws: Sequence[Transition]) -> Transition:
    """Several laws of one kind below one another."""
    if len(laws) == 1:
        return laws[0]
    first: Any = laws[0]
    names = [each.name for each in dataclasses.fields(first)]
    return type(first)(*(torch.cat([getattr(law, name) for law in laws]) for name in names))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Chance:
    """The randomness of P * K particles, micro-batched or not: one generator for all, or one a row.

    One for all is the faster. With one a row, a prompt's particles do not depend on what they are batched with either.
    """

    moves: Randomness  # draws the noise of all rows at once
    rows: list[torch.Generator]  # one a row, for what is drawn by micro-batches

    @staticmethod
    def of(generator: Randomness, rows: int) -> Chance:
        """Raises ValueError for another number of generators."""
        if generator is None or isinstance(generator, torch.Generator):
            return Chance(generator, row_generators(row_seeds(rows, generator)))
        if len(generator) != rows:
            raise ValueError(f"{len(generator)} generators for {rows} particles; wanted one a row, or a single one")
        return Chance(list(generator), list(generator))

    def of_prompts(self, places: Tensor, count: int) -> Randomness:
        """For resampling prompts ``places`` (N,): the single one, or that of each prompt's first row."""
        if self.moves is None or isinstance(self.moves, torch.Generator):
            return self.moves
        return [self.rows[place * count] for place in places.tolist()]


class Walking:
    """A walk in progress: the counted denoiser, the counted reward, micro-batches."""

    def __init__(self, walk: Walk, score: Score) -> None:
        self.cost = Cost()
        self.walk = Walker(walk.kernel, counted(walk.denoiser, self.cost), walk.ts, walk.microbatch)
        self._score = score

    def score(self, x0: Tensor, rows: Tensor) -> Tensor:
        """(N,) float64 on the CPU. Raises ValueError for another shape, and for infinite rewards."""
        parts = []
        for part in torch.arange(len(x0), device=x0.device).split(self.walk.microbatch):
            value = self._score(x0[part], rows[part.to(rows.device)])
            if value.shape != (len(part),):
                raise ValueError(f"score returned {tuple(value.shape)} for {len(part)} samples; wanted one number each")
            parts.append(value.detach().double().cpu())
        self.cost.reward_rows += len(x0)
        values = torch.cat(parts)
        if bool(values.isinf().any()):
            raise ValueError("score returned an infinite reward; wanted finite numbers, or NaN for no score")
        return values

    def look(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond) -> tuple[Transition, Prediction]:
        """The laws of the next states and the predictions at x (B, ...); t and s are times ()."""
        laws, said = [], []
        for part in torch.arange(len(x), device=x.device).split(self.walk.microbatch):
            now, after = t.expand(len(part)), s.expand(len(part))
            law, prediction = self.walk.kernel(self.walk.denoiser, x[part], now, after, take(cond, part))
            laws.append(law)
            said.append(prediction)
        return laws_below(laws), Prediction(torch.cat([p.x0 for p in said]), torch.cat([p.eps for p in said]))
