"""KL between chains against closed forms and against the model itself; diversity against arithmetic."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import TABLE
from torch import Tensor

from tropism.base import Cond, Prediction, bcast
from tropism.divergence import chains_with_kl, stochastic
from tropism.models.pipelines import load_pipeline
from tropism.samplers import DDIM, FlowSDE
from tropism.schedules import RectifiedFlow, flow_grid, table_grid
from tropism.watching import diversity, shift


class Aiming:
    """Believes that every clean sample is ``aim`` in each entry."""

    def __init__(self, schedule: Any, aim: float) -> None:
        self.schedule, self.aim = schedule, aim

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        x0 = torch.full_like(x, self.aim)
        alpha, sigma = bcast(self.schedule.alpha(t), x), bcast(self.schedule.sigma(t), x)
        return Prediction(x0, (x - alpha * x0) / sigma)


class Moved:
    """A model that aimed at 0 and now aims at ``aim``: 2 x 3 entries, no guidance."""

    latent_shape, guidance_scale = (2, 3), 1.0

    def __init__(self, schedule: Any, grid: Tensor, aim: float) -> None:
        self.denoiser, self._grid = Aiming(schedule, aim), grid

    def encode(self, prompts: Any) -> dict[str, Tensor]:
        return {"prompt": torch.zeros(len(prompts), 1)}

    def null(self) -> dict[str, Tensor]:
        return {"prompt": torch.zeros(1, 1)}

    def grid(self, steps: int) -> Tensor:
        return self._grid

    @contextmanager
    def reference(self) -> Iterator[None]:
        now, self.denoiser = self.denoiser, Aiming(self.denoiser.schedule, 0.0)
        yield
        self.denoiser = now


def pull(schedule: Any, kernel: DDIM | FlowSDE, t: Tensor, s: Tensor) -> tuple[float, float]:
    """(how much of the aim a move's mean has, its std), in double precision, from the kernels' published formulas."""
    (a_t, a_s), (s_t, s_s) = ([float(f(x[None])) for x in (t, s)] for f in (schedule.alpha, schedule.sigma))
    if isinstance(kernel, DDIM):  # mean = a_s x0 + sqrt(s_s^2 - std^2) (x - a_t x0) / s_t
        std = math.sqrt(max(s_t**2 - (a_t / a_s * s_s) ** 2, 0)) * s_s / s_t
        return a_s - math.sqrt(s_s**2 - std**2) * a_t / s_t, std
    ds, time = float(s - t), float(t)  # v = (x - x0) / t
    g2 = 0.7**2 * time / (1 - (time if time < 1 else float(s)))
    return -(1 + g2 * (1 - time) / (2 * time)) * ds / time, math.sqrt(-g2 * ds)


@pytest.mark.parametrize(
    ("schedule", "grid"),
    [(TABLE, table_grid(1000, 6)), (RectifiedFlow(), flow_grid(6, 3.0))],
    ids=["ddim", "flow"],
)
def test_kl_of_two_gaussian_chains_is_that_of_their_means(schedule: Any, grid: Tensor) -> None:
    aim = 0.01
    policy = stochastic(Moved(schedule, grid, aim), len(grid) - 1, microbatch=2)
    wanted = 0.0
    for t, s in itertools.pairwise(grid):
        share, std = pull(schedule, policy.kernel, t, s)
        wanted += 6 * (share * aim / std) ** 2 / 2 if std else 0.0
    _, nats = chains_with_kl(policy, ["a", "b", "c"], seed=0)
    assert wanted > 1e-4
    torch.testing.assert_close(nats.double(), torch.full((3,), wanted, dtype=torch.float64), rtol=2e-4, atol=0)
    assert chains_with_kl(policy, ["a"], 0, moved=False)[1].tolist() == [0.0]


@pytest.mark.parametrize("tiny", ["tiny_sd", "tiny_sd3"])
def test_a_model_that_has_not_moved_has_no_kl_and_one_that_has_does(tiny: str, request: Any) -> None:
    folder: Path = request.getfixturevalue(tiny)
    model = load_pipeline(folder, steps=3, guidance_scale=2.0)
    model.add_lora(2, generator=torch.Generator().manual_seed(0))
    policy = stochastic(model, 3, microbatch=2)
    assert policy.kernel == (DDIM(1.0) if tiny == "tiny_sd" else FlowSDE(0.7))
    ends, nats = chains_with_kl(policy, ["a", "a", "b"], seed=4)
    assert nats.tolist() == [0, 0, 0]
    assert torch.equal(chains_with_kl(policy, ["a", "a", "b"], 4, moved=False)[0], ends)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05
    later, nats = chains_with_kl(policy, ["a", "a", "b"], seed=4)
    assert (nats > 1e-3).all() and nats.isfinite().all()
    assert not torch.equal(later, ends)
    assert torch.equal(chains_with_kl(policy, ["a", "a", "b"], seed=4)[1], nats)


def test_diversity_is_the_mean_distance_of_pairs() -> None:
    black, white, half = torch.zeros(3, 64, 64), torch.ones(3, 64, 64), torch.zeros(3, 64, 64)
    half[:, :32] = 1.0
    images = torch.stack([black, white, half, *[white] * 3])
    found = diversity(images, 3)
    assert found.tolist() == pytest.approx([(1 + 2 * math.sqrt(0.5)) / 3, 0], abs=1e-6)
    fine = (torch.arange(64)[:, None] + torch.arange(64)) % 2 * torch.ones(3, 1, 1)
    assert diversity(torch.stack([fine, 1 - fine]), 2).tolist() == pytest.approx([0], abs=1e-6)  # noise is none
    assert math.isnan(diversity(images[:1], 1).item())
    assert diversity(torch.rand(4, 3, 8, 12), 2).shape == (2,)


def test_shift_is_in_pooled_standard_deviations() -> None:
    before, after = torch.tensor([0.0, 2.0]), torch.tensor([4.0, 6.0])
    assert shift(before, after) == pytest.approx(4.0)
    assert shift(after, before) == pytest.approx(-4.0)
    assert shift(torch.zeros(3), torch.zeros(3)) == 0.0
    assert shift(torch.full((3,), 0.5), torch.full((3,), 0.5)) == 0.0
    assert shift(torch.full((3,), 1.0), torch.full((3,), 0.9)) == pytest.approx(-100.0, rel=1e-5)
