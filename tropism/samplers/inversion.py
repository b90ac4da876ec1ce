"""DDIM inversion: the noise from which a deterministic chain would draw a given sample (2010.02502, section 4.3;
Dhariwal and Nichol 2021, 2105.05233, appendix F).

The deterministic move x_s = alpha(s) x0 + sigma(s) eps, made upwards in time. It is exact in the limit of many moves;
of few, what is drawn again from the noise is near the sample and not equal. On a straight path the move is Euler's.

Departure from diffusers' DDIMInverseScheduler, with which moves agree on equal answers of the network: its network is
told the time that a move goes to, here it is told the time of the state that it sees.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from tropism.base import Cond, Denoiser
from tropism.samplers.chain import check_grid
from tropism.schedules import add_noise


@torch.no_grad()
def invert(denoiser: Denoiser, clean: Tensor, ts: Tensor, cond: Cond) -> Tensor:
    """Clean samples (B, ...) and ts (K + 1,), the grid that will be walked down -> the state at ts[0], (B, ...)
    float32. Raises ValueError where ts is not a grid."""
    check_grid(ts)
    x, upwards = clean.float(), ts.flip(0).to(clean.device, torch.float32)
    for now, after in itertools.pairwise(upwards):
        t, s = now.expand(len(x)), after.expand(len(x))
        x0, eps = denoiser(x, t, cond)
        x = add_noise(denoiser.schedule, x0, eps, s)
    return x
