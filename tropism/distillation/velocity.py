"""Mean velocities of the straight path, as a flow map says them, and their guidance while training.

u(x, t, r) is the mean over [r, t] of the velocity v = eps - x_0 along the path through x at t, so that x - (t - r) u is
the state at r; u(x, t, t) is the velocity itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tropism.base import Cond, Denoiser, bcast
from tropism.denoisers import towards
from tropism.distillation.forward import along
from tropism.schedules import RectifiedFlow

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""u(x (N, ...), t (N,), r (N,)) -> (N, ...)."""


def check_straight(denoiser: Denoiser) -> None:
    """Raises ValueError unless the denoiser is of a rectified flow."""
    if not isinstance(denoiser.schedule, RectifiedFlow):
        raise ValueError(
            f"the model is on the path of {type(denoiser.schedule).__name__}, and this method learns velocities of the "
            "straight one; wanted a flow model (RectifiedFlow)"
        )


def velocity(denoiser: Denoiser, x: Tensor, t: Tensor, end: Tensor, cond: Cond) -> Tensor:
    """u of a flow map, (N, ...): x (N, ...), t and end <= t (N,)."""
    x0, eps = denoiser(x, t, towards(denoiser, cond, end))
    return eps - x0


def mean_velocity(u: Velocity, x: Tensor, t: Tensor, r: Tensor, v: Tensor) -> Tensor:
    """v - (t - r) du/dt, with du/dt along the path: what u(x, t, r) is if it is right (2505.13447, eq. 6 and 8).

    du/dt = v du/dx + du/dt in one forward derivative, for r held where it is.
    """
    _, rate = along(lambda x, t: u(x, t, r), (x, t), (v, torch.ones_like(t)))
    return v - bcast(t - r, x) * rate


def unprompted(cond: Cond, null: Cond) -> Tensor:
    """(N,) which rows are the null row (1 row)."""
    same = [(value == null[name].to(value)).reshape(len(value), -1).all(1) for name, value in cond.items()]
    return torch.stack(same).all(0)


def null_rows(null: Cond, rows: int) -> Cond:
    """The null row, so many times."""
    return {name: value.expand(rows, *value.shape[1:]) for name, value in null.items()}
