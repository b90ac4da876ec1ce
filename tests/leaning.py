"""The toy as a model whose noise has a mean, on EDM's schedule: what CoMoSpeech starts from, without training anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tropism.base import Cond, Denoiser, Hops, Prediction, Schedule, bcast
from tropism.denoisers import MEAN, ConsistencyDenoiser, NetDenoiser, Shifted
from tropism.models.toy import MODES, PROMPTS, ToyTextToImage
from tropism.schedules import EDM

LOW = 0.05  # the lowest level above 0


@dataclass(frozen=True, eq=False)
class Leant:
    """What ``inner`` would say, had it been trained with noise of mean cond[MEAN]."""

    inner: Denoiser

    @property
    def schedule(self) -> Schedule:
        return self.inner.schedule

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        x0, eps = self.inner(x - bcast(self.schedule.sigma(t), x) * cond[MEAN], t, cond)
        return Prediction(x0, eps + cond[MEAN])


class Leaning(ToyTextToImage):
    """The toy of eps. The mean is half the mode of the prompt; that of the null prompt is 0."""

    def __init__(self, made: ToyTextToImage) -> None:
        vars(self).update(vars(made))
        alphas, sigmas = made.schedule._levels
        self.levels = (sigmas / alphas)[1:]
        plain = made.denoiser
        assert isinstance(plain, NetDenoiser)

        def net(x: Tensor, number: Tensor, cond: Cond) -> Tensor:
            """The number of EDM, ln(level) / 4, as the nearest timestep of the table."""
            level = (4 * number).exp().contiguous()
            return plain.net(x, torch.searchsorted(self.levels, level).clamp(max=len(self.levels) - 1), cond)

        self.schedule = EDM(float(self.levels[-1]), variance_preserving=True)
        self.denoiser = Shifted(Leant(NetDenoiser(net, self.schedule, "eps", plain.dtype)))

    def encode(self, prompts: Sequence[str]) -> Cond:
        place = torch.tensor([PROMPTS.index(prompt) for prompt in prompts])
        return {**super().encode(prompts), MEAN: MODES[place] / 2}

    def null(self) -> Cond:
        return {**super().null(), MEAN: torch.zeros(1, 2)}

    def grid(self, steps: int) -> Tensor:
        times = torch.linspace(1.0, float(self.schedule.time(torch.tensor(LOW))), steps + 1)
        times[-1] = 0.0
        return times

    def few_step(self, hops: Hops, steps: int, guidance: float | None = None) -> ToyTextToImage:
        view = super().few_step(hops, steps, guidance)
        view.denoiser = ConsistencyDenoiser(self.denoiser, None) if hops == "consistency" else self.denoiser
        return view
