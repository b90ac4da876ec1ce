"""Inversion: what goes up comes down, the moves are those of diffusers, and captions that differ change the sample."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMInverseScheduler
from families import ROWS
from policies import seeded

from tropism.denoisers import regression_target
from tropism.models.toy import GaussianDenoiser
from tropism.samplers import DDIM, EulerODE, walk
from tropism.samplers.inversion import invert
from tropism.schedules import RectifiedFlow, ddpm_table

MEAN, STD = torch.tensor([1.0, -2.0]), 0.5
CLEAN = MEAN + STD * torch.randn(64, 2, generator=seeded(1))


def top_of(schedule: object) -> float:
    return 0.999 if isinstance(schedule, RectifiedFlow) else 1.0


@pytest.mark.parametrize(
    ("schedule", "kernel"),
    [(RectifiedFlow(), EulerODE()), (ddpm_table(1000, 0.00085, 0.012, "scaled_linear"), DDIM(0.0))],
    ids=["flow", "table"],
)
def test_a_sample_comes_back_as_moves_grow(schedule: object, kernel: object) -> None:
    denoiser, error = GaussianDenoiser(MEAN, STD, schedule), {}
    for moves in (50, 250):
        ts = torch.linspace(top_of(schedule), 0, moves + 1)
        noise = invert(denoiser, CLEAN, ts, {})
        *_, last = walk(kernel, denoiser, noise, ts, {})
        error[moves] = float((last.x_next - CLEAN).abs().max())
    assert error[250] < 0.06 and 3.5 < error[50] / error[250] < 5.5  # of first order


@pytest.mark.parametrize(
    "schedule", [RectifiedFlow(), ddpm_table(1000, 0.00085, 0.012, "scaled_linear")], ids=["flow", "table"]
)
def test_the_noise_converges_to_that_of_the_exact_flow(schedule: object) -> None:
    """The flow of a Gaussian keeps how many standard deviations a point is away from the mean."""
    alpha, sigma = schedule.alpha(torch.ones(1)), schedule.sigma(torch.ones(1))
    exact = alpha * MEAN + ((alpha * STD) ** 2 + sigma**2).sqrt() * (CLEAN - MEAN) / STD
    denoiser = GaussianDenoiser(MEAN, STD, schedule)
    error = [
        float((invert(denoiser, CLEAN, torch.linspace(1, 0, moves + 1), {}) - exact).abs().max())
        for moves in (250, 1000)
    ]
    assert error[1] < 0.02 and 3 < error[0] / error[1] < 4.5


def test_moves_are_those_of_diffusers_on_equal_answers() -> None:
    model = ROWS["sd"].model()
    scheduler = DDIMInverseScheduler.from_config(model.pipe.scheduler.config)
    scheduler.set_timesteps(5)
    ts, x = model.grid(5), torch.randn(2, *model.latent_shape, generator=seeded(2))
    cond, expected = model.encode(["a fox", "a hill"]), x.clone()
    up = ts.flip(0)
    with torch.no_grad():
        for now, label in zip(up[:-1], scheduler.timesteps, strict=True):
            t = now.expand(2)
            said = model.denoiser(expected, t, cond)
            output = regression_target("v", model.denoiser.schedule, said.x0, said.eps, t)
            expected = scheduler.step(output, int(label), expected).prev_sample
    assert scheduler.config.prediction_type == "v_prediction"
    assert torch.allclose(invert(model.denoiser, x, ts, cond), expected, atol=1e-4)


def test_times_that_rise_are_refused() -> None:
    with pytest.raises(ValueError, match="strictly decreasing"):
        invert(GaussianDenoiser(MEAN, STD, RectifiedFlow()), CLEAN, torch.tensor([0.0, 0.5, 0.9]), {})
