"""Adaptive guidance (Castillo et al. 2023, 2312.12487): the unguided half is asked for only while it matters.

AG: a row whose two beliefs agree (their cosine reaches a threshold) is asked with its prompt alone from the next move
on. LinearAG: at some moves the half without the prompt is not asked for but foretold, a linear combination of what was
said before, with scalar coefficients for each move that are fitted on recorded chains (its section 5).

Departures from the paper: what is compared and combined is x0 and not eps, whose cosine is near 1 at the start of a
chain as well, where x is all noise and both halves repeat it; the combination has no constant; only what was really
asked is combined. What a chain remembers is a value (``Memory``) beside its state, so that nothing is mutated.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tropism.base import Cond, Denoiser, Prediction, Schedule, bcast
from tropism.denoisers import consistent
from tropism.guidance.cfg import Guided


def agreement(told: Prediction, null: Prediction) -> Tensor:
    """(B,) cosine of both x0, in [-1, 1], over all that is one row's."""
    return cosine_similarity(told.x0.flatten(1), null.x0.flatten(1))


@dataclass(frozen=True, eq=False)
class Memory:
    """What rows remember of their chain: whether they agreed, and what was said at every move so far."""

    agreed: Tensor  # (B,) bool
    told: tuple[Tensor, ...] = ()  # x0 (B, ...) with the prompt
    null: tuple[Tensor | None, ...] = ()  # x0 (B, ...) without, None where it was foretold

    @classmethod
    def fresh(cls, x: Tensor) -> Memory:
        """Of chains that begin at x (B, ...)."""
        return cls(torch.zeros(len(x), dtype=torch.bool, device=x.device))

    def rows(self, index: Tensor) -> Memory:
        """Rows ``index`` (N,), as particles are resampled."""
        null = tuple(None if each is None else each[index] for each in self.null)
        return Memory(self.agreed[index], tuple(each[index] for each in self.told), null)

    def terms(self, move: int) -> list[Tensor]:
        """What the half without prompt of this move is a combination of: x0 with the prompt up to it, and without it
        before."""
        return [*self.told[: move + 1], *(each for each in self.null[:move] if each is not None)]


@dataclass(frozen=True)
class Linear:
    """Fitted coefficients of LinearAG for one grid, guidance and model, as ``fit_linear`` makes them."""

    ts: tuple[float, ...]  # (K + 1,)
    guidance: float
    coefficients: tuple[tuple[float, ...] | None, ...]  # a move each; None where the half is asked for
    error: tuple[float | None, ...]  # relative root mean square on what was fitted

    def null(self, memory: Memory, move: int) -> Tensor | None:
        """x0 (B, ...) without the prompt at this move, whose own half with it ``memory`` ends in; None: it is asked."""
        weights = self.coefficients[move]
        if weights is None:
            return None
        return sum((w * each for w, each in zip(weights, memory.terms(move), strict=True)), torch.zeros(()))

    def check(self, ts: Tensor) -> None:
        """Raises ValueError for another grid, ts (K + 1,)."""
        if len(ts) != len(self.ts) or not torch.allclose(ts.float().cpu(), torch.tensor(self.ts), atol=1e-5):
            raise ValueError(
                f"LinearAG was fitted on {len(self.ts) - 1} moves from {self.ts[0]:g}, and this chain has "
                f"{len(ts) - 1} from {float(ts[0]):g}; fit it on the grid that is walked"
            )

    def save(self, file: Path) -> None:
        """As JSON."""
        made = file.with_name(f".{file.name}.part")
        made.write_text(json.dumps(asdict(self), indent=1, allow_nan=False), encoding="utf-8")
        made.replace(file)

    @classmethod
    def load(cls, file: Path) -> Linear:
        """Raises ValueError, in one sentence, for a file that ``save`` did not write."""
        try:
            found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            rows = [None if row is None else tuple(map(float, row)) for row in found["coefficients"]]
            error = [None if each is None else float(each) for each in found["error"]]
            made = cls(tuple(map(float, found["ts"])), float(found["guidance"]), tuple(rows), tuple(error))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as cause:
            raise ValueError(f"{file} holds no coefficients of LinearAG; fit them with fit_linear and save") from cause
        terms = _terms([row is None for row in rows])
        if len(rows) + 1 != len(made.ts) or any(
            row is not None and len(row) != n for row, n in zip(rows, terms, strict=True)
        ):
            raise ValueError(f"{file} has coefficients that do not fit its {len(made.ts) - 1} moves; fit them again")
        return made


def _terms(asked: Sequence[bool]) -> list[int]:
    """How many coefficients a foretold half has at each move."""
    return [move + 1 + sum(asked[:move]) for move in range(len(asked))]


def fit_linear(memories: Iterable[Memory], ts: Tensor, guidance: float, asked: Sequence[bool]) -> Linear:
    """Least squares, in float64, on fully guided chains (``adaptive.remembered``); ``asked`` (K,) says at which moves
    the half without the prompt is really asked for, the first among them.

    Raises ValueError without chains, for chains of another length, and for one whose halves are not all there.
    """
    moves, chains = len(ts) - 1, list(memories)
    whole = all(len(each.told) == moves and all(half is not None for half in each.null) for each in chains)
    if not chains or not whole or len(asked) != moves or not asked[0]:
        raise ValueError(
            f"LinearAG is fitted on fully guided chains of {moves} moves, of which the first is asked; got "
            f"{len(chains)} sets of chains and {len(asked)} moves, the first {'' if asked[:1] == [True] else 'not '}"
            "asked"
        )
    kept = [
        replace(each, null=tuple(h if a else None for h, a in zip(each.null, asked, strict=True))) for each in chains
    ]
    found: list[tuple[float, ...] | None] = []
    error: list[float | None] = []
    for move in range(moves):
        if asked[move]:
            found.append(None)
            error.append(None)
            continue
        terms = [torch.stack([term.double().flatten() for term in each.terms(move)], 1) for each in kept]
        left = torch.cat(terms)
        right = torch.cat([_there(each.null[move]).double().flatten() for each in chains])
        weights = torch.linalg.lstsq(left, right[:, None], driver="gelsd").solution[:, 0]
        found.append(tuple(weights.tolist()))
        error.append(float((left @ weights - right).norm() / right.norm()))
    return Linear(tuple(ts.float().tolist()), guidance, tuple(found), tuple(error))


def _there(half: Tensor | None) -> Tensor:
    assert half is not None
    return half


def said(
    guided: Guided, memory: Memory, linear: Linear | None, x: Tensor, t: Tensor, cond: Cond
) -> tuple[Prediction, Prediction, Memory]:
    """Both halves at (x, t), and the memory with them: x (B, ...), t (B,). The network gets B rows, and another one for
    each row that has not agreed, unless ``linear`` foretells it."""
    move, rows = len(memory.told), ~memory.agreed
    if linear is None or linear.coefficients[move] is None:
        told, null = guided.halves(x, t, cond, rows)
        return told, null, replace(memory, told=(*memory.told, told.x0), null=(*memory.null, null.x0))
    told, _ = guided.halves(x, t, cond, torch.zeros_like(rows))
    memory = replace(memory, told=(*memory.told, told.x0), null=(*memory.null, None))
    x0 = _there(linear.null(memory, move)).where(bcast(rows, x), told.x0)
    schedule = guided.schedule
    null = consistent(x0, x.float(), bcast(schedule.alpha(t), x), bcast(schedule.sigma(t), x))
    return told, null, memory


@dataclass(frozen=True, eq=False)
class Known:
    """``inner``, whose answer at (x, t) is known already; it is asked anywhere else, and where a gradient is wanted."""

    inner: Denoiser
    x: Tensor
    t: Tensor
    answer: Prediction

    @property
    def schedule(self) -> Schedule:
        """The inner denoiser's."""
        return self.inner.schedule

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        """x (B, ...), t (B,)."""
        there = x.shape == self.x.shape and torch.equal(x, self.x) and torch.equal(t, self.t)
        return self.answer if there and not x.requires_grad else self.inner(x, t, cond)


@dataclass(frozen=True, eq=False)
class Partly:
    """Guidance in which the rows that agreed, (B,) bool, are asked with their prompt alone."""

    inner: Guided
    agreed: Tensor

    @property
    def schedule(self) -> Schedule:
        """The inner denoiser's."""
        return self.inner.schedule

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        """x (B, ...), t (B,)."""
        return self.inner.joined(*self.inner.halves(x, t, cond, ~self.agreed), t, cond)
