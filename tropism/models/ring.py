"""Modes on a ring with a perfect teacher, for consistency models: an analytic mixture, and a student of it.

Inside ``reference()`` the denoiser is the mixture itself, in closed form, so that whatever a student lacks it lacks by
its method. The student is a network of three hidden layers that can be told two times.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tropism.base import Cond, Denoiser, Hops, Prediction, Prompts, Schedule
from tropism.denoisers import END, TOLD, ConsistencyDenoiser, FlowMap, NetDenoiser, Preconditioned
from tropism.models.toy import MixtureDenoiser, linear
from tropism.schedules import EDM, NetSchedule, RectifiedFlow

RADIUS, STD = 0.68, 0.05  # per-dimension standard deviation about 0.48
OUTLIER = 12.0


class RingNet(nn.Module):
    """SiLU layers: x (B, D), number (B,), cond["label"] (B,), and cond[END] and cond[TOLD] (B,) if there are any
    -> (B, D).

    Times enter as sinusoids of at most ``fastest`` radians a unit: a consistency function must be smooth in time.
    ``scale`` is how many units the numbers of the schedule span.
    """

    def __init__(
        self,
        labels: int,
        width: int,
        scale: float,
        generator: torch.Generator,
        fastest: float = 64.0,
        dimensions: int = 2,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("speeds", torch.logspace(0, math.log10(fastest), 8))
        self.labels = nn.Parameter(torch.randn(labels + 1, 16, generator=generator))  # the last is for none
        sizes = (dimensions + 2 * 16 + 16, width, width, width, dimensions)
        self.layers = nn.ModuleList(linear(a, b, generator) for a, b in itertools.pairwise(sizes))
        self.told = nn.utils.skip_init(nn.Linear, 16, sizes[0], bias=False)
        nn.init.zeros_(self.told.weight)  # so that being told the guidance changes nothing at first

    def _waves(self, number: Tensor) -> Tensor:
        speeds: Tensor = self.speeds  # type: ignore[assignment]
        angle = (number.float() / self.scale)[:, None] * speeds
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    def forward(self, x: Tensor, number: Tensor, cond: Cond) -> Tensor:
        """``number`` and cond[END] are what the schedule's ``net_time`` says of two times."""
        end = cond[END] if END in cond else torch.zeros_like(number)
        hidden = torch.cat([x, self._waves(number), self._waves(end), self.labels[cond["label"]]], dim=1)
        if TOLD in cond:
            hidden = hidden + self.told(self._waves(cond[TOLD] * self.scale / 10))
        for layer in self.layers[:-1]:
            hidden = nn.functional.silu(layer(hidden))
        return self.layers[-1](hidden)  # type: ignore[no-any-return]


class Ring:
    """``base.Distillable`` on points (B, D), usually in the plane; prompts are "class 0" and so on, or "any".

    ``modes`` Gaussians of standard deviation 0.05 stand on a circle of radius 0.68, dealt out to ``classes`` in turn;
    in more ``dimensions`` they stand anywhere on the sphere on which a coordinate has the same standard deviation. Of
    what ``pictures`` shows every coordinate is ``OUTLIER`` times as large with the chance ``outliers``; the mixture is
    without.
    On ``EDM`` (variance preserving, so that chains start from unit noise) the student is preconditioned with the
    boundary f(x, 0.002) = x (2303.01469), on ``RectifiedFlow`` it says eps - x0. Its times are as ``fastest`` in
    ``RingNet``.
    """

    def __init__(
        self,
        schedule: NetSchedule | None = None,
        modes: int = 8,
        classes: int = 1,
        width: int = 128,
        guidance_scale: float = 1.0,
        seed: int = 0,
        dimensions: int = 2,
        outliers: float = 0.0,
        fastest: float = 64.0,
    ) -> None:
        self.latent_shape, self.outliers = (dimensions,), outliers
        self.schedule: NetSchedule = EDM(variance_preserving=True) if schedule is None else schedule
        self.classes, self.guidance_scale, self.steps = classes, guidance_scale, 18
        means = _means(modes, dimensions)
        owner = torch.arange(modes) % classes
        table = torch.stack([(owner == each).float() for each in range(classes)])
        self.exact = MixtureDenoiser(
            means, torch.full((modes,), STD), torch.full((modes,), 1 / modes), self.schedule, table
        )
        flow = isinstance(self.schedule, RectifiedFlow)
        generator = torch.Generator().manual_seed(seed)
        self.net = RingNet(classes, width, 1000.0 if flow else 1.0, generator, fastest, dimensions)
        inner = (
            NetDenoiser(self.net, self.schedule, "flow")
            if flow
            else Preconditioned(self.net, self.schedule, 0.5, 0.002)
        )
        self._student: Denoiser = inner
        self._now = {"reference": False}  # views share it
        self._hops: Hops | None = None
        self._told = False

    @property
    def denoiser(self) -> Denoiser:
        """The student, or the mixture inside ``reference()``."""
        either = _Either(self)
        if self._hops == "jump":
            return FlowMap(either)
        return ConsistencyDenoiser(either, None) if self._hops == "consistency" else either

    def encode(self, prompts: Sequence[str]) -> Cond:
        """{"label": (B,)}; -1 for "any". Raises ValueError for another prompt."""
        known = {f"class {label}": label for label in range(self.classes)} | {"any": -1}
        wrong = sorted(set(prompts) - set(known))
        if wrong:
            raise ValueError(f"unknown prompts {wrong}; this ring knows {list(known)}")
        return {"label": torch.tensor([known[prompt] for prompt in prompts])}

    def null(self) -> Cond:
        """One row: any class."""
        return {"label": torch.tensor([-1])}

    def phrases(self, prompts: Sequence[str]) -> Tensor:
        """(B, 0): there are no tokens."""
        return torch.zeros(len(prompts), 0, dtype=torch.int64)

    def decode(self, latents: Tensor) -> Tensor:
        """The points themselves, (B, D)."""
        return latents

    def latents(self, images: Tensor) -> Tensor:
        """The points themselves, (B, D)."""
        return images

    def grid(self, steps: int) -> Tensor:
        """(steps + 1,) even times, the last of them 0 for the end: of a flow 0 anyway, on EDM that of level 0.002, as
        2206.00364 spaces levels with rho 7. So a grid of few steps is part of one of many."""
        end = self.schedule.time(torch.tensor(0.002)) if isinstance(self.schedule, EDM) else torch.tensor(0.0)
        times = torch.linspace(1.0, float(end), steps + 1)
        times[-1] = 0.0
        return times

    def parameters(self) -> list[nn.Parameter]:
        """The student's."""
        return list(self.net.parameters())

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the denoiser is the mixture."""
        before, self._now["reference"] = self._now["reference"], True
        try:
            yield
        finally:
            self._now["reference"] = before

    def few_step(self, hops: Hops, steps: int, guidance: float | None = None) -> Ring:
        """The same network, unguided or told."""
        view = copy.copy(self)
        view.guidance_scale, view.steps, view._hops = 1.0 if guidance is None else guidance, steps, hops
        view._told = guidance is not None
        return view

    def sample(self, prompts: Sequence[str], generator: torch.Generator | None = None) -> Tensor:
        """Exact draws from the mixture, (B, D)."""
        chances = self.exact.log_weights(len(prompts), self.encode(prompts)).exp()
        modes = torch.multinomial(chances, 1, generator=generator).flatten()
        return self.exact.means[modes] + STD * torch.randn(len(prompts), *self.latent_shape, generator=generator)

    def pictures(self, prompts: Prompts, generator: torch.Generator) -> Tensor:
        """``sample`` with its outliers, as ``distillation.Noised`` asks for it."""
        points = self.sample(list(prompts.text), generator)
        if not self.outliers:
            return points
        far = torch.rand(points.shape, generator=generator) < self.outliers
        return torch.where(far, OUTLIER * points, points)


def _means(modes: int, dimensions: int) -> Tensor:
    """(modes, dimensions) on a circle of radius RADIUS, or on a larger sphere."""
    if dimensions == 2:
        angles = torch.arange(modes) * (2 * math.pi / modes)
        return RADIUS * torch.stack([angles.cos(), angles.sin()], dim=1)
    places = torch.randn(modes, dimensions, generator=torch.Generator().manual_seed(0))
    return nn.functional.normalize(places, dim=1).mul(RADIUS * math.sqrt(dimensions / 2))


class _Either:
    """The denoiser of a ring: which one it is is decided at every call. The mixture reads neither cond[END] nor
    cond[TOLD]."""

    takes_end = True

    def __init__(self, ring: Ring) -> None:
        self._ring, self.takes_guidance = ring, ring._told

    @property
    def schedule(self) -> Schedule:
        return self._ring.schedule

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        ring = self._ring
        return ring.exact(x, t, cond) if ring._now["reference"] else ring._student(x, t, cond)
