"""Any path as TrigFlow's arc from data to noise, and how the answer of a consistency model changes along it (Lu and
Song 2024, 2410.11081).

With d the standard deviation of clean samples, x_t = alpha x_0 + sigma eps divided by n = sqrt(alpha^2 + (sigma / d)^2)
is cos(a) x_0 + sin(a) d eps at the angle a = arctan(sigma / (alpha d)): the same states and the same flow in another
unit. Its velocity, cos(a) d eps - sin(a) x_0, is d F of the paper's network; x_0 = cos(a) x - sin(a) d F is the
consistency function, which is x itself at a = 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tropism.base import Prediction, Schedule, bcast
from tropism.distillation.forward import along
from tropism.schedules import DDPMTable


@dataclass(frozen=True)
class Arc:
    """The path of ``schedule`` for data of standard deviation ``data_std``. Times (N,) are the schedule's own.

    Raises ValueError for a table of levels, whose time has no derivative.
    """

    schedule: Schedule
    data_std: float

    def __post_init__(self) -> None:
        if isinstance(self.schedule, DDPMTable):
            raise ValueError(
                "the model's noise levels are a table (DDPMTable), and this method takes derivatives in time; wanted a "
                "path in continuous time, such as a flow model's (or take ict or lcm)"
            )

    def angle(self, t: Tensor) -> Tensor:
        """(N,) -> (N,), 0 at clean samples to pi / 2 at pure noise."""
        sigma, alpha = self.schedule.sigma(t).double(), self.schedule.alpha(t).double()
        return torch.atan2(sigma / self.data_std, alpha).to(t)

    def turn(self, t: Tensor) -> Tensor:
        """(N,) the angle's derivative in t."""
        return along(self.angle, (t,), (torch.ones_like(t),))[1]

    def size(self, t: Tensor) -> Tensor:
        """(N,) n: a state of the path is so many times that of the arc."""
        return torch.hypot(self.schedule.alpha(t).double(), self.schedule.sigma(t).double() / self.data_std).to(t)

    def velocity(self, said: Prediction, t: Tensor) -> Tensor:
        """(N, ...) by which the state of the arc moves a radian, as both halves (N, ...) of what is believed say."""
        cos, sin = cos_sin(self.angle(t))
        return bcast(cos * self.data_std, said.eps) * said.eps - bcast(sin, said.x0) * said.x0


def cos_sin(angle: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) each, by way of float64: in float32 they depend on a row's place in the batch."""
    return angle.double().cos().to(angle), angle.double().sin().to(angle)


def tangent(
    velocity: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    t: Tensor,
    to: Tensor,
    angle: Tensor,
    turn: Tensor,
    share: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(velocity at (x, t), cos(a) df/da), (N, ...) each, f = cos(a) x - sin(a) velocity(x, t) along the path whose
    velocity is ``to`` (2410.11081, eq. 6 and 8):

        - cos(a)^2 (velocity - to) - share (cos(a) sin(a) x + cos(a) sin(a) d velocity / da)

    ``velocity`` says that of the arc at x (N, ...), t (N,); ``turn`` (N,) is da/dt. At ``share`` 0 the second half is
    left out and following the tangent is learning the velocity. The derivative is taken along cos(a) sin(a) times the
    direction, which stays small where its own is not.
    """
    cos, sin = cos_sin(angle)
    short = cos * sin
    said, rate = along(velocity, (x, t), (bcast(short, x) * to, short / turn))
    return said, -bcast(cos**2, x) * (said - to) - share * (bcast(short, x) * x + rate)


def scaled(tangents: Tensor, c: float) -> Tensor:
    """(N, ...) each row over its root mean square plus ``c`` (2410.11081, section 4.1); as it is for c infinite.

    The paper's norm is over all D dimensions; with the mean, c does not depend on their number (as in
    xandergos/sCM-mnist).
    """
    if c == float("inf"):
        return tangents
    return tangents / (bcast(tangents.flatten(1).square().mean(1).sqrt(), tangents) + c)
