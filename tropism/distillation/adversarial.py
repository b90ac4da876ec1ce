"""A term that makes what the student says look like the teacher's own samples: a discriminator of latents, hinge loss.

Hinge as in 1705.02894: the discriminator falls along relu(1 - D(real)) + relu(1 + D(said)), the student along
-weight D(said). It learns at the same batches, by Adam of its own, one step after each of the student's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from tropism.base import Cond
from tropism.checkpoint import load_optimizer, optimizer_state, under
from tropism.policy import Policy
from tropism.train import update


class Student(Protocol):
    """A method with a student."""

    @property
    def policy(self) -> Policy: ...


class Shown(Protocol):
    """Rows with a real sample of each prompt."""

    @property
    def x0(self) -> Tensor | None: ...

    @property
    def cond(self) -> Cond: ...


class Discriminator(nn.Module):
    """Latents (N, ...) and cond -> (N,): two layers of width ``width`` over points, four convolutions over maps.

    Of cond it sees the mean over tokens of every entry of floating point.
    """

    def __init__(self, shape: tuple[int, ...], cond: Cond, width: int, generator: torch.Generator) -> None:
        super().__init__()
        told = sum(value.shape[-1] for value in _vectors(cond))
        self.told = nn.Linear(told, width) if told else None
        if len(shape) == 1:
            self.first: nn.Module = nn.Linear(shape[0], width)
            body: list[nn.Module] = [nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)]
        else:
            self.first = nn.Conv2d(shape[0], width, 3, padding=1)
            body = [nn.SiLU(), nn.Conv2d(width, width, 3, 2, 1), nn.SiLU(), nn.Conv2d(width, width, 3, 2, 1)]
            body += [nn.SiLU(), nn.Conv2d(width, 1, 1)]
        self.body = nn.Sequential(*body)
        for parameter in self.parameters():  # drawn from this generator; the global one is not read
            size = parameter[0].numel() if parameter.ndim > 1 else 1
            parameter.data = torch.randn(parameter.shape, generator=generator) * (size**-0.5 if size > 1 else 0.0)

    def forward(self, x: Tensor, cond: Cond) -> Tensor:
        """Higher is more like the teacher's."""
        hidden = self.first(x)
        if self.told is not None:
            told = self.told(torch.cat(_vectors(cond), dim=1).to(x))
            hidden = hidden + told.reshape(*told.shape, *[1] * (hidden.ndim - 2))
        return self.body(hidden).flatten(1).mean(1)  # type: ignore[no-any-return]


def _vectors(cond: Cond) -> list[Tensor]:
    """(N, D) of each entry of floating point, by name."""
    values = [cond[name] for name in sorted(cond) if cond[name].is_floating_point() and cond[name].ndim > 1]
    return [value.flatten(1, -2).mean(1) if value.ndim > 2 else value for value in values]


class Adversarial:
    """A ``Term``. Pairs must know ``x0``, a sample of the teacher; what is said must be clean (``end`` 0)."""

    def __init__(self, discriminator: Discriminator, weight: float, learning_rate: float, dtype: torch.dtype) -> None:
        self.weight, self.dtype, self.rows = weight, dtype, 0
        self.discriminator = discriminator.to(dtype)
        self.parameters = list(discriminator.parameters())
        self.optimizer = torch.optim.Adam(self.parameters, lr=learning_rate, betas=(0.0, 0.99))

    def __call__(self, recipe: Student, pairs: Shown, said: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Adds to the discriminator's gradient, and returns the student's loss, which leaves it alone."""
        assert pairs.x0 is not None
        real, fake = (self.discriminator(x.to(self.dtype), pairs.cond) for x in (pairs.x0, said.detach()))
        apart = (1 - real).relu() + (1 + fake).relu()
        apart.sum().backward()
        self.rows += len(said)
        self.discriminator.requires_grad_(False)
        fooled = self.discriminator(said.to(self.dtype), pairs.cond)
        self.discriminator.requires_grad_(True)
        metrics = {"discriminator_loss": apart.detach().mean(), "discriminator_gap": (real - fake).detach().mean()}
        return -self.weight * fooled.sum(), metrics

    def after_step(self, recipe: Student) -> None:
        """The discriminator's step, by the rows of all processes."""
        rows = torch.tensor(float(self.rows), dtype=torch.float64)
        processes = recipe.policy.processes
        update(self.optimizer, self.parameters, rows, max_norm=1.0, step=0, processes=processes)
        self.rows = 0

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors only: the network, and its optimizer's."""
        return {**self.discriminator.state_dict(prefix="net/"), **optimizer_state(self.optimizer)[0]}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continues from ``state_dict()``."""
        self.discriminator.load_state_dict(under("net", state))
        load_optimizer(self.optimizer, state, self.optimizer.state_dict()["param_groups"])
