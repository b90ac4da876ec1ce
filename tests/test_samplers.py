"""Kernels against diffusers, against their published formulas in float64, and against their own discretised law."""

import itertools
import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler
from nets import FLOW, SD, TABLE, flow_rows, randn, wavy

from tropism.denoisers import Clipped, ConsistencyDenoiser, NetDenoiser
from tropism.models.toy import GaussianDenoiser
from tropism.samplers import DDIM, Consistency, ConstantSDE, EulerODE, FlowSDE, walk
from tropism.schedules import EDM, Cosine, RectifiedFlow, ddpm_table, flow_grid, karras_grid, ladder_grid, table_grid

TOLERANCE = 1e-5


def ours(kernel, denoiser, ts, x, seed):
    with torch.no_grad():
        return [move.x_next for move in walk(kernel, denoiser, x, ts, {}, torch.Generator().manual_seed(seed))]


def theirs(scheduler, x, seed, **options):
    generator, states = torch.Generator().manual_seed(seed), []
    for tau in scheduler.timesteps:
        output = wavy(x, tau.expand(x.shape[0]), {})
        x = scheduler.step(output, tau, x, generator=generator, **options).prev_sample
        states.append(x)
    return states


def worst(ours, theirs):
    assert len(ours) == len(theirs)
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("target", ["eps", "v"])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("offset", [0, 1])
def test_ddim_is_diffusers(eta, target, to_one, offset, record_property):
    kind = {"eps": "epsilon", "v": "v_prediction"}[target]
    options = dict(set_alpha_to_one=to_one, steps_offset=offset, clip_sample=False)
    scheduler = DDIMScheduler(**SD, **options, prediction_type=kind)
    scheduler.set_timesteps(50)
    denoiser = NetDenoiser(wavy, ddpm_table(1000, **SD, set_alpha_to_one=to_one), target)
    x = randn(4, 3, 8, 8)
    gap = worst(
        ours(DDIM(eta), denoiser, table_grid(1000, 50, "leading", offset), x, 7), theirs(scheduler, x, 7, eta=eta)
    )
    record_property("max_difference", gap)
    assert gap <= TOLERANCE


@pytest.mark.parametrize("eta", [0.0, 0.9, 1.0])
def test_ddim_at_zero_terminal_snr_is_diffusers(eta):
    options = dict(timestep_spacing="trailing", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    scheduler = DDIMScheduler(**SD, **options, clip_sample=False)
    scheduler.set_timesteps(50)
    denoiser = NetDenoiser(wavy, ddpm_table(1000, **SD, rescale_zero_terminal_snr=True), "v")
    assert denoiser.schedule.alpha(torch.ones(1)) == 0
    x, grid = randn(4, 3, 8, 8), table_grid(1000, 50, "trailing")
    got, wanted = ours(DDIM(eta), denoiser, grid, x, 3), theirs(scheduler, x, 3, eta=eta)
    if eta < 1:
        assert worst(got, wanted) <= TOLERANCE
        return
    assert (
        wanted[0].isnan().all()
    )  # 1 - A - std^2 rounds to less than 0 under diffusers' root: ours is a number, the right one
    law, prediction = DDIM(1.0)(denoiser, x, grid[:1].expand(4), grid[1:2].expand(4), {})
    assert torch.stack(got).isfinite().all()
    torch.testing.assert_close(law.mean, denoiser.schedule.alpha(grid[1:2]) * prediction.x0, rtol=0, atol=5e-4)
    torch.testing.assert_close(law.std, denoiser.schedule.sigma(grid[1:2]).expand(4), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "clip", [dict(clip_sample=True), dict(clip_sample=False, thresholding=True, sample_max_value=2.0)]
)
@pytest.mark.parametrize("rederive", [False, True])
def test_clipping_is_diffusers(clip, rederive):
    scheduler = DDIMScheduler(**SD, **clip, steps_offset=1)
    scheduler.set_timesteps(50)
    inner = NetDenoiser(wavy, ddpm_table(1000, **SD), "eps")
    denoiser = Clipped(inner, 2.0, 0.995, rederive) if "thresholding" in clip else Clipped(inner, rederive=rederive)
    x = randn(4, 3, 8, 8)
    wanted = theirs(scheduler, x, 3, eta=0.5, use_clipped_model_output=rederive)
    assert worst(ours(DDIM(0.5), denoiser, table_grid(1000, 50, "leading", 1), x, 3), wanted) <= TOLERANCE


@pytest.mark.parametrize(("spacing", "steps"), [("linspace", 50), ("trailing", 30)])
def test_where_ddim_steps_off_its_own_timesteps_the_kernel_can_follow(spacing, steps):
    scheduler = DDIMScheduler(**SD, timestep_spacing=spacing, clip_sample=False)
    scheduler.set_timesteps(steps)
    denoiser, kernel = NetDenoiser(wavy, ddpm_table(1000, **SD), "eps"), DDIM(1.0)
    x, generator, states = randn(4, 3, 8, 8), torch.Generator().manual_seed(3), []
    wanted = theirs(scheduler, x, 3, eta=1.0)
    for tau in scheduler.timesteps:
        after = max(int(tau) - 1000 // steps, -1)
        law, _ = kernel(denoiser, x, ((tau + 1) / 1000).expand(4), torch.full((4,), (after + 1) / 1000), {})
        x = law.sample(generator)
        states.append(x)
    assert worst(states, wanted) <= TOLERANCE


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_is_flow_match_euler(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(50)
    x = randn(4, 3, 8, 8)
    got = ours(EulerODE(), NetDenoiser(wavy, RectifiedFlow(shift), "flow"), flow_grid(50, shift), x, 0)
    assert worst(got, theirs(scheduler, x, 0)) <= TOLERANCE
    as_ddim = ours(DDIM(0.0), NetDenoiser(wavy, RectifiedFlow(shift), "flow"), flow_grid(50, shift), x, 0)
    assert worst(got, as_ddim) <= TOLERANCE


@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("target", ["eps", "v"])
@pytest.mark.parametrize("steps", [1, 4, 50])
def test_consistency_is_lcm(steps, target, to_one):
    kind = {"eps": "epsilon", "v": "v_prediction"}[target]
    scheduler = LCMScheduler(**SD, set_alpha_to_one=to_one, prediction_type=kind)
    scheduler.set_timesteps(steps)
    denoiser = ConsistencyDenoiser(NetDenoiser(wavy, ddpm_table(1000, **SD, set_alpha_to_one=to_one), target))
    x = randn(4, 3, 8, 8)
    got, wanted = ours(Consistency(), denoiser, ladder_grid(1000, steps), x, 5), theirs(scheduler, x, 5)
    assert worst(got, wanted) <= TOLERANCE


def test_flow_sde_is_flow_grpo():
    grid, t, s = flow_rows()
    x, v = randn(5, 6), randn(5, 6, seed=1)
    schedule = RectifiedFlow(3.0)
    law, _ = FlowSDE(0.7)(NetDenoiser(lambda x, number, cond: v, schedule, "flow"), x, t, s, {})
    for row in range(5):
        now, after, second = t[row].item(), s[row].item(), grid[1].item()
        g = 0.7 * math.sqrt(now / (1 - (second if now == 1 else now)))
        ds = after - now
        state, velocity = x[row].double(), v[row].double()
        mean = state * (1 + g**2 / (2 * now) * ds) + velocity * (1 + g**2 * (1 - now) / (2 * now)) * ds
        std = g * math.sqrt(-ds)
        torch.testing.assert_close(law.mean[row].double(), mean, rtol=2e-6, atol=2e-6)
        assert law.std[row].item() == pytest.approx(std, rel=2e-6)
        shown = randn(6, seed=2)
        density = torch.distributions.Normal(mean, std).log_prob(shown.double()).sum().item()
        whole = law.log_prob(shown.expand(5, 6))[row].item()
        assert whole == pytest.approx(density, rel=1e-5)
    assert law.is_random.all()


def test_constant_sde_is_dance_grpo():
    _, t, s = flow_rows()
    x, v = randn(5, 6), randn(5, 6, seed=1)
    law, prediction = ConstantSDE(0.3)(NetDenoiser(lambda x, number, cond: v, RectifiedFlow(), "flow"), x, t, s, {})
    for row in range(4):
        now, ds = t[row].item(), s[row].item() - t[row].item()
        state, velocity = x[row].double(), v[row].double()
        clean = state - now * velocity
        score = -(state - clean * (1 - now)) / now**2
        mean = state + ds * velocity - 0.5 * 0.3**2 * score * ds
        torch.testing.assert_close(law.mean[row].double(), mean, rtol=2e-6, atol=2e-6)
        assert law.std[row].item() == pytest.approx(0.3 * math.sqrt(-ds), rel=2e-6)
    assert law.is_random.tolist() == [True] * 4 + [False]
    assert torch.equal(law.mean[4], prediction.x0[4])


# ---- the chain's own law: one number per row, a Gaussian target, coefficients written again in float64

MEAN, STD = 0.7, 0.4


def scales(schedule, t):
    one = torch.tensor([t])
    return schedule.alpha(one).double().item(), schedule.sigma(one).double().item()


def belief(schedule, t):
    """Slopes and offsets of x0 and eps, as functions of x."""
    alpha, sigma = scales(schedule, t)
    variance = (alpha * STD) ** 2 + sigma**2
    clean, noise = alpha * STD**2 / variance, sigma / variance
    return clean, MEAN - clean * alpha * MEAN, noise, -noise * alpha * MEAN


def ddim_step(schedule, t, s, eta):
    (alpha_t, sigma_t), (alpha_s, sigma_s) = scales(schedule, t), scales(schedule, s)
    variance = eta**2 * (sigma_s / sigma_t) ** 2 * (sigma_t**2 - (alpha_t * sigma_s / alpha_s) ** 2)
    a, b, c, d = belief(schedule, t)
    direction = math.sqrt(max(sigma_s**2 - variance, 0))
    return alpha_s * a + direction * c, alpha_s * b + direction * d, max(variance, 0)


def flow_step(schedule, t, s, eta, kind):
    a, b, c, d = belief(schedule, t)
    ds = s - t
    if kind == "ode" or (kind == "constant" and s == 0):
        return 1 + (c - a) * ds, (d - b) * ds, 0.0
    if kind == "constant":
        lean = eta**2 * ds / (2 * t)
        return 1 + (c - a) * ds + lean * c, (d - b) * ds + lean * d, -(eta**2) * ds
    square = eta**2 * t / (1 - (s if t == 1 else t))
    push = (1 + square * (1 - t) / (2 * t)) * ds
    return 1 + square * ds / (2 * t) + (c - a) * push, (d - b) * push, -square * ds


def renoise_step(schedule, t, s):
    a, b, _, _ = belief(schedule, t)
    alpha, sigma = scales(schedule, s) if s > 0 else (1.0, 0.0)
    return alpha * a, alpha * b, sigma**2


LEADING, EVEN = table_grid(1000, 40, "leading", 1), flow_grid(20, 1.0, last=1 / 20)
LAWS = {
    "ddim-0": (DDIM(0.0), TABLE, LEADING, lambda t, s: ddim_step(TABLE, t, s, 0.0)),
    "ddim-half": (DDIM(0.5), TABLE, LEADING, lambda t, s: ddim_step(TABLE, t, s, 0.5)),
    "ddim-1": (DDIM(1.0), TABLE, LEADING, lambda t, s: ddim_step(TABLE, t, s, 1.0)),
    "ddim-flow": (DDIM(1.0), FLOW, EVEN, lambda t, s: ddim_step(FLOW, t, s, 1.0)),
    "ddim-cosine": (DDIM(1.0), Cosine(), torch.linspace(1, 0, 21), lambda t, s: ddim_step(Cosine(), t, s, 1.0)),
    "ddim-edm": (DDIM(1.0), EDM(), karras_grid(20), lambda t, s: ddim_step(EDM(), t, s, 1.0)),
    "flow-sde": (FlowSDE(0.7), FLOW, EVEN, lambda t, s: flow_step(FLOW, t, s, 0.7, "grpo")),
    "constant-sde": (ConstantSDE(0.3), FLOW, EVEN, lambda t, s: flow_step(FLOW, t, s, 0.3, "constant")),
    "euler": (EulerODE(), FLOW, EVEN, lambda t, s: flow_step(FLOW, t, s, 0.0, "ode")),
    "consistency": (Consistency(), TABLE, ladder_grid(1000, 8), lambda t, s: renoise_step(TABLE, t, s)),
}


def gaussian(schedule):
    return GaussianDenoiser(torch.tensor([MEAN]), STD, schedule)


@pytest.mark.parametrize("name", LAWS)
def test_the_chain_has_its_own_discretised_law(name):
    kernel, schedule, grid, step = LAWS[name]
    rows, generator = 100_000, torch.Generator().manual_seed(11)
    start = scales(schedule, 1.0)[1]
    mean, variance = 0.0, start**2
    x = start * torch.randn(rows, 1, generator=generator)
    for move in walk(kernel, gaussian(schedule), x, grid, {}, generator):
        slope, offset, added = step(move.t[0].item(), move.s[0].item())
        mean, variance = slope * mean + offset, slope**2 * variance + added
        # the law of this step, row by row, and its density
        wanted = slope * move.x[:, 0].double() + offset
        scale = 1 + wanted.abs().max().item()
        assert (move.transition.mean[:, 0].double() - wanted).abs().max() < 4e-6 * scale
        assert move.transition.std[0].item() == pytest.approx(math.sqrt(added), rel=1e-4, abs=1e-6)
        assert move.transition.is_random[0].item() == (added > 0)
        # and of all steps so far
        assert abs(move.x_next.double().mean().item() - mean) < 4 * math.sqrt(variance / rows)
        assert abs(move.x_next.double().var().item() - variance) < 4 * variance * math.sqrt(2 / rows)


@pytest.mark.parametrize("name", ["ddim-1", "flow-sde", "constant-sde", "consistency"])
def test_a_chains_log_probability_is_the_product_of_its_laws(name):
    kernel, schedule, grid, step = LAWS[name]
    total, exact = torch.zeros(64), torch.zeros(64, dtype=torch.float64)
    for move in walk(kernel, gaussian(schedule), randn(64, 1), grid, {}, torch.Generator().manual_seed(1)):
        total = total + move.transition.log_prob(move.x_next)
        slope, offset, added = step(move.t[0].item(), move.s[0].item())
        if added > 0:
            law = torch.distributions.Normal(slope * move.x[:, 0].double() + offset, math.sqrt(added))
            exact = exact + law.log_prob(move.x_next[:, 0].double())
    assert move.transition.is_random.all() == (name == "flow-sde")
    torch.testing.assert_close(total.double(), exact, rtol=2e-4, atol=2e-3)


def spread_error(kernel, schedule, grid):
    """The final law's standard deviation minus the data's, from the exact marginal at grid[0]; the mean is right."""
    alpha, sigma = scales(schedule, grid[0].item())
    mean, variance = alpha * MEAN, (alpha * STD) ** 2 + sigma**2
    probe = torch.tensor([[0.0], [1.0]])
    for t, s in itertools.pairwise(grid):
        law, _ = kernel(gaussian(schedule), probe, t.expand(2), s.expand(2), {})
        offset, slope = law.mean[0].item(), (law.mean[1] - law.mean[0]).item()
        mean, variance = slope * mean + offset, slope**2 * variance + law.std[0].item() ** 2
    assert mean == pytest.approx(MEAN, abs=1e-5)
    return math.sqrt(variance) - STD


CONVERGING = {
    "ddim-flow": (DDIM(1.0), FLOW, 1.0),
    "ddim-cosine": (DDIM(1.0), Cosine(), 1.0),
    "euler": (EulerODE(), FLOW, 1.0),
    "constant-sde": (ConstantSDE(0.3), FLOW, 1.0),
    "flow-sde": (FlowSDE(0.7), FLOW, 0.9),  # its first step from t = 1 is not of order one, see below
}


@pytest.mark.parametrize("name", CONVERGING)
def test_the_discretised_law_converges_to_the_data_at_first_order(name):
    kernel, schedule, start = CONVERGING[name]
    coarse, fine = (spread_error(kernel, schedule, torch.linspace(start, 0, steps + 1)) for steps in (200, 400))
    assert abs(fine) < 0.01
    assert 1.8 < coarse / fine < 2.2


@pytest.mark.parametrize("steps", [10, 1000])
def test_the_first_flow_sde_step_adds_the_same_noise_at_any_step_count(steps):
    t, s = torch.ones(2), torch.full((2,), 1 - 1 / steps)
    law, _ = FlowSDE(0.7)(gaussian(FLOW), torch.tensor([[0.0], [1.0]]), t, s, {})
    assert law.std[0].item() == pytest.approx(0.7, rel=1e-4)
    assert abs(spread_error(FlowSDE(0.7), FLOW, torch.linspace(1, 0, 401))) < 1e-3


def test_the_gradient_through_a_chain_is_the_exact_one():
    mean = torch.tensor([MEAN], requires_grad=True)
    denoiser = GaussianDenoiser(mean, STD, FLOW)
    *_, last = walk(FlowSDE(0.7), denoiser, randn(8, 1), EVEN, {}, torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(last.x_next[3, 0], mean)
    wanted = 0.0
    for t, s in zip(EVEN[:-1].tolist(), EVEN[1:].tolist(), strict=True):
        slope, offset, _ = flow_step(FLOW, t, s, 0.7, "grpo")
        wanted = slope * wanted + offset / MEAN
    assert gradient.item() == pytest.approx(wanted, rel=1e-5)
