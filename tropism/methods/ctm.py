"""CTM: Consistency Trajectory Models (Kim et al. 2024, 2310.02279), distilled.

One network jumps from any time t to any s <= t of the teacher's path: to s = 0 it is a consistency model, to s = t the
teacher's denoiser. Two states of a chain, ``most`` or fewer moves apart, must lead it to one state at a drawn s. The two
are compared where an average of the student brings them at the end of time, so that all s count on one scale: with
G(x, t, s) the jump and - for an average that is not trained,

    d(G-(G(x, t, s), s, 0), G-(sg G(y, u, s), s, 0)) + balance |g(x, t, t) - D(x, t)|^2 (1 / 0.5^2 + 1 / level^2)

with g the clean half of what is believed, D the teacher's, level = sigma / alpha, and a balance that lets both pull
alike. Samples are jumps of which ``gamma`` is noise (``samplers.Jump``).

Departures from sony/ctm (distillation without its adversarial stage):
- states come from the teacher's own chains, so that no data are needed, and every pair has its own number of moves;
- g learns what the teacher believes at the states of the chains; theirs learns data from fresh noise (denoising score
  matching), whose minimum is the same for a teacher that is exact and unguided;
- huber, or another of the house's distances, where they take LPIPS on pixels;
- the balance is measured over the update before (``distillation.balance``).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tropism.base import Cond, Distillable, Loss, Reward, bcast
from tropism.distillation import Distillation, carried
from tropism.distillation.balance import Balance, last_matrix
from tropism.distillation.pairs import Pairs, anywhere
from tropism.ema import Twin
from tropism.methods.distilling import DistillationSettings, latent_size
from tropism.samplers import Heun

SIGMA_DATA, FLOOR = 0.5, 0.002  # of EDM: the spread of the data, the lowest level


@dataclass
class CTM(Distillation):
    """Distillation whose ``target`` brings both states to the end of time; a ``balance`` of None leaves g alone."""

    balance: Balance | None = None

    def judging(self) -> AbstractContextManager[None]:
        """The student itself carries y."""
        return nullcontext()

    def loss(self, pairs: Pairs) -> Loss:
        """The distance, and the balanced error of what the student believes."""
        main = super().loss(pairs)
        if self.balance is None:
            return main
        error = self.error(pairs)
        added = self.balance(main.total, (pairs.weight * error).sum())
        metrics = {"denoiser_error": error.detach().mean(), "balance": torch.tensor(self.balance.weight)}
        return Loss(main.total + added, main.weight, {**main.metrics, **metrics})

    def error(self, pairs: Pairs) -> Tensor:
        """(N,) the weighted mean square of g(x, t, t) minus what the teacher believes."""
        with torch.no_grad():
            wanted = self.teacher.denoiser(pairs.x, pairs.t, pairs.cond).x0
        believed = self.policy.model.denoiser(pairs.x, pairs.t, pairs.cond).x0
        schedule = self.policy.model.denoiser.schedule
        inverse = (schedule.alpha(pairs.t) / schedule.sigma(pairs.t)).clamp(max=1 / FLOOR)
        return (believed - wanted).flatten(1).square().mean(1) * (SIGMA_DATA**-2 + inverse**2)

    def after_step(self) -> None:
        """As every distillation, and the balance of the next update."""
        super().after_step()
        if self.balance is not None:
            self.balance.after_step(self.policy.processes)

    def state_dict(self) -> dict[str, Any]:
        """The balance besides."""
        return super().state_dict() | ({} if self.balance is None else {"balance": self.balance.weight})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from ``state_dict()``."""
        super().load_state_dict(state)
        if self.balance is not None:
            self.balance.weight = float(state["balance"])


@dataclass(frozen=True)
class Arrived:
    """A ``View``: where ``twin`` brings a state at the end of time."""

    twin: Twin[Any]

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """x (N, ...) at t (N,) -> (N, ...); x itself at t = 0."""
        there = carried(self.twin.model.denoiser, x, t, torch.zeros_like(t), cond)
        return there.where(bcast(t > 0, x), x)


@dataclass(frozen=True)
class Settings(DistillationSettings):
    """Jumps from any time to any other along the teacher's chains."""

    most: int = 0
    """Moves of the teacher between the two states of a pair, at most, drawn in proportion; 0: inference_steps - 1."""
    target_decay: float = 0.999
    """Of the average of the student that brings both states to the end of time."""
    match_denoiser: bool = True
    """Also learn the teacher's denoiser, which the student is when it is told to stay."""
    solver: Literal["heun", "first-order"] = "heun"
    """Of the teacher; heun asks it twice a move."""

    def check(self) -> None:
        """As the shared settings, and the ranges above."""
        super().check()
        if not 0 <= self.most <= self.inference_steps or not 0 <= self.target_decay < 1:
            raise ValueError(
                f"most is {self.most} and target_decay {self.target_decay}; wanted 0 to inference_steps, which is "
                f"{self.inference_steps}, and 0 to below 1"
            )

    def build(self, model: Distillable, reward: Reward, generator: torch.Generator) -> CTM:
        """The method on this model; the reward is not learnt from. Raises ValueError for a network that cannot be told
        two times."""
        student = self.student(model, "jump")
        teacher, twin = self.teacher(model, student), Twin(student.model, self.target_decay)
        return CTM(
            student,
            teacher.with_(kernel=Heun()) if self.solver == "heun" else teacher,
            self.chains(anywhere(self.most or self.inference_steps - 1), generator),
            generator,
            self.measure(latent_size(student)),
            twin,
            view=Arrived(twin),
            balance=Balance(last_matrix(model.parameters())) if self.match_denoiser else None,
        )
