"""DITTO: a sample is controlled by its first noise alone, which gradients of the reward move; DITTO-2 makes it fast.

Novack et al.: DITTO: Diffusion Inference-Time T-Optimization for Music Generation, 2024 (2401.12179), differentiates
through the whole chain, with checkpoints. Novack et al.: DITTO-2: Distilled Diffusion Inference-Time T-Optimization for
Music Generation, 2024 (2405.20289), differentiates through one move of a distilled model, and draws in several. Here
``surrogate`` is the number of moves that are differentiated: 1 is DITTO-2, 0 the sampler itself, DITTO.

The final chain draws no noise: a hop that noises its answer again would noise the control away as well. Departures: the
reward is maximised, whatever it is (theirs are distances to a control); the noise keeps its length (``hold_norm``),
since it otherwise leaves the shell on which the model knows noise.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tropism.base import Cond, bcast, take
from tropism.guidance import ROW
from tropism.policy import Policy
from tropism.samplers import noise_until
from tropism.steering.settings import SteererSettings
from tropism.steering.task import Steered, Task


@dataclass(frozen=True)
class Settings(SteererSettings):
    """The first noise, moved along the gradient of the reward."""

    updates: int = 40
    """Adam steps on the noise."""
    step_size: float = 0.05
    """Of Adam, on noise of unit variance."""
    surrogate: int = 1
    """Moves of the chain that is differentiated; 0: as many as are drawn in."""
    hold_norm: bool = True
    """Keep the length of the noise as it was."""

    def check(self) -> None:
        """As every steerer's, and the ranges above."""
        super().check()
        if self.updates < 1 or self.surrogate < 0:
            raise ValueError(
                f"updates is {self.updates} and surrogate {self.surrogate}; wanted at least 1, and 0 or more"
            )
        if not 0 < self.step_size < 10:
            raise ValueError(f"step_size is {self.step_size}; wanted above 0, such as 0.05")

    def draw(self, task: Task) -> Steered:
        """Raises TypeError for a reward without a gradient, before anything is drawn."""
        task.score.check_gradient()
        quiet = task.policy.with_(kernel=noise_until(task.policy.kernel, 1.0))
        (x, _), cond = task.start(), task.cond()
        ends, told = [], list[Sequence[tuple[float, float]]]()
        for rows in torch.arange(task.count).split(quiet.microbatch):
            own = take(cond, rows.to(x.device))
            noise, said = self._optimised(task, quiet, x[rows], own)
            told.append(said)
            with torch.no_grad():
                *_, last = quiet.chain(noise, own)
            ends.append(last.x_next)
        return Steered(torch.cat(ends), _steps(told, task.count))

    def _optimised(self, task: Task, policy: Policy, x: Tensor, cond: Cond) -> tuple[Tensor, list[tuple[float, float]]]:
        """The noise (N, ...) after all updates, and at each the sums of rewards and of mean squares of the noise."""
        through = policy.with_(steps=self.surrogate or policy.steps)
        noise, length = x.clone().requires_grad_(), x.flatten(1).norm(dim=1)
        adam, said = torch.optim.Adam([noise], lr=self.step_size), []
        for _ in range(self.updates):
            with torch.enable_grad():
                value = task.score.value(_end(through, noise, cond), cond[ROW]).float()
                known = value.nan_to_num(nan=0.0).where(~value.isnan(), 0.0)
                (gradient,) = torch.autograd.grad(-known.sum(), [noise])
            noise.grad = _tangent(gradient, noise.detach()) if self.hold_norm else gradient
            said.append((float(known.detach().sum()), float(noise.detach().square().flatten(1).mean(1).sum())))
            adam.step()
            if self.hold_norm:
                noise.data *= bcast(length / noise.data.flatten(1).norm(dim=1), noise.data)
        return noise.detach(), said


def _tangent(gradient: Tensor, x: Tensor) -> Tensor:
    """Without its part along x (N, ...): Adam would otherwise end where its signs point, not where the reward does."""
    along = (gradient * x).flatten(1).sum(1) / x.flatten(1).square().sum(1)
    return gradient - bcast(along, x) * x


def _end(policy: Policy, x: Tensor, cond: Cond) -> Tensor:
    """Where the chain from x (N, ...) ends, differentiable; a checkpoint a move where there are several."""

    def moved(state: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return policy.kernel(policy.denoiser, state, t, s, cond)[0].mode

    ts = policy.ts.to(x.device, torch.float32)
    for now, after in itertools.pairwise(ts):
        t, s = now.expand(len(x)), after.expand(len(x))
        x = moved(x, t, s) if policy.steps == 1 else checkpoint(moved, x, t, s, use_reentrant=False)
    return x


def _steps(told: Sequence[Sequence[tuple[float, float]]], count: int) -> list[Mapping[str, float]]:
    """A row an update: means over all samples."""
    sums = [[sum(values) for values in zip(*parts, strict=True)] for parts in zip(*told, strict=True)]
    return [
        {"update": float(place), "reward": reward / count, "noise_power": power / count}
        for place, (reward, power) in enumerate(sums)
    ]
