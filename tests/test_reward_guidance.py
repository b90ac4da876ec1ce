"""Guidance by a reward's gradient: exact where it can be, biased by as much as is known where it cannot, and TFG's
algorithm with TFG's settings."""

import itertools
import math

import pytest
import torch
from nets import FLOW, TABLE, randn, wavy

from tropism.base import bcast
from tropism.denoisers import NetDenoiser
from tropism.guidance import ROW, Guided, RewardGuided, beside, dps, lgd_mc, mpgd, through, ugd, window
from tropism.models.toy import GaussianDenoiser, MixtureDenoiser
from tropism.samplers import DDIM, EulerODE, noised_up, recurrent_walk, walk
from tropism.schedules import flow_grid, table_grid
from tropism.transitions import Gaussian

MEAN, STD = torch.tensor([0.5, -1.0, 2.0]), 0.7
SLOPE, GOAL, SHARP = torch.tensor([1.0, -0.5, 2.0]), torch.tensor([1.5, 0.0, 0.0]), 3.0
NONE = torch.zeros(1, 3)
T = torch.tensor([0.98, 0.6, 0.3, 0.05])


def linear(x0, rows):
    return x0 @ SLOPE


def quadratic(x0, rows):
    return -SHARP / 2 * (x0 - GOAL).square().sum(1)


def posterior_variance(schedule, t):
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    return (STD * sigma) ** 2 / ((alpha * STD) ** 2 + sigma**2)


def close(got, wanted, **kind):
    torch.testing.assert_close(got.x0, wanted.x0, **kind)
    torch.testing.assert_close(got.eps, wanted.eps, **kind)


@pytest.mark.parametrize("schedule", [TABLE, FLOW], ids=["table", "flow"])
def test_a_linear_reward_on_a_gaussian_is_tilted_exactly(schedule):
    plain, x = GaussianDenoiser(MEAN, STD, schedule), randn(4, 3) * 2
    wanted = plain.tilted(SLOPE)[0](x, T, {})
    with torch.no_grad():
        got = RewardGuided(plain, linear)(x, T, {})
    assert not got.x0.requires_grad
    close(got, wanted, rtol=1e-4, atol=1e-4)
    close(RewardGuided(plain, linear, rho=0.4)(x, T, {}), plain.tilted(0.4 * SLOPE)[0](x, T, {}), rtol=1e-4, atol=1e-4)


def test_so_is_what_is_drawn():
    plain, grid = GaussianDenoiser(MEAN, STD, FLOW), flow_grid(200)
    *_, last = walk(EulerODE(), RewardGuided(plain, linear), randn(4000, 3), grid, {})
    wanted = MEAN + STD**2 * SLOPE
    assert (last.x_next.mean(0) - wanted).abs().max() < 0.03 and (last.x_next.std(0) - STD).abs().max() < 0.03


@pytest.mark.parametrize("schedule", [TABLE, FLOW], ids=["table", "flow"])
def test_the_bias_of_a_quadratic_reward_is_the_known_one(schedule):
    """The posterior N(m, v) times exp(-s (x - g)^2 / 2) has its mean v s / (1 + v s) of the way from m to g; DPS, which
    scores the mean alone, goes v s of it."""
    plain, x = GaussianDenoiser(MEAN, STD, schedule), randn(4, 3) * 2
    v = posterior_variance(schedule, T)
    m = plain(x, T, {}).x0
    exact = (bcast(v * SHARP / (1 + v * SHARP), x)) * (GOAL - m)
    got = RewardGuided(plain, quadratic)(x, T, {}).x0 - m
    torch.testing.assert_close(got, exact * bcast(1 + v * SHARP, x), rtol=1e-3, atol=1e-4)
    assert (got - exact).abs().max() > 0.3  # the bias is not a matter of rounding


def test_samples_around_x0_take_that_bias_away():
    """LGD-MC, here with the posterior's own spread: log E exp is exact for a Gaussian."""
    plain, x, t = GaussianDenoiser(MEAN[:1], STD, FLOW), randn(4, 1), torch.full((4,), 0.5)
    v = float(posterior_variance(FLOW, t)[0])
    places = torch.distributions.Normal(0, 1).icdf((torch.arange(4000) + 0.5) / 4000)[:, None]
    data = 0.5**2 / (0.5**2 + 0.5**2)
    guide = RewardGuided(
        plain, lambda x0, rows: -SHARP / 2 * (x0[:, 0] - 1.5).square(), noise=places, spread=math.sqrt(v / data)
    )
    m = plain(x, t, {}).x0
    wanted = m + v * SHARP / (1 + v * SHARP) * (1.5 - m)
    torch.testing.assert_close(guide(x, t, {}).x0, wanted, rtol=1e-3, atol=6e-3)  # quantiles have no far tails
    dps_error = RewardGuided(plain, guide.value)(x, t, {}).x0 - wanted
    assert dps_error.abs().max() > 0.5


def test_gradients_are_those_of_finite_differences():
    net = NetDenoiser(lambda x, number, cond: wavy(x, number, cond) * 1.5, TABLE, "eps")
    x, t = randn(4, 3).double(), T

    def score(x0):
        return (x0.sin() * SLOPE).sum(1)

    class Double:
        schedule = TABLE

        def __call__(self, x, t, cond):
            alpha, sigma = (bcast(v(t).double(), x) for v in (TABLE.alpha, TABLE.sigma))
            eps = 1.5 * wavy(x, TABLE.net_time(t), cond)
            return type(net(x, t, cond))((x - sigma * eps) / alpha, eps)

    inner, h = Double(), 1e-5
    plain = inner(x, t, {}).x0
    got = RewardGuided(inner, lambda x0, rows: score(x0))(x, t, {}).x0 - plain
    alpha, sigma = (bcast(v(t).double(), x) for v in (TABLE.alpha, TABLE.sigma))
    for place in range(3):
        step = torch.zeros(3).double()
        step[place] = h
        slope = (score(inner(x + step, t, {}).x0) - score(inner(x - step, t, {}).x0)) / (2 * h)
        wanted = (sigma**2 / alpha)[:, 0] * slope
        torch.testing.assert_close(got[:, place].double(), wanted, rtol=1e-4, atol=1e-4)


def tfg_step(net, value, x, t, s, eta, rho, mu, iterations, noise, spread, generator=None):
    """Algorithm 1 of 2409.15761 in its own notation (no recurrence), with a = alpha^2; the mean of its move."""
    a, b = (bcast(TABLE.alpha(each) ** 2, x) for each in (t, s))
    x = x.detach().requires_grad_()
    x0 = net(x, t, {}).x0

    def smoothed(place):
        many = torch.stack([value(place + spread * (1 - a).sqrt() * each, None) for each in noise])
        return many.logsumexp(0).sum() - math.log(len(noise)) * len(place)

    (through_net,) = torch.autograd.grad(smoothed(x0), x)
    place = x0.detach()
    for _ in range(iterations):
        place = place.requires_grad_()
        (slope,) = torch.autograd.grad(smoothed(place), place)
        place = (place + mu * slope).detach()
    eps = (x - a.sqrt() * x0) / (1 - a).sqrt()
    std = eta * ((1 - b) / (1 - a) * (1 - a / b)).sqrt()
    mean = b.sqrt() * x0 + (1 - b - std**2).sqrt() * eps
    return (mean + rho * through_net / (a / b).sqrt() + b.sqrt() * (place - x0)).detach(), x0.detach()


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_move_of_ddim_is_the_published_algorithm(eta):
    net, x = NetDenoiser(wavy, TABLE, "eps"), randn(4, 3)
    t, s = T, T - 0.02
    noise = randn(5, 3, seed=3)
    wanted, _ = tfg_step(net, quadratic, x, t, s, eta, 0.3, 0.2, 4, noise, 0.5)
    guide = RewardGuided(
        net, quadratic, through(TABLE, 0.3), beside(TABLE, 0.2), 4, spread=0.5, noise=noise, keep_noise=True
    )
    law, _ = DDIM(eta)(guide, x, t, s, {})
    torch.testing.assert_close(law.mean, wanted, rtol=1e-4, atol=1e-4)


def test_names_are_settings():
    net, x, noise = NetDenoiser(wavy, TABLE, "eps"), randn(4, 3), randn(6, 3, seed=3)
    t, s = T, T - 0.02

    def mean(guide, eta=0.0):
        return DDIM(eta)(guide, x, t, s, {})[0].mean

    def published(rho=0.0, mu=0.0, iterations=1, noise=NONE, spread=0.0):
        return tfg_step(net, quadratic, x, t, s, 0.0, rho, mu, iterations, noise, spread)[0]

    close_to = dict(rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mean(dps(net, quadratic, through(TABLE, 0.3))), published(rho=0.3), **close_to)
    torch.testing.assert_close(
        mean(lgd_mc(net, quadratic, through(TABLE, 0.3), noise)),
        published(rho=0.3, noise=noise, spread=1.0),
        **close_to,
    )
    torch.testing.assert_close(mean(mpgd(net, quadratic, beside(TABLE, 0.2))), published(mu=0.2), **close_to)
    # UGD's forward guidance is eps - strength sigma grad, its backward one eps - alpha / sigma (what x0 moved).
    alpha, sigma = (bcast(v(t), x) for v in (TABLE.alpha, TABLE.sigma))
    leaf = x.clone().requires_grad_()
    said = net(leaf, t, {})
    (slope,) = torch.autograd.grad(quadratic(said.x0, None).sum(), leaf)
    place = said.x0.detach()
    for _ in range(3):
        place = place - 0.2 * SHARP * (place - GOAL)
    eps = said.eps.detach() - 0.5 * sigma * slope - alpha / sigma * (place - said.x0.detach())
    got = ugd(net, quadratic, 0.5, beside(TABLE, 0.2), 3)(x, t, {})
    torch.testing.assert_close(got.eps, eps, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(alpha * got.x0 + sigma * got.eps, x, rtol=1e-4, atol=1e-4)


def test_mean_guidance_needs_no_graph_through_the_network():
    net = NetDenoiser(lambda x, number, cond: wavy(x, number, cond).detach(), FLOW, "flow")
    x = randn(4, 3)
    moved = mpgd(net, linear, 1.0)(x, T, {}).x0 - net(x, T, {}).x0
    v = FLOW.sigma(T) ** 2 / (FLOW.alpha(T) ** 2 + FLOW.sigma(T) ** 2)
    torch.testing.assert_close(moved, v[:, None] * SLOPE, rtol=1e-4, atol=1e-5)

    class Hidden(GaussianDenoiser):
        def __call__(self, x, t, cond):
            return super().__call__(x.detach(), t, cond)

    hidden = Hidden(MEAN, STD, FLOW)
    with pytest.raises(TypeError, match="the network, or the value, has no gradient"):
        dps(hidden, linear, 1.0)(x, T, {})
    with pytest.raises(TypeError, match="the value has no gradient, which this guide follows"):
        mpgd(net, lambda x0, rows: x0.detach().sum(1), 1.0)(x, T, {})


def test_rows_are_what_the_condition_says_and_one_does_not_move_another():
    plain, x, seen = GaussianDenoiser(MEAN, STD, FLOW), randn(4, 3), []

    def value(x0, rows):
        seen.append(rows.tolist())
        return (x0 @ SLOPE) * torch.tensor([1.0, math.nan, 2.0, 0.0, 1.0])[rows]

    t = torch.full((4,), 0.5)
    got = RewardGuided(plain, value)(x, t, {ROW: torch.tensor([2, 1, 0, 4])}).x0
    assert seen == [[2, 1, 0, 4]]
    for row, weight in enumerate([2.0, 0.0, 1.0, 1.0]):  # no score: not guided
        wanted = plain.tilted(weight * SLOPE)[0](x[row : row + 1], t[:1], {}).x0
        torch.testing.assert_close(got[row : row + 1], wanted, rtol=1e-4, atol=1e-4)
    RewardGuided(plain, value)(x, t, {})
    assert seen[-1] == [0, 1, 2, 3]


def test_it_goes_around_classifier_free_guidance():
    inner = MixtureDenoiser(
        torch.tensor([[1.0, 0.0], [0.0, 0.5]]), torch.tensor([0.4, 0.4]), torch.ones(2), FLOW, torch.eye(2)
    )
    guided, x, label = Guided(inner, {"label": torch.tensor([1])}, 3.0), randn(4, 2), torch.zeros(4, dtype=torch.long)
    third = GaussianDenoiser(torch.tensor([3.0, -1.0]), 0.4, FLOW)  # what the guidance is, in closed form
    got = RewardGuided(guided, lambda x0, rows: x0[:, 0])(x, T, {"label": label, ROW: torch.arange(4)})
    close(got, third.tilted(torch.tensor([1.0, 0.0]))[0](x, T, {}), rtol=1e-3, atol=1e-3)


def test_where_it_does_not_guide_it_asks_for_no_value():
    plain, x, calls = GaussianDenoiser(MEAN, STD, FLOW), randn(2, 3), []

    def value(x0, rows):
        calls.append(len(x0))
        return x0 @ SLOPE

    guide = RewardGuided(plain, value, window(1.0, 0.2, 0.8))
    assert (
        torch.equal(guide(x, torch.tensor([0.9, 0.1]), {}).x0, plain(x, torch.tensor([0.9, 0.1]), {}).x0) and not calls
    )
    assert not torch.equal(guide(x, torch.tensor([0.9, 0.5]), {}).x0, plain(x, torch.tensor([0.9, 0.5]), {}).x0)
    noise = RewardGuided(plain, value)(x, torch.ones(2), {})  # without signal x says nothing of x0: exact as well
    torch.testing.assert_close(noise.x0, plain(x, torch.ones(2), {}).x0)


def test_the_limit_bounds_the_move():
    plain, x = GaussianDenoiser(MEAN, STD, FLOW), randn(4, 3)
    free = RewardGuided(plain, quadratic, 5.0)(x, T, {}).x0 - plain(x, T, {}).x0
    held = RewardGuided(plain, quadratic, 5.0, limit=0.3)(x, T, {}).x0 - plain(x, T, {}).x0
    size = free.square().mean(1).sqrt()
    torch.testing.assert_close(held.square().mean(1).sqrt(), size.clamp(max=0.3), rtol=1e-4, atol=1e-5)
    assert (size > 0.3).any() and (size < 0.3).any()


def test_the_graph_is_kept_when_asked_for():
    weight = torch.tensor(0.8, requires_grad=True)
    net = NetDenoiser(lambda x, number, cond: weight * wavy(x, number, cond), FLOW, "flow")
    assert not RewardGuided(net, quadratic)(randn(4, 3), T, {}).x0.requires_grad

    def total(value):
        inner = NetDenoiser(lambda x, number, cond: value * wavy(x, number, cond), FLOW, "flow")
        return RewardGuided(inner, quadratic, 0.3, 0.2, keep_graph=True)(randn(4, 3), T, {}).x0.sum()

    (got,) = torch.autograd.grad(total(weight), weight)
    slope = (total(torch.tensor(0.81)) - total(torch.tensor(0.79))) / 0.02
    torch.testing.assert_close(got, slope.detach(), rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (dict(iterations=0), "iterations is 0; wanted 1 or more"),
        (dict(spread=-1.0), "spread is -1"),
        (dict(limit=0.0), "limit 0"),
    ],
)
def test_settings_out_of_range_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        RewardGuided(GaussianDenoiser(MEAN, STD, FLOW), linear, **wrong)


def test_one_number_a_row_is_wanted():
    with pytest.raises(ValueError, match=r"value answered \(\) for 4 rows; wanted one number a row"):
        RewardGuided(GaussianDenoiser(MEAN, STD, FLOW), lambda x0, rows: x0.sum())(randn(4, 3), T, {})
    with pytest.raises(ValueError, match="low < high"):
        window(1.0, 0.5, 0.2)


def plain_start(plain, grid):
    """States of the exact law at the first time of the grid."""
    t = grid[:1].expand(8000)
    x0, eps = MEAN + STD * randn(8000, 3, seed=4), randn(8000, 3, seed=6)
    return bcast(plain.schedule.alpha(t), x0) * x0 + bcast(plain.schedule.sigma(t), x0) * eps


class Exact:
    """The move of an exact chain of N(MEAN, STD^2): DDIM(1), whose x0 is drawn from its posterior and not its mean."""

    def __call__(self, denoiser, x, t, s, cond):
        law, said = DDIM(1.0)(denoiser, x, t, s, cond)
        schedule = denoiser.schedule
        direction = (schedule.sigma(s) ** 2 - law.std**2).clamp(min=0).sqrt()
        weight = schedule.alpha(s) - direction * schedule.alpha(t) / schedule.sigma(t)
        return Gaussian(law.mean, (law.std**2 + weight**2 * posterior_variance(schedule, t)).sqrt()), said


@pytest.mark.parametrize("schedule", [TABLE, FLOW], ids=["table", "flow"])
def test_recurrence_keeps_the_law(schedule):
    """Down and up again along an exact chain changes nothing: the data come out."""
    plain = GaussianDenoiser(MEAN, STD, schedule)
    grid = flow_grid(10) if schedule is FLOW else table_grid(1000, 10, "leading", 1)
    grid = torch.cat([grid[:-1], torch.tensor([0.0])])
    start = randn(8000, 3) if schedule is FLOW else plain_start(plain, grid)
    moves = list(recurrent_walk(Exact(), plain, start, grid, {}, torch.Generator().manual_seed(1), times=3))
    x = moves[-1].x_next
    assert (x.mean(0) - MEAN).abs().max() < 0.025 and (x.std(0) - STD).abs().max() < 0.02
    up = [move for move in moves if bool((move.t < move.s).all())]
    down = len(moves) - len(up)
    first = 2 if schedule is FLOW else 0  # t = 1 of a flow has no signal to remember
    assert (down, len(up)) == (3 * 10 - first, 2 * 10 - first)
    for before, after in itertools.pairwise(moves):
        assert torch.equal(before.x_next, after.x) and torch.equal(before.s, after.t)


def test_once_is_the_walk():
    plain, grid = GaussianDenoiser(MEAN, STD, TABLE), table_grid(1000, 10, "leading", 1)
    one = walk(DDIM(1.0), plain, randn(4, 3), grid, {}, torch.Generator().manual_seed(2))
    other = recurrent_walk(DDIM(1.0), plain, randn(4, 3), grid, {}, torch.Generator().manual_seed(2))
    for ours, theirs in zip(one, other, strict=True):
        assert torch.equal(ours.x_next, theirs.x_next)
    with pytest.raises(ValueError, match="times is 0"):
        next(recurrent_walk(DDIM(1.0), plain, randn(4, 3), grid, {}, times=0))
    with pytest.raises(ValueError, match="strictly decreasing"):
        next(recurrent_walk(DDIM(1.0), plain, randn(4, 3), grid.flip(0), {}))


def test_noising_up_gives_the_marginal():
    x0, s, t = randn(20000, 1), torch.full((20000,), 0.3), torch.full((20000,), 0.7)
    at_s = bcast(FLOW.alpha(s), x0) * 2.0 + bcast(FLOW.sigma(s), x0) * x0
    at_t = noised_up(FLOW, at_s, s, t).sample(torch.Generator().manual_seed(5))
    assert float(at_t.mean()) == pytest.approx(0.3 * 2.0, abs=0.02) and float(at_t.std()) == pytest.approx(
        0.7, abs=0.02
    )


def test_recurrence_lets_a_guide_work_longer():
    """With half the strength that is asked for, more of the reward is had when every level is visited again."""
    plain, grid = GaussianDenoiser(MEAN, STD, TABLE), table_grid(1000, 20, "leading", 1)
    guide = dps(plain, linear, through(TABLE, 0.02))
    found = []
    for times in (1, 2, 4):
        *_, last = recurrent_walk(
            DDIM(1.0), guide, randn(2000, 3), grid, {}, torch.Generator().manual_seed(0), times=times
        )
        found.append(float((last.x_next @ SLOPE).mean()))
    assert found[0] < found[1] - 0.05 and found[1] < found[2] - 0.05
