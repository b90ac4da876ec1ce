"""Guidance that a network takes as an input: distilled models (Meng et al. 2022, 2210.03142; LCM, FLUX.1 dev)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tropism.base import Cond, Denoiser, Prediction, Schedule
from tropism.denoisers import TOLD
from tropism.guidance.cfg import Guided, Scale, network_cond


def by_row(t: Tensor, cond: Cond) -> Tensor:
    """A ``Scale``: the one that each row is told, cond[TOLD] (B,). Raises ValueError where rows are not told any."""
    if TOLD not in cond or cond[TOLD].shape != t.shape:
        found = tuple(cond[TOLD].shape) if TOLD in cond else "nothing"
        raise ValueError(f"cond[{TOLD!r}] is {found}; wanted a scale for each of {len(t)} rows")
    return cond[TOLD].to(t)


@dataclass(frozen=True, eq=False)
class Told:
    """A denoiser whose network is told w, in one pass of B rows; ``scale`` as in ``Guided``."""

    inner: Denoiser
    scale: float | Scale

    @property
    def schedule(self) -> Schedule:
        """The inner denoiser's."""
        return self.inner.schedule

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        """x (B, ...), t (B,), cond rows (B, ...)."""
        w = self.scale(t, cond) if callable(self.scale) else torch.full_like(t, self.scale)
        return self.inner(x, t, {**network_cond(cond), TOLD: w})


def interpolated(inner: Denoiser, null: Cond, omega: float | Scale, nu: float) -> Told:
    """nu D(cond, omega) + (1 - nu) D(null, omega), told omega: SoundCTM's guidance of jumps (2405.18503).

    A jump is linear in what is believed, so this interpolates jumps as well. nu = 1 asks B rows once, any other 2B.
    """
    return Told(Guided(inner, null, nu), omega)
