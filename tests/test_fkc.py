"""Feynman-Kac correctors against laws in closed form: annealed, guided, multiplied, tilted."""

import dataclasses
import math

import pytest
import torch
from chains_law import evidence, target_mean

from tropism.models.toy import GaussianDenoiser, MixtureDenoiser
from tropism.particles import SCHEMES, Factor, Tilt, fkc, guidance
from tropism.particles.fkc import Field, _Product
from tropism.randomness import row_generators
from tropism.schedules import EDM, RectifiedFlow, ddpm_table, karras_grid, table_grid

NOISY = EDM(80.0)
TS = karras_grid(200)
SEEDS = range(5)
MODES = MixtureDenoiser(torch.tensor([[-3.0], [3.0]]), torch.tensor([0.3, 1.0]), torch.tensor([0.3, 0.7]), NOISY)
CLASSES = dataclasses.replace(
    MODES,
    means=torch.tensor([[0.0], [1.0]]),
    stds=torch.tensor([1.0, 0.5]),
    weights=torch.tensor([1.0, 1e-12]),
    labels=torch.tensor([[0.0, 1.0]]),
)
LEFT, RIGHT = GaussianDenoiser(torch.tensor([-1.0]), 1.0, NOISY), GaussianDenoiser(torch.tensor([2.0]), 0.5, NOISY)


def run(factors, seed=0, prompts=20, count=200, ts=TS, **options):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(prompts, count, 1, generator=generator)
    return fkc(factors, x, ts, **({"generator": generator} | options))


def near(found, error, exact, most):
    assert error < most
    assert abs(found - exact) < 3 * error


def annealed_share(power=3.0):
    """Of the right mode in q^power: the modes do not overlap, and N^p has the mass s^(1 - p) up to a common factor."""
    mass = [0.3**power * 0.3 ** (1 - power), 0.7**power]
    return mass[1] / sum(mass)


@pytest.mark.parametrize("seed", SEEDS)
def test_annealing_weighs_modes_as_the_power_does(seed):
    """The plain scaled score leaves the share of the right mode at 0.91; the truth is 0.533."""
    particles, _ = run([Factor(MODES, 3.0, {})], seed, count=1000)
    mass, error = target_mean(particles, (particles.x > 0).double())
    near(float(mass), float(error), annealed_share(), 0.08)


def test_without_weights_annealing_goes_to_the_wrong_modes():
    particles, trace = run([Factor(MODES, 3.0, {})], clamp=0.0)
    assert float((particles.x > 0).double().mean()) > annealed_share() + 0.3
    assert not any(bool(step.resampled.any()) for step in trace.steps)


@pytest.mark.parametrize("seed", SEEDS)
def test_guidance_has_the_geometric_mean_as_its_law(seed):
    """N(0, 1)^(-1) N(1, 1/4)^2: precision 7, mean 8/7; the plain guided SDE has a mean of 1.258."""
    cond, null = {"label": torch.zeros(4000, dtype=torch.int64)}, {"label": torch.tensor([-1])}
    particles, _ = run(guidance(CLASSES, cond, null, 2.0), seed)
    mean, error = target_mean(particles)
    near(float(mean), float(error), 8 / 7, 0.03)
    spread, error = target_mean(particles, (particles.x - 8 / 7) ** 2)
    near(float(spread), float(error), 1 / 7, 0.015)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_product_of_experts(seed):
    """N(-1, 1) N(2, 1/4): mean 1.4, variance 0.2; adding scores alone has a mean of 1.15."""
    particles, _ = run([Factor(LEFT, 1.0, {}), Factor(RIGHT, 1.0, {})], seed)
    mean, error = target_mean(particles)
    near(float(mean), float(error), 1.4, 0.04)
    spread, error = target_mean(particles, (particles.x - 1.4) ** 2)
    near(float(spread), float(error), 0.2, 0.025)


@pytest.mark.parametrize("zeta", [1.0, 1.5])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_tilt_by_a_reward_with_a_gradient(seed, zeta):
    """N(-1, 1) exp(x): mean 0, log normaliser -1/2."""
    particles, _ = run([Factor(LEFT, 1.0, {})], seed, tilt=Tilt(lambda y: y[:, 0]), zeta=zeta)
    mean, error = target_mean(particles)
    near(float(mean), float(error), 0.0, 0.05)
    z, error = evidence(particles)
    near(z, error, math.exp(-0.5), 0.03)


@pytest.mark.parametrize("model", ["table", "flow"])
def test_any_schedule_of_the_house(model):
    """Preserving and straight paths; the straight path at the levels of the exploding one."""
    if model == "table":
        schedule, ts = ddpm_table(1000, 0.00085, 0.012, "scaled_linear"), table_grid(1000, 250, "leading", 1)
    else:
        schedule, level = RectifiedFlow(), NOISY.level(TS)
        ts = level / (1 + level)
    both = [dataclasses.replace(one, schedule=schedule) for one in (LEFT, RIGHT)]
    particles, _ = run([Factor(one, 1.0, {}) for one in both], ts=ts, prompts=40)
    mean, error = target_mean(particles)
    near(float(mean), float(error), 1.4, 0.06)


def test_one_factor_carries_no_weight():
    particles, trace = run([Factor(LEFT, 1.0, {})], prompts=4)
    torch.testing.assert_close(particles.log_weight, torch.zeros(4, 200, dtype=torch.float64), rtol=0, atol=1e-12)
    assert trace.network_rows == 4 * 200 * 200
    assert abs(float(particles.x.var()) - 1) < 0.15


def test_the_increments_solve_the_fokker_planck_equation():
    """d log p / dtau + div v + v . U - zeta^2 (div U + |U|^2) / 2 is log g, by autograd, for any zeta.

    In one dimension, with tau = -L, U the score of p = q_1^a q_2^b exp(r / (1 + L)), and r = sin.
    """
    a, b, level = 1.7, -0.4, 0.8
    factors = [Factor(MODES, a, {}), Factor(LEFT, b, {})]
    product = _Product(factors, Tilt(lambda y: y[:, 0].sin()), 1 << 30)
    y, variance = torch.linspace(-2, 2, 9)[:, None].double(), torch.tensor(level**2, dtype=torch.float64)

    def log_p(y, variance):
        logs = torch.stack(
            [
                math.log(w) - (y - m) ** 2 / (2 * (s**2 + variance)) - (s**2 + variance).log() / 2
                for w, m, s in ((0.3, -3.0, 0.3), (0.7, 3.0, 1.0))
            ]
        ).logsumexp(0)
        other = -((y + 1) ** 2) / (2 * (1 + variance)) - (1 + variance).log() / 2
        constant = 0.5 * math.log(2 * math.pi)
        return a * (logs - constant) + b * (other - constant), y.sin() / (1 + variance)

    def derivative(f, at):
        return torch.autograd.functional.jacobian(lambda v: f(v).sum(), at, create_graph=True)

    mixed = lambda y: derivative(lambda v: log_p(v, variance)[0], y)  # noqa: E731
    pull = lambda y: derivative(lambda v: log_p(v, variance)[1], y)  # noqa: E731
    falls = -torch.stack([derivative(lambda v, at=at: sum(log_p(at, v)), variance) for at in y[:, 0]])
    found = []
    for zeta in (0.0, 1.0, 1.6):
        drift = lambda y, zeta=zeta: (1 + zeta**2) / 2 * mixed(y) + zeta**2 / 2 * pull(y)  # noqa: E731
        whole = lambda y: mixed(y) + pull(y)  # noqa: E731
        divergence = derivative(drift, y) - zeta**2 / 2 * derivative(whole, y)
        found.append(falls + (divergence + drift(y) * whole(y) - zeta**2 / 2 * whole(y) ** 2)[:, 0])
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])
    step = 1e-4  # of the level: what one interval of the grid adds is a rate times this variance
    ts = NOISY.time(torch.tensor([level, level - step, 0.0]))
    field = product.field(y.float(), ts[0], {})
    assert isinstance(field, Field)
    levels = (NOISY.level(ts[:2]) ** 2).double()
    rate = product.log_g(field, ts, 0) / (0.5 * (levels[0] - levels[1]))
    torch.testing.assert_close(rate, found[0].detach(), rtol=2e-3, atol=2e-3)


def test_a_clamp_bounds_the_centred_increments():
    product = [Factor(LEFT, 1.0, {}), Factor(RIGHT, 1.0, {})]
    free, _ = run(product, prompts=2, ess_below=1e-9)
    bound, _ = run(product, prompts=2, ess_below=1e-9, clamp=0.01)
    assert float(bound.log_weight.abs().max()) <= 0.01 * 200
    assert float(bound.log_weight.std()) < 0.5 * float(free.log_weight.std())
    wide, _ = run(product, prompts=2, ess_below=1e-9, clamp=1e9)
    torch.testing.assert_close(wide.weight, free.weight, rtol=1e-6, atol=1e-12)


def test_resampling_keeps_to_its_window():
    _, trace = run([Factor(MODES, 3.0, {})], prompts=4, ess_below=1.0, window=(0.3, 0.6))
    times = [step.t for step in trace.steps if bool(step.resampled.any())]
    assert times
    assert min(times) >= 0.3
    assert max(times) <= 0.6
    _, trace = run([Factor(MODES, 3.0, {})], prompts=4, ess_below=1.0)
    assert not bool(trace.steps[-1].resampled.any())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_microbatches_and_neighbours_change_nothing(scheme):
    seeds, ts = torch.arange(12), karras_grid(20)
    x = torch.randn(3, 4, 1, generator=torch.Generator().manual_seed(0))
    options = {"resample": SCHEMES[scheme], "tilt": Tilt(lambda y: -(y[:, 0] ** 2)), "ess_below": 0.9}
    factors = [Factor(MODES, 2.0, {})]
    whole, _ = fkc(factors, x, ts, generator=row_generators(seeds), **options)
    small, _ = fkc(factors, x, ts, generator=row_generators(seeds), microbatch=5, **options)
    alone, _ = fkc(factors, x[1:2], ts, generator=row_generators(seeds[4:8]), **options)
    assert torch.equal(whole.x, small.x)
    assert torch.equal(whole.log_weight, small.log_weight)
    assert torch.equal(whole.x[1], alone.x[0])


def test_a_score_fills_the_reward():
    particles, trace = run([Factor(LEFT, 1.0, {})], prompts=2, count=3, score=lambda x0, rows: x0[:, 0] + rows)
    torch.testing.assert_close(particles.reward, (particles.x[..., 0] + torch.arange(6).reshape(2, 3)).double())
    assert trace.reward_rows == 6


BAD = {
    "the powers sum to": ([Factor(LEFT, 1.0, {}), Factor(RIGHT, -1.0, {})], {}),
    "different schedules": ([Factor(LEFT, 1.0, {}), Factor(dataclasses.replace(RIGHT, schedule=EDM(40.0)), 1, {})], {}),
    "no factors": ([], {}),
    "there is no signal": (
        [Factor(dataclasses.replace(LEFT, schedule=RectifiedFlow()), 1.0, {})],
        {"ts": torch.tensor([1.0, 0.5, 0.0])},
    ),
    "strictly decreasing": ([Factor(LEFT, 1.0, {})], {"ts": torch.tensor([0.5, 1.0])}),
    "wanted zeta": ([Factor(LEFT, 1.0, {})], {"zeta": -1.0}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused(message):
    factors, options = BAD[message]
    with pytest.raises(ValueError, match=message):
        run(factors, prompts=1, count=2, **options)
