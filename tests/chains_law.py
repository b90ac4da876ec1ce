"""Exact laws of discretised chains, and estimates with their standard errors, for tests of particles."""

import dataclasses
import itertools
import math

import torch

from tropism.models.toy import GaussianDenoiser
from tropism.particles import Walker
from tropism.samplers import DDIM, FlowSDE
from tropism.schedules import RectifiedFlow, ddpm_table, flow_grid, table_grid

TABLE = ddpm_table(1000, 0.00085, 0.012, "scaled_linear")
MODEL = GaussianDenoiser(torch.tensor([0.3, -0.2]), 0.7, TABLE)
WALK = Walker(DDIM(1.0), MODEL, table_grid(1000, 10, "leading", 1))
FLOW = Walker(FlowSDE(0.7), dataclasses.replace(MODEL, schedule=RectifiedFlow()), flow_grid(10, last=0.1))
DIRECTION = torch.tensor([1.0, 0.5])
SEEDS = range(5)


def reward(x0, rows):
    return x0 @ DIRECTION


def chain_law(walk, dimensions):
    """Mean (D,) and variance of x_0 when a Gaussian kernel over an exact Gaussian model is walked from N(0, I)."""
    probe = torch.stack([torch.zeros(dimensions), torch.ones(dimensions)])
    mean, variance = torch.zeros(dimensions, dtype=torch.float64), 1.0
    for t, s in itertools.pairwise(walk.ts):
        law, _ = walk.kernel(walk.denoiser, probe, t.expand(2), s.expand(2), {})
        slope = (law.mean[1] - law.mean[0]).double()
        mean, variance = law.mean[0].double() + slope * mean, float(slope[0] ** 2 * variance + law.std[0] ** 2)
    return mean, variance


def evidence(particles):
    """The mean over prompts of the estimated normaliser, which is unbiased, and its standard error."""
    z = particles.log_evidence.exp()
    return float(z.mean()), float(z.std() / math.sqrt(len(z)))


def target_mean(particles, values=None):
    """Mean over all prompts, weighted by their evidence (consistent in P for any K), and its standard error."""
    z = particles.log_evidence.exp()[:, None]
    means = particles.mean(values).reshape(len(z), -1)
    mean = (z * means).sum(0) / z.sum()
    return mean, (z * (means - mean) / z.mean()).std(0) / math.sqrt(len(z))
