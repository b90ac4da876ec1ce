"""The teacher: a model as it was before training, whatever has become of its network since."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from tropism.base import Cond, Denoiser, Prediction, Schedule, TextToImage
from tropism.denoisers import takes_guidance


@dataclass(frozen=True, eq=False)
class _Was:
    """The denoiser of a model inside its ``reference()``, without gradients."""

    model: TextToImage

    @property
    def schedule(self) -> Schedule:
        return self.model.denoiser.schedule

    @property
    def takes_guidance(self) -> bool:
        return takes_guidance(self.model.denoiser)

    @property
    def was(self) -> Denoiser:
        return self.model.denoiser

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        with self.model.reference():
            return self.model.denoiser(x, t, cond)


@dataclass(frozen=True, eq=False)
class Before:
    """``model`` as it was: a ``base.TextToImage`` with nothing to train. ``times`` replaces its grid."""

    model: TextToImage
    times: Callable[[int], Tensor] | None = None

    @property
    def denoiser(self) -> Denoiser:
        """Unguided, without gradients."""
        return _Was(self.model)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The model's."""
        return self.model.latent_shape

    @property
    def guidance_scale(self) -> float:
        """The model's default."""
        return self.model.guidance_scale

    def encode(self, prompts: Sequence[str]) -> Cond:
        """As the model."""
        return self.model.encode(prompts)

    def null(self) -> Cond:
        """As the model."""
        return self.model.null()

    def phrases(self, prompts: Sequence[str]) -> Tensor:
        """As the model."""
        return self.model.phrases(prompts)

    def decode(self, latents: Tensor) -> Tensor:
        """As the model."""
        return self.model.decode(latents)

    def grid(self, steps: int) -> Tensor:
        """(steps + 1,) ``times``, or the model's own."""
        return self.model.grid(steps) if self.times is None else self.times(steps)

    def parameters(self) -> list[torch.nn.Parameter]:
        """None."""
        return []

    def reference(self) -> AbstractContextManager[None]:
        """The model's."""
        return self.model.reference()
