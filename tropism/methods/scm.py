"""sCM: simplified consistency models in continuous time (Lu and Song 2024, 2410.11081, algorithm 1).

A consistency function f(x, t), the clean end of the path through x, does not change along the path: df/dt = 0. With no
second state there is no error of discretisation; the derivative is a forward one through the network, along the path.
On the arc that any path is (``distillation.arc``), f = cos(a) x - sin(a) d F for data of standard deviation d, and

    loss = |F - sg(F + g / (rms g + c))|^2,   g = cos(a) df/da / d
         = (-cos(a)^2 (d F - dx/da) - r cos(a) sin(a) (x + d dF/da)) / d

with r rising from 0 to 1 over the first updates, which begins as the training of a denoiser. ``direction`` says what
dx/da is: ``teacher``, the velocity of the guided model as it was (sCD); ``data``, that of the picture and its noise
(sCT, without a teacher). The student begins from the model, as theirs does.

Departures from the paper:
- any path in continuous time is taken as it is, where theirs trains TrigFlow first (SANA-Sprint, 2503.09641, section 3,
  converts flow models likewise); tables of levels are refused;
- every angle weighs 1, where they learn a weight; and the rms of a tangent stands where the paper has its norm;
- states may come from the teacher's chains, anywhere on their moves, so that no data are needed.

A time embedding that is too fast makes the derivative useless (docs/methods/scm.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from tropism.base import Cond, Denoiser, Distillable, Prediction, Reward, bcast
from tropism.distillation import Distillation, Noised, Pairs, Pictures, Source
from tropism.distillation.arc import Arc, scaled, tangent
from tropism.distillation.curriculum import DATA_STD, Alone, Span
from tropism.distillation.forward import derivable
from tropism.distillation.pairs import adjacent
from tropism.methods.distilling import DistillationSettings, latent_size


@dataclass
class SCM(Distillation):
    """Distillation in which the student's own derivative says by how much its velocity is wrong."""

    arc: Arc = field(kw_only=True)
    direction: Literal["teacher", "data"] = "teacher"
    c: float = 0.1
    warmup: int = 0
    taught: int = 0

    def __post_init__(self) -> None:
        self.carry = self.said

    def said(self, denoiser: Denoiser, x: Tensor, t: Tensor, end: Tensor, cond: Cond) -> Tensor:
        """F, (N, ...): the velocity of the arc in units of the data's standard deviation."""
        return self.arc.velocity(denoiser(x, t, cond), t) / self.arc.data_std

    @torch.no_grad()
    def wanted(self, pairs: Pairs) -> Tensor:
        """(N, ...) F and its tangent."""
        denoiser, arc, like = self.policy.model.denoiser, self.arc, pairs.x

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return arc.velocity(denoiser(x * bcast(arc.size(t), x), t, pairs.cond), t)

        x, angle, turn = like / bcast(arc.size(pairs.t), like), arc.angle(pairs.t), arc.turn(pairs.t)
        share = min(1.0, self.taught / self.warmup) if self.warmup else 1.0
        now, change = tangent(velocity, x, pairs.t, self.towards(pairs), angle, turn, share)
        return now / arc.data_std + scaled(change / arc.data_std, self.c / DATA_STD)

    def towards(self, pairs: Pairs) -> Tensor:
        """(N, ...) dx/da."""
        if self.direction == "teacher":
            return self.arc.velocity(self.teacher.denoiser(pairs.x, pairs.t, pairs.cond), pairs.t)
        assert pairs.x0 is not None and pairs.eps is not None
        return self.arc.velocity(Prediction(pairs.x0, pairs.eps), pairs.t)

    def after_step(self) -> None:
        """Counts the updates of the warm-up."""
        super().after_step()
        self.taught += 1

    def state_dict(self) -> dict[str, int]:
        """What is not a tensor."""
        return super().state_dict() | {"taught": self.taught}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continues from ``state_dict()``."""
        super().load_state_dict(state)
        self.taught = int(state["taught"])


@dataclass(frozen=True)
class Settings(DistillationSettings):
    """Continuous-time consistency, from the teacher's velocities or from pictures alone."""

    direction: Literal["teacher", "data"] = "teacher"
    """Along what the answer must not change: the guided teacher's (sCD), or that of pictures and noise (sCT)."""
    data: Literal["chains", "pictures"] = "chains"
    """Where states come from: the teacher's chains, or pictures with noise (a column image; scenes are drawn)."""
    warmup: int = 1000
    """Updates over which the student's own derivative enters its tangent; 0: at once."""
    tangent_c: float = 0.1
    """Added to a tangent's size, by which it is divided, for data of standard deviation 0.5; inf: not divided."""
    level_mean: float = -1.0
    """Mean of the logarithm of the level of noise of pictures."""
    level_std: float = 1.4
    """Standard deviation of the logarithm of the level of noise of pictures."""
    data_std: float = 1.0
    """Standard deviation of clean latents, with which the levels of noise scale; the papers' images have 0.5."""
    distance: Literal["huber", "l2", "pseudo-huber"] = "l2"
    """Between what the student says and what its tangent asks for."""

    def check(self) -> None:
        """As the shared settings, and the ranges above."""
        super().check()
        if self.direction == "data" and self.data == "chains":
            raise ValueError("direction is data, which needs pictures, and data is chains; give data pictures")
        if self.warmup < 0 or self.tangent_c <= 0 or self.level_std <= 0 or self.data_std <= 0:
            raise ValueError(
                f"warmup is {self.warmup}, tangent_c {self.tangent_c}, level_std {self.level_std} and data_std "
                f"{self.data_std}; wanted above 0 (warmup may be 0)"
            )

    @property
    def needs_pictures(self) -> bool:
        """Whether ``build`` is given pictures."""
        return self.data == "pictures"

    def build(
        self, model: Distillable, reward: Reward, generator: torch.Generator, pictures: Pictures | None = None
    ) -> SCM:
        """The method on this model; the reward is not learnt from. Raises ValueError for a table of levels."""
        arc = Arc(model.denoiser.schedule, self.data_std)
        student = self.student(model, "consistency")
        derivable(student.model)
        source: Source = replace(self.chains(adjacent(), generator), between=True)
        if pictures is not None:
            times = Alone(Span(arc.schedule, self.data_std), self.level_mean, self.level_std)
            source = Noised(model, pictures, times, self.minibatch, self.updates, self.passes, generator)
        return SCM(
            student,
            self.teacher(model, student),
            source,
            generator,
            self.measure(latent_size(student)),
            arc=arc,
            direction=self.direction,
            c=self.tangent_c,
            warmup=self.warmup,
        )
