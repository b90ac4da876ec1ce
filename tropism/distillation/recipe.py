"""The method that every recipe of distillation is: carry both states of a pair to one place, and compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tropism.base import Cond, Denoiser, Loss, Prompts, bcast
from tropism.distillation.pairs import Pairs, Source
from tropism.ema import Ema
from tropism.losses.consistency import Distance, Huber
from tropism.policy import Policy
from tropism.samplers import Jump

Term = Callable[["Distillation", Pairs, Tensor], tuple[Tensor, dict[str, Tensor]]]
"""term(recipe, pairs, what the student said (N, ...)) -> (a sum to be added to the loss (), metrics).

It may also have ``after_step(recipe)``, called after each update, and ``state_dict`` and ``load_state_dict`` of
tensors, which checkpoints keep."""
View = Callable[[Tensor, Tensor, Cond], Tensor]
"""view(states (N, ...), their times (N,), cond) -> (N, ...) what is compared of them; a gradient flows through it."""
Carry = Callable[[Denoiser, Tensor, Tensor, Tensor, Cond], Tensor]
"""carry(denoiser, x (N, ...), t (N,), end (N,), cond) -> (N, ...) the state at ``end``."""


def as_is(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """The states themselves."""
    return x


def carried(denoiser: Denoiser, x: Tensor, t: Tensor, end: Tensor, cond: Cond) -> Tensor:
    """One deterministic jump from t to ``end``: alpha x_0 + sigma eps of what is believed at (x, t).

    At end = 0 it is the clean sample, the consistency function; at end = t it is x itself (2406.05768, section 3). A
    flow map is told ``end``.
    """
    law, _ = Jump()(denoiser, x, t, end, cond)
    return law.mean


@dataclass
class Distillation:
    """``policy`` is the student as it is sampled, ``teacher`` what it is compared with (its own steps and guidance).

    ``target`` is the average of the student that carries y; None is the student itself. ``decay`` is that of the
    average after so many updates of the source, where it changes. States are compared as ``view`` shows them. ``terms``
    are added.
    """

    policy: Policy
    teacher: Policy
    source: Source
    generator: torch.Generator
    distance: Distance = field(default_factory=Huber)
    target: Ema | None = None
    carry: Carry = carried
    view: View = as_is
    terms: Sequence[Term] = ()
    decay: Callable[[int], float] | None = None

    @property
    def made(self) -> int:
        """How many updates the source has made, where it counts them."""
        return int(getattr(self.source, "made", 0))

    def state_dict(self) -> dict[str, int]:
        """What is not a tensor."""
        return {"made": self.made}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continues from ``state_dict()``."""
        if hasattr(self.source, "made"):
            self.source.made = int(state["made"])

    def experience(self, batch: Prompts) -> Iterator[Iterator[Pairs]]:
        """What the source makes of the batch."""
        return self.source(self.teacher, batch)

    def loss(self, pairs: Pairs) -> Loss:
        """The weighted distance between where x and y are carried, and the terms."""
        wanted = self.wanted(pairs)  # first: it borrows the parameters that the graph below needs
        said = self.carry(self.policy.model.denoiser, pairs.x, pairs.t, pairs.end, pairs.cond)
        apart = self.distance(self.view(said, pairs.end, pairs.cond), wanted)
        total, count = (pairs.weight * apart).sum(), torch.tensor(float(len(apart)))
        metrics = {"distance": apart.detach().mean()}
        for term in self.terms:
            added, said_of_it = term(self, pairs, said)
            total = total + added
            metrics |= said_of_it
        return Loss(total, count, metrics)

    @torch.no_grad()
    def wanted(self, pairs: Pairs) -> Tensor:
        """(N, ...) the view of where the target carries y; of y itself where it has arrived."""
        with self.judging():
            there = self.carry(self.policy.model.denoiser, pairs.y, pairs.s, pairs.end, pairs.cond)
        return self.view(there.where(bcast(pairs.s > pairs.end, there), pairs.y), pairs.end, pairs.cond)

    def judging(self) -> AbstractContextManager[None]:
        """Inside, the parameters are those that carry y."""
        return nullcontext() if self.target is None else self.target.swapped()

    def after_step(self) -> None:
        """Moves the target, and what the terms move."""
        if self.target is not None:
            if self.decay is not None:
                self.target.decay = self.decay(self.made)
            self.target.update()
        for term in self.terms:
            if hasattr(term, "after_step"):
                term.after_step(self)
