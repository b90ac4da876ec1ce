"""MeanFlow: mean flows for one-step generative modelling (Geng et al. 2025, 2505.13447, algorithms 1 and 2).

The network says u(z, t, r), the mean velocity over [r, t], so that z_r = z_t - (t - r) u is reached in one jump from
any t to any r. With v = eps - x_0 the instantaneous velocity, the definition of the mean gives the identity

    u(z, t, r) = v - (t - r) du/dt,   du/dt = v du/dz + du/dt   (one forward derivative along (v, 1, 0) in z, t, r)

whose right side, without gradient, is the target. In a share of rows r = t, where it is v: plain flow matching. The
loss is |u - target|^2 / (sg |u - target|^2 + c)^p. Guidance is learnt: v is replaced by omega v + (1 - omega - kappa)
u(z, t, t | no prompt) + kappa u(z, t, t | prompt), whose fixed point has the guidance scale omega / (1 - kappa).

Departures from Gsunshine/meanflow:
- it may begin from a trained flow model whose network is told a second time; theirs begins from nothing;
- ``guidance_scale`` is omega / (1 - kappa), the scale of the house, where they give omega; the same at all times, where
  they leave it out early and late; 1 is learnt without mixing, whatever kappa is;
- the network gets t and r, theirs t and t - r.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tropism.base import Distillable, Reward, bcast
from tropism.distillation import Distillation, Pairs, Pictures
from tropism.distillation.velocity import check_straight, mean_velocity, null_rows, unprompted, velocity
from tropism.losses.consistency import Adaptive
from tropism.methods.flow_training import FlowTrainingSettings


@dataclass
class MeanFlow(Distillation):
    """Distillation in which the student says a mean velocity, of which its own derivative says what it should be."""

    scale: float = 1.0
    kappa: float = 0.0

    @torch.no_grad()
    def wanted(self, pairs: Pairs) -> Tensor:
        """(N, ...) the right side of the identity."""
        denoiser = self.policy.model.denoiser
        return mean_velocity(
            lambda x, t, r: velocity(denoiser, x, t, r, pairs.cond), pairs.x, pairs.t, pairs.end, self.guided(pairs)
        )

    def guided(self, pairs: Pairs) -> Tensor:
        """(N, ...) the velocity of each row, guided where it has a prompt."""
        assert pairs.x0 is not None and pairs.eps is not None
        v = pairs.eps - pairs.x0
        if self.scale == 1:
            return v
        model, omega = self.policy.model, self.scale * (1 - self.kappa)
        prompted = velocity(model.denoiser, pairs.x, pairs.t, pairs.t, pairs.cond)
        null = velocity(model.denoiser, pairs.x, pairs.t, pairs.t, null_rows(model.null(), len(v)))
        mixed = omega * v + (1 - omega - self.kappa) * null + self.kappa * prompted
        return v.where(bcast(unprompted(pairs.cond, model.null()), v), mixed)


@dataclass(frozen=True)
class Times:
    """Two logit-normal times, the later one t; in a share of rows both are t."""

    mean: float
    std: float
    equal: float

    def __call__(self, rows: int, made: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """(rows,) each: t, r <= t, and weight 1."""
        both = torch.sigmoid(self.mean + self.std * torch.randn(rows, 2, generator=generator))
        t, r = both.amax(1), both.amin(1)
        r = t.where(torch.rand(rows, generator=generator) < self.equal, r)
        return t, r, torch.ones(rows)


@dataclass(frozen=True)
class Settings(FlowTrainingSettings):
    """Mean velocities, learnt from pictures; any number of jumps."""

    equal: float = 0.75
    """Share of rows with r = t: plain flow matching."""
    time_mean: float = -0.4
    """Mean of the logit of the times."""
    time_std: float = 1.0
    """Standard deviation of the logit of the times."""
    power: float = 1.0
    """Of the adaptive weight (p); 0 is the squared distance."""
    weight_c: float = 0.01
    """What the adaptive weight adds to the squared distance (c)."""
    kappa: float = 0.5
    """Share of the student's own prompted velocity in a guided one."""

    def check(self) -> None:
        """As the shared settings, and the ranges above."""
        super().check()
        if not 0 <= self.equal <= 1 or not 0 <= self.kappa < 1:
            raise ValueError(f"equal is {self.equal} and kappa {self.kappa}; wanted 0 to 1, and 0 to below 1")
        if self.time_std <= 0 or self.power < 0 or self.weight_c <= 0:
            raise ValueError(
                f"time_std is {self.time_std}, power {self.power} and weight_c {self.weight_c}; wanted above 0 (power "
                "may be 0)"
            )

    def build(self, model: Distillable, reward: Reward, generator: torch.Generator, pictures: Pictures) -> MeanFlow:
        """The method on this model; the reward is not learnt from."""
        check_straight(model.denoiser)
        student = self.student(model, "jump")
        times = Times(self.time_mean, self.time_std, self.equal)
        return MeanFlow(
            student,
            student,
            self.pairs(model, pictures, times, generator),
            generator,
            Adaptive(self.power, self.weight_c),
            carry=velocity,
            scale=self.scale(model),
            kappa=self.kappa,
        )
