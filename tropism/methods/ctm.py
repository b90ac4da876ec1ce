"""CTM: Consistency Trajectory Models (Kim et al. 2024, 2310.02279), distilled.

One network jumps from any time t to any s <= t of the teacher's path: to s = 0 it is a consistency model, to s = t the
teacher's denoiser. Two states of a chain, ``most`` or fewer moves apart, must lead it to one state at a drawn s. They
are compared where an average of the student brings them at the end of time, so that all s count on one scale: with
G(x, t, s) the jump and - for an average that is not trained,

    d(G-(G(x, t, s), s, 0), G-(sg G(y, u, s), s, 0)) + weight |g(x, t, t) - D(x, t)|^2 (1 / 0.5^2 + 1 / level^2)

and the second term at y too, with g the clean half of what is believed, D the teacher's, and level = sigma / alpha.
Samples are deterministic jumps; ``samplers.Jump(gamma)`` puts noise between them.

Departures from sony/ctm (distillation without its adversarial stage):
- states come from the teacher's own chains, so that no data are needed, and every pair has its own number of moves;
- g learns what the teacher believes at both states of a pair (x alone is mostly noise, as large h need room below);
  theirs learns data from fresh noise (denoising score matching), whose minimum is the same for a teacher that is exact
  and unguided;
- that error has a fixed weight. Theirs makes both gradients equally long, which relies on the noise of score matching:
  here the error itself falls to nothing and the ratio would grow without end;
- huber, or another of the house's distances, where they take LPIPS on pixels.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tropism.base import Cond, Distillable, Reward, bcast, concat, take
from tropism.distillation import Distillation, carried
from tropism.distillation.pairs import Pairs, anywhere
from tropism.ema import Twin
from tropism.methods.distilling import DistillationSettings, latent_size
from tropism.samplers import Heun

SIGMA_DATA, FLOOR = 0.5, 0.002  # of EDM: the spread of the data, the lowest level


@dataclass
class CTM(Distillation):
    """Distillation whose ``target`` brings both states to the end of time."""

    def judging(self) -> AbstractContextManager[None]:
        """The student itself carries y."""
        return nullcontext()


@dataclass(frozen=True)
class Staying:
    """A ``Term``: a student that is told to stay believes what the teacher believes, at both states of a pair."""

    weight: float

    def __call__(self, recipe: Distillation, pairs: Pairs, said: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum over the rows' states that are not clean, and the mean error."""
        noisy, denoiser = pairs.s > 0, recipe.policy.model.denoiser
        x, t = torch.cat([pairs.x, pairs.y[noisy]]), torch.cat([pairs.t, pairs.s[noisy]])
        cond, weight = concat(pairs.cond, take(pairs.cond, noisy)), torch.cat([pairs.weight, pairs.weight[noisy]])
        with torch.no_grad():
            wanted = recipe.teacher.denoiser(x, t, cond).x0
        inverse = (denoiser.schedule.alpha(t) / denoiser.schedule.sigma(t)).clamp(max=1 / FLOOR)
        apart = (denoiser(x, t, cond).x0 - wanted).flatten(1).square().mean(1)
        error = apart * (SIGMA_DATA**-2 + inverse**2)
        return self.weight * (weight * error).sum(), {"denoiser_error": error.detach().mean()}


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
    denoiser_weight: float = 1.0
    """Of the error of the student's own denoiser, which it is when it is told to stay; 0: not learnt."""
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
        if self.denoiser_weight < 0:
            raise ValueError(f"denoiser_weight is {self.denoiser_weight}; wanted 0 or more")

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
            terms=[Staying(self.denoiser_weight)] if self.denoiser_weight else (),
        )
