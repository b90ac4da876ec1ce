"""Schedules and grids carry diffusers' numbers exactly, and refuse what is no time."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler

from tropism.schedules import (
    EDM,
    Cosine,
    DDPMTable,
    RectifiedFlow,
    add_noise,
    ddpm_table,
    flow_grid,
    karras_grid,
    ladder_grid,
    net_time,
    table_grid,
)

STEP_COUNTS = sorted({*range(1, 60), *range(61, 1001, 31), 48, 96, 103, 112, 500, 501, 999, 1000})


def taus(grid, size=1000):
    return (grid[:-1].double() * size).round().long() - 1


@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("zero_snr", [True, False])
@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_a_table_is_diffusers_bit_for_bit(name, zero_snr, to_one):
    config = dict(beta_start=0.00085, beta_end=0.012, beta_schedule=name)
    wanted = DDIMScheduler(**config, rescale_betas_zero_snr=zero_snr, set_alpha_to_one=to_one)
    table = ddpm_table(1000, **config, rescale_zero_terminal_snr=zero_snr, set_alpha_to_one=to_one)
    t = torch.arange(0, 1001).div(1000)
    cumprod = torch.cat([wanted.final_alpha_cumprod[None], wanted.alphas_cumprod])
    assert torch.equal(table.alpha(t), cumprod**0.5)
    assert torch.equal(table.sigma(t), (1 - cumprod) ** 0.5)
    assert table.alpha(t).dtype == torch.float32


@pytest.mark.parametrize("size", [10, 999, 1000, 4000])
def test_a_float32_time_finds_its_own_entry(size):
    table = DDPMTable(torch.linspace(0.999, 0.01, size))
    tau = torch.arange(size)
    t = ((tau + 1).double() / size).float()
    assert torch.equal(table.net_time(t), tau)
    assert torch.equal(table.alpha(t), table.alphas_cumprod.sqrt())
    assert table.net_time(torch.zeros(1)).item() == 0


SCHEDULES = [ddpm_table(), Cosine(), EDM(), EDM(variance_preserving=True), RectifiedFlow(3.0)]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
@pytest.mark.parametrize("t", [-0.01, 1.01, math.nan])
def test_what_is_no_time_is_refused(schedule, t):
    for method in (schedule.alpha, schedule.sigma, schedule.net_time):
        with pytest.raises(ValueError, match=r"times must lie in \[0, 1\]"):
            method(torch.tensor([0.5, t]))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
def test_alpha_and_sigma_are_per_row_float32_and_monotone(schedule):
    t = torch.linspace(0, 1, 501)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    assert alpha.shape == sigma.shape == t.shape
    assert alpha.dtype == sigma.dtype == torch.float32
    assert alpha.isfinite().all() and sigma.isfinite().all() and schedule.net_time(t).isfinite().all()
    assert (alpha.diff() <= 0).all() and (sigma.diff() >= 0).all()
    assert alpha[0] == 1 and sigma[0] == 0


def test_cosine_is_the_published_curve():
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    bar = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    schedule = Cosine()
    assert (schedule.alpha(t.float()) - bar.sqrt()).abs().max() < 1e-6
    assert (schedule.sigma(t.float())[1:] / (1 - bar[1:]).sqrt() - 1).abs().max() < 1e-6
    assert schedule.alpha(torch.ones(1)).item() == 0


def test_edm_scalings_agree_on_the_noise_to_signal_ratio():
    t = torch.linspace(0.01, 1, 100)
    exploding, preserving = EDM(), EDM(variance_preserving=True)
    assert torch.equal(exploding.alpha(t), torch.ones(100)) and exploding.sigma(torch.ones(1)).item() == 80
    assert (preserving.alpha(t) ** 2 + preserving.sigma(t) ** 2 - 1).abs().max() < 1e-6
    assert (preserving.sigma(t) / preserving.alpha(t) / exploding.sigma(t) - 1).abs().max() < 1e-6
    assert torch.allclose(exploding.net_time(t), exploding.sigma(t).log() / 4)


def test_karras_grid_has_the_published_levels():
    i = torch.arange(18, dtype=torch.float64)
    wanted = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    grid = karras_grid(18)
    assert grid.shape == (19,) and grid[-1] == 0
    assert (EDM().sigma(grid[:-1]) / wanted - 1).abs().max() < 3e-6
    with pytest.raises(ValueError, match="sigma_min < sigma_max"):
        karras_grid(18, 3.0, 2.0)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_table_grid_has_ddim_timesteps(spacing, offset):
    scheduler = DDIMScheduler(timestep_spacing=spacing, steps_offset=offset)
    for steps in STEP_COUNTS[: -1 if offset else None]:
        scheduler.set_timesteps(steps)
        grid = table_grid(1000, steps, spacing, offset)
        # At some counts numpy's arange appends a timestep -1 under "trailing"; it is no level.
        assert torch.equal(taus(grid), scheduler.timesteps[:steps]), steps
        assert grid.dtype == torch.float32 and grid[-1] == 0 and (grid.diff() < 0).all()


@pytest.mark.parametrize("offset", [0, 1])
def test_the_next_time_is_the_level_ddim_steps_to(offset):
    divisors = [n for n in range(1, 1001) if 1000 % n == 0]
    cases = [("leading", n, offset) for n in range(1, 501)] + [("trailing", n, 0) for n in divisors]
    for spacing, steps, shift in cases:
        tau = taus(table_grid(1000, steps, spacing, shift))
        after = torch.cat([tau[1:], torch.tensor([-1])])
        assert torch.equal(after, (tau - 1000 // steps).clamp(min=-1)), (spacing, steps)


def test_table_grid_refuses_what_leaves_the_table():
    with pytest.raises(ValueError, match=r"timesteps 1 to 1000 leave the table of 1000"):
        table_grid(1000, 1000, "leading", 1)
    with pytest.raises(ValueError, match=r"steps must lie in 1\.\.1000"):
        table_grid(1000, 1001)
    with pytest.raises(ValueError, match="unknown spacing"):
        table_grid(1000, 10, "even")


@pytest.mark.parametrize("original", [25, 50, 100])
def test_ladder_grid_has_lcm_timesteps(original):
    scheduler = LCMScheduler()
    for steps in range(1, original + 1):
        scheduler.set_timesteps(steps, original_inference_steps=original)
        assert torch.equal(taus(ladder_grid(1000, steps, original)), scheduler.timesteps)
    with pytest.raises(ValueError, match="original_steps"):
        ladder_grid(1000, original + 1, original)


@pytest.mark.parametrize("shift", [1.0, 1.15, 3.0, 5.0])
def test_flow_grid_is_flow_match_euler_bit_for_bit(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    for steps in (1, 2, 3, 4, 7, 10, 16, 28, 40, 50, 100, 333, 1000):
        scheduler.set_timesteps(steps)
        grid = flow_grid(steps, shift)
        assert torch.equal(grid, scheduler.sigmas)
        scheduler_times = scheduler.timesteps
        assert torch.equal(RectifiedFlow().net_time(grid[:-1]), scheduler_times)
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)


def test_an_even_flow_grid_is_the_shifted_line():
    even = torch.linspace(1, 0, 17, dtype=torch.float64)
    assert (flow_grid(16, 3.0, last=1 / 16) - RectifiedFlow(3.0).shifted(even)).abs().max() < 1e-7
    with pytest.raises(ValueError, match="shift > 0"):
        flow_grid(10, 0.0)


def test_add_noise_is_diffusers_and_never_broadcasts():
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 4, 3, 5, generator=generator)
    tau = torch.tensor([0, 10, 500, 999])
    scheduler = DDIMScheduler()
    got = add_noise(ddpm_table(), x0, noise, (tau + 1) / 1000)
    assert torch.equal(got, scheduler.add_noise(x0, noise, tau))
    with pytest.raises(ValueError, match="same shape"):
        add_noise(ddpm_table(), x0, noise[:1], (tau + 1) / 1000)


def test_net_time_asks_the_schedule():
    class Silent:
        def alpha(self, t):
            return 1 - t

        sigma = alpha

    t = torch.tensor([0.25, 1.0])
    assert net_time(ddpm_table(), t).tolist() == [249, 999]
    assert net_time(RectifiedFlow(), t).tolist() == [250.0, 1000.0]
    with pytest.raises(TypeError, match="Silent does not say"):
        net_time(Silent(), t)


def test_a_table_refuses_nonsense():
    with pytest.raises(ValueError, match="betas go to from_betas"):
        DDPMTable(torch.tensor([0.5, 1.5]))
    with pytest.raises(ValueError, match="final_alpha_cumprod"):
        DDPMTable(torch.tensor([0.9, 0.5]), 0.0)
    with pytest.raises(ValueError, match="unknown beta_schedule"):
        ddpm_table(beta_schedule="sqrt")
