"""Noise schedules x_t = alpha(t) x_0 + sigma(t) eps, the times at which a chain visits them, and the number a network
is told.

Time is float32 in [0, 1]; 1 is noise and 0 is clean. Grids are (steps + 1,) strictly decreasing times that end in
exactly 0.

Sources: DDPM betas (Ho et al. 2020, 2006.11239), the cosine schedule (Nichol and Dhariwal 2021, 2102.09672, eq. 17),
zero terminal SNR (Lin et al. 2023, 2305.08891, alg. 1 and table 2), Karras levels (2206.00364, eq. 5), rectified flow
(2209.03003) with the resolution shift of SD3 (2403.03206, eq. 23). Tables and grids carry the numbers of diffusers'
schedulers.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from tropism.base import Schedule, bcast

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
Spacing = Literal["leading", "trailing", "linspace"]


@runtime_checkable
class NetSchedule(Schedule, Protocol):
    """A schedule that also knows what number the network was trained to receive."""

    def net_time(self, t: Tensor) -> Tensor:
        """(B,) -> (B,)."""
        ...


def net_time(schedule: Schedule, t: Tensor) -> Tensor:
    """What the network receives as its time, (B,) -> (B,). Raises TypeError for a schedule that does not say."""
    if not isinstance(schedule, NetSchedule):
        raise TypeError(f"{type(schedule).__name__} does not say what number a network receives; give it net_time(t)")
    return schedule.net_time(t)


def add_noise(schedule: Schedule, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """alpha(t) x0 + sigma(t) noise: x0 and noise (B, ...), t (B,). Raises ValueError when shapes differ."""
    if x0.shape != noise.shape:
        raise ValueError(f"x0 {tuple(x0.shape)} and noise {tuple(noise.shape)} must have the same shape")
    return bcast(schedule.alpha(t), x0) * x0 + bcast(schedule.sigma(t), x0) * noise


def scaled_level(schedule: Schedule, t: Tensor, factor: float) -> Tensor:
    """The time (B,) whose level sigma / alpha is ``factor``, in [0, 1], times that of t (B,); t in [0, 1].

    Found by halving, 40 times, from what the schedule says; on a table the nearest time below.
    """
    if factor in (0, 1):
        return t * factor
    low, high = torch.zeros_like(t), t
    alpha, sigma = schedule.alpha(t), factor * schedule.sigma(t)
    for _ in range(40):
        middle = (low + high) / 2
        below = schedule.sigma(middle) * alpha <= sigma * schedule.alpha(middle)
        low, high = middle.where(below, low), high.where(below, middle)
    return low


def _checked(t: Tensor) -> Tensor:
    """t itself, when every entry is a time."""
    if not bool(((t >= 0) & (t <= 1)).all()):
        raise ValueError(f"times must lie in [0, 1] (1 is noise); got {t.min().item()} to {t.max().item()}")
    return t


@dataclass(frozen=True, eq=False)
class DDPMTable:
    """A discrete schedule of T levels: integer timestep tau is t = (tau + 1) / T, and t = 0 is the final level.

    ``alphas_cumprod`` (T,) decreasing in [0, 1]; ``final_alpha_cumprod`` is 1 for a chain that ends clean (diffusers'
    set_alpha_to_one) or alphas_cumprod[0]. A time between two entries means the nearer one.
    """

    alphas_cumprod: Tensor
    final_alpha_cumprod: float = 1.0

    def __post_init__(self) -> None:
        table = self.alphas_cumprod
        if table.ndim != 1 or table.numel() == 0 or not bool(((table >= 0) & (table <= 1)).all()):
            raise ValueError(f"alphas_cumprod must be (T,) in [0, 1]; got {tuple(table.shape)}; betas go to from_betas")
        if not 0 < self.final_alpha_cumprod <= 1:
            raise ValueError(f"final_alpha_cumprod must lie in (0, 1]; got {self.final_alpha_cumprod}")

    @classmethod
    def from_betas(cls, betas: Tensor, set_alpha_to_one: bool = True) -> DDPMTable:
        """(T,) betas in [0, 1]."""
        cumprod = torch.cumprod(1.0 - betas.float(), dim=0)
        return cls(cumprod, 1.0 if set_alpha_to_one else float(cumprod[0]))

    @property
    def size(self) -> int:
        """T."""
        return self.alphas_cumprod.numel()

    @cached_property
    def _levels(self) -> tuple[Tensor, Tensor]:
        """alpha and sigma at levels 0 (the final one) to T, (T + 1,) each."""
        cumprod = torch.cat([self.alphas_cumprod.new_tensor([self.final_alpha_cumprod]), self.alphas_cumprod]).float()
        return cumprod.sqrt(), (1.0 - cumprod).sqrt()

    def _index(self, t: Tensor) -> Tensor:
        return (_checked(t).double() * self.size).round().long()

    def alpha(self, t: Tensor) -> Tensor:
        """(B,) in [0, 1] -> (B,) float32. Raises ValueError out of range, as sigma and net_time do."""
        return self._levels[0].to(t.device)[self._index(t)]

    def sigma(self, t: Tensor) -> Tensor:
        """(B,) in [0, 1] -> (B,) float32."""
        return self._levels[1].to(t.device)[self._index(t)]

    def net_time(self, t: Tensor) -> Tensor:
        """tau = round(t T) - 1 as int64 (B,); a clean t = 0 counts as tau = 0."""
        return (self._index(t) - 1).clamp(min=0)


def ddpm_table(
    num_train_timesteps: int = 1000,
    beta_start: float = 0.0001,
    beta_end: float = 0.02,
    beta_schedule: BetaSchedule = "linear",
    rescale_zero_terminal_snr: bool = False,
    set_alpha_to_one: bool = True,
) -> DDPMTable:
    """The table of a diffusers scheduler config, in its float32 arithmetic. ValueError on an unknown schedule."""
    if beta_schedule == "linear":
        betas = torch.linspace(beta_start, beta_end, num_train_timesteps)
    elif beta_schedule == "scaled_linear":
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps) ** 2
    elif beta_schedule == "squaredcos_cap_v2":
        bars = [
            math.cos((i / num_train_timesteps + 0.008) / 1.008 * math.pi / 2) ** 2
            for i in range(num_train_timesteps + 1)
        ]
        betas = torch.tensor([min(1 - after / before, 0.999) for before, after in itertools.pairwise(bars)])
    else:
        raise ValueError(f"unknown beta_schedule {beta_schedule!r}; wanted linear, scaled_linear or squaredcos_cap_v2")
    return DDPMTable.from_betas(_zero_terminal_snr(betas) if rescale_zero_terminal_snr else betas, set_alpha_to_one)


def _zero_terminal_snr(betas: Tensor) -> Tensor:
    """2305.08891, algorithm 1: shift and stretch sqrt(alphas_cumprod) so that it ends in 0 and starts as before."""
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    cumprod = ((root - last) * (first / (first - last))) ** 2
    return 1.0 - torch.cat([cumprod[:1], cumprod[1:] / cumprod[:-1]])


@dataclass(frozen=True)
class Cosine:
    """Nichol and Dhariwal's schedule in continuous time; alpha(1) = 0, so an eps network cannot start at t = 1."""

    offset: float = 0.008
    num_train_timesteps: int = 1000

    def _angles(self, t: Tensor) -> tuple[Tensor, float]:
        quarter = math.pi / 2 / (1 + self.offset)
        return (_checked(t).double() + self.offset) * quarter, self.offset * quarter

    def alpha(self, t: Tensor) -> Tensor:
        """(B,) -> (B,): cos of the angle over its value at 0."""
        angle, start = self._angles(t)
        return (angle.cos() / math.cos(start)).clamp(min=0).where(t < 1, 0.0).float()

    def sigma(self, t: Tensor) -> Tensor:
        """(B,) -> (B,): sqrt(1 - alpha^2), as a product of sines so that small t keeps its digits."""
        angle, start = self._angles(t)
        return (((angle - start).sin() * (angle + start).sin()).clamp(min=0).sqrt() / math.cos(start)).float()

    def net_time(self, t: Tensor) -> Tensor:
        """num_train_timesteps * t, float32."""
        return self.num_train_timesteps * _checked(t).float()


@dataclass(frozen=True)
class EDM:
    """Karras levels as a schedule: level(t) = sigma_max t^rho, so equal steps of t are equal steps of level^(1/rho).

    Variance exploding by default: alpha = 1, sigma = level, and a chain starts from sigma_max * noise. With
    ``variance_preserving`` the same chain is divided by sqrt(1 + level^2): alpha = 1 / that, sigma = level / that.
    """

    sigma_max: float = 80.0
    rho: float = 7.0
    variance_preserving: bool = False

    def level(self, t: Tensor) -> Tensor:
        """The noise-to-signal ratio, (B,) -> (B,) in [0, sigma_max]."""
        return self.sigma_max * _checked(t).float() ** self.rho

    def time(self, level: Tensor) -> Tensor:
        """The time of a level, (B,) -> (B,): ``level`` backwards. Raises ValueError for levels off the schedule."""
        return _checked((level.float() / self.sigma_max) ** (1 / self.rho))

    def _norm(self, t: Tensor) -> Tensor:
        return (
            (1 + self.level(t) ** 2).sqrt()
            if self.variance_preserving
            else torch.ones_like(_checked(t), dtype=torch.float32)
        )

    def alpha(self, t: Tensor) -> Tensor:
        """(B,) -> (B,)."""
        return 1 / self._norm(t)

    def sigma(self, t: Tensor) -> Tensor:
        """(B,) -> (B,)."""
        return self.level(t) / self._norm(t)

    def net_time(self, t: Tensor) -> Tensor:
        """c_noise = log(level) / 4 (2206.00364, table 1); the clean end counts as the smallest normal level."""
        return self.level(t).clamp(min=torch.finfo(torch.float32).tiny).log() / 4


@dataclass(frozen=True)
class RectifiedFlow:
    """alpha = 1 - t, sigma = t. ``shift`` moves grids and training times towards noise, never the path itself."""

    shift: float = 1.0
    num_train_timesteps: int = 1000

    def alpha(self, t: Tensor) -> Tensor:
        """(B,) -> (B,)."""
        return 1 - _checked(t).float()

    def sigma(self, t: Tensor) -> Tensor:
        """(B,) -> (B,)."""
        return _checked(t).float()

    def shifted(self, t: Tensor) -> Tensor:
        """t' = shift t / (1 + (shift - 1) t): maps [0, 1] to itself."""
        return self.shift * t / (1 + (self.shift - 1) * t)

    def net_time(self, t: Tensor) -> Tensor:
        """num_train_timesteps * t, float32."""
        return self.num_train_timesteps * _checked(t).float()


def table_grid(size: int, steps: int, spacing: Spacing = "leading", steps_offset: int = 0) -> Tensor:
    """The times of DDIMScheduler.set_timesteps over a table of ``size`` levels, then 0: (steps + 1,) float32.

    Departure: from tau, DDIMScheduler steps to the level of tau - size // steps (the final one when that is negative).
    That is the next time of this grid under "leading" (while steps_offset < size // steps) and under "trailing" when
    ``steps`` divides ``size``. Otherwise, and under "linspace" nearly always, diffusers labels the state with another
    level than the one it evaluates next; a chain on this grid does not. Raises ValueError when the timesteps leave the
    table.
    """
    if not 1 <= steps <= size:
        raise ValueError(f"steps must lie in 1..{size} (the size of the table); got {steps}")
    index = torch.arange(steps, dtype=torch.float64)
    if spacing == "leading":
        tau = (steps - 1 - index) * (size // steps) + steps_offset
    elif spacing == "trailing":
        stride = (size - size / steps) - size  # rounded as numpy's arange rounds it, which decides ties
        tau = (size + index * stride).round() - 1
    elif spacing == "linspace":
        tau = ((steps - 1 - index) * ((size - 1) / max(steps - 1, 1))).round()
    else:
        raise ValueError(f"unknown spacing {spacing!r}; wanted leading, trailing or linspace")
    if tau[0] > size - 1 or tau[-1] < 0:
        raise ValueError(
            f"timesteps {int(tau[-1])} to {int(tau[0])} leave the table of {size}; lower steps or steps_offset"
        )
    return torch.cat([(tau + 1) / size, tau.new_zeros(1)]).float()


def ladder_grid(size: int, steps: int, original_steps: int = 50) -> Tensor:
    """The times of LCMScheduler.set_timesteps, then 0: (steps + 1,) float32 (2310.04378; RLCM walks them too).

    They are ``steps`` rungs of the distillation ladder tau = k (size // original_steps) - 1, k = 1..original_steps.
    Raises ValueError unless 1 <= steps <= original_steps <= size.
    """
    if not 1 <= steps <= original_steps <= size:
        raise ValueError(f"wanted 1 <= steps <= original_steps <= {size}; got {steps} and {original_steps}")
    skipped = (torch.arange(steps, dtype=torch.float64) * (original_steps / steps)).floor()
    rung = (original_steps - skipped) * (size // original_steps)
    return torch.cat([rung / size, rung.new_zeros(1)]).float()


def flow_grid(steps: int, shift: float = 1.0, last: float | None = None, num_train_timesteps: int = 1000) -> Tensor:
    """The sigmas of FlowMatchEulerDiscreteScheduler.set_timesteps: (steps + 1,) float32 from 1 to 0.

    Levels fall evenly from 1 to ``last`` and are then shifted. The default is diffusers': 1 / num_train_timesteps,
    which its constructor shifts once more before set_timesteps does. ``last=1 / steps`` is the even grid of Flux and
    DanceGRPO.
    """
    if steps < 1 or shift <= 0 or (last is not None and not 0 < last <= 1):
        raise ValueError(f"wanted steps >= 1, shift > 0 and last in (0, 1]; got {steps}, {shift} and {last}")
    if last is None:
        smallest = torch.tensor([1.0]) / num_train_timesteps
        last = float(shift * smallest / (1 + (shift - 1) * smallest))
    top, bottom = float(num_train_timesteps), last * num_train_timesteps
    index = torch.arange(steps, dtype=torch.float64)
    level = (index * ((bottom - top) / max(steps - 1, 1)) + top) / num_train_timesteps
    if steps > 1:
        level[-1] = bottom / num_train_timesteps
    return torch.cat([shift * level / (1 + (shift - 1) * level), level.new_zeros(1)]).float()


def karras_grid(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """(steps + 1,) times at which ``EDM(sigma_max, rho)`` falls to sigma_min as in 2206.00364, eq. 5, then 0."""
    if steps < 1 or not 0 < sigma_min < sigma_max:
        raise ValueError(f"wanted steps >= 1 and 0 < sigma_min < sigma_max; got {steps}, {sigma_min} and {sigma_max}")
    grid = torch.linspace(1.0, (sigma_min / sigma_max) ** (1 / rho), steps, dtype=torch.float64)
    return torch.cat([grid, grid.new_zeros(1)]).float()
