"""Safe denoising: with the exact odds exactly what is not wanted is gone, and with examples nearly."""

import math

import pytest
import torch
from nets import FLOW, TABLE, randn

from tropism.guidance import Guided, KernelOdds, Safe
from tropism.models.toy import GaussianDenoiser, MixtureDenoiser
from tropism.samplers import DDIM, walk
from tropism.schedules import flow_grid

MEANS, STDS, WEIGHTS = (
    torch.tensor([[2.0, 0.0], [-2.0, 1.0], [0.0, -1.5]]),
    torch.full((3,), 0.3),
    torch.tensor([0.4, 0.4, 0.2]),
)
UNSAFE = 2
T = torch.tensor([0.95, 0.6, 0.3, 0.05])


def whole(schedule=FLOW):
    return MixtureDenoiser(MEANS, STDS, WEIGHTS, schedule)


def without(schedule=FLOW):
    return MixtureDenoiser(MEANS[:2], STDS[:2], WEIGHTS[:2], schedule)


class ExactOdds:
    """Of the third component."""

    def __call__(self, schedule, x, t):
        unsafe = GaussianDenoiser(MEANS[UNSAFE], 0.3, schedule)
        alone = MixtureDenoiser(MEANS[2:], STDS[2:], WEIGHTS[2:], schedule)
        odds = math.log(0.2 / 0.8) + alone.log_density(x, t, {}) - without(schedule).log_density(x, t, {})
        return unsafe(x, t, {}).x0, odds


def examples(component, count, seed=0):
    place = torch.randint(len(component), (count,), generator=torch.Generator().manual_seed(seed))
    return MEANS[component][place] + 0.3 * randn(count, 2, seed=seed + 1)


def drawn(denoiser, rows=4000, steps=100):
    *_, last = walk(
        DDIM(1.0), denoiser, randn(rows, 2, seed=3), flow_grid(steps, last=None), {}, torch.Generator().manual_seed(1)
    )
    return last.x_next


def shares(x):
    """Of the components, by the nearest."""
    return torch.bincount(torch.cdist(x, MEANS).argmin(1), minlength=3) / len(x)


@pytest.mark.parametrize("schedule", [TABLE, FLOW], ids=["table", "flow"])
def test_with_exact_odds_the_belief_is_that_of_the_safe_data(schedule):
    x, t = randn(400, 2, seed=8) * 1.5, T.repeat(100)
    odds = ExactOdds()(schedule, x, t)[1].exp()
    told = odds < 100  # above, the two halves of the difference are the same number in float32
    got, wanted = Safe(whole(schedule), ExactOdds(), cap=1e9)(x, t, {}), without(schedule)(x, t, {})
    torch.testing.assert_close(got.x0[told], wanted.x0[told], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(got.eps[told], wanted.eps[told], rtol=1e-3, atol=1e-2)
    assert ((odds > 1) & told).sum() > 20 and told.sum() > 250


def test_the_unsafe_mass_is_gone_and_the_rest_keeps_its_shares():
    base, safe = shares(drawn(whole())), shares(drawn(Safe(whole(), ExactOdds())))
    assert base[UNSAFE] == pytest.approx(0.2, abs=0.03)
    assert safe[UNSAFE] < 0.01 and float(safe[0] / safe[1]) == pytest.approx(1.0, abs=0.1)


def test_examples_stand_for_the_exact_odds():
    odds = KernelOdds(examples([2], 300), examples([0, 1], 600, seed=9), prior=0.2, bandwidth=0.1)
    safe = shares(drawn(Safe(whole(), odds)))
    assert safe[UNSAFE] < 0.01 and float(safe[0] / safe[1]) == pytest.approx(1.0, abs=0.1)
    x, exact = randn(200, 2, seed=5) * 1.5, ExactOdds()
    t = torch.full((200,), 0.5)
    mean, log = odds(FLOW, x, t)
    wanted, known = exact(FLOW, x, t)
    assert (mean - wanted).abs().median() < 0.05 and ((log - known).abs() < 0.35).float().mean() > 0.9


def test_without_other_examples_neighbours_are_pushed_as_well():
    """The paper's own form, whose scale is a guess: the unsafe mass goes, and so does some of the nearer safe mode."""
    odds = KernelOdds(examples([2], 300), scale=10.0)
    safe = shares(drawn(Safe(whole(), odds)))
    assert safe[UNSAFE] < 0.03 and safe[:2].min() > 0.2


def test_the_kernel_is_the_stated_one():
    unsafe, others, x = randn(5, 2, seed=1), randn(7, 2, seed=2), randn(4, 2)
    odds = KernelOdds(unsafe, others, prior=0.3, bandwidth=0.4)
    alpha, sigma = FLOW.alpha(T)[:, None], FLOW.sigma(T)[:, None]
    variance = sigma**2 + (0.4 * alpha) ** 2

    def weights(points):
        return (-(x[:, None] - alpha[..., None] * points).square().sum(-1) / (2 * variance)).double().exp()

    k, others = weights(unsafe), weights(others)
    mean, log = odds(FLOW, x, T)
    torch.testing.assert_close(mean.double(), k @ unsafe.double() / k.sum(1, keepdim=True), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(log.double(), (k.mean(1) / others.mean(1) * 0.3 / 0.7).log(), rtol=1e-3, atol=1e-3)
    alone, plain = KernelOdds(unsafe, scale=2.0, bandwidth=0.4), KernelOdds(unsafe, bandwidth=0.4)
    torch.testing.assert_close(alone(FLOW, x, T)[1].double(), (2 * k.mean(1)).log(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(alone(FLOW, x, T)[1], plain(FLOW, x, T)[1] + math.log(2))


def test_nothing_underflows():
    far = KernelOdds(torch.full((3, 64), 50.0), torch.full((2, 64), -50.0), prior=0.5)
    x, t = torch.full((1, 64), 1.0), torch.tensor([0.001])
    mean, log = far(FLOW, x, t)
    assert torch.allclose(mean, torch.full((1, 64), 50.0)) and log.isfinite().all()
    got = Safe(GaussianDenoiser(torch.zeros(64), 1.0, FLOW), far)(x, t, {})
    assert got.x0.isfinite().all() and got.eps.isfinite().all()
    assert float(KernelOdds(torch.zeros(3, 64))(FLOW, x, torch.zeros(1))[1]) == -math.inf


def test_where_it_does_not_apply_the_belief_is_the_inner_ones():
    x = torch.cat([MEANS[UNSAFE][None]] * 4) * FLOW.alpha(T)[:, None]
    plain = whole()(x, T, {})
    got = Safe(whole(), ExactOdds(), low=0.2, high=0.7)(x, T, {})
    same = [
        torch.equal(a, b) and torch.equal(c, d) for a, b, c, d in zip(got.x0, plain.x0, got.eps, plain.eps, strict=True)
    ]
    assert same == [True, False, False, True]
    assert float(Safe(whole(), ExactOdds(), cap=3.0).beta(x, T)[0].max()) == pytest.approx(3.0)
    assert Safe(whole(), ExactOdds(), least=100.0).beta(x, T)[0].tolist() == [0.0] * 4
    assert float(Safe(whole(), ExactOdds(), bound=0.5)(x, T, {}).x0.abs().max()) == 0.5


def test_it_goes_around_guidance():
    inner = MixtureDenoiser(MEANS, STDS, WEIGHTS, FLOW, torch.eye(3))
    guided, cond = Guided(inner, {"label": torch.tensor([-1])}, 1.0), {"label": torch.tensor([0] * 4)}
    x = randn(4, 2)
    got, said = Safe(guided, ExactOdds())(x, T, cond), guided(x, T, cond)
    mean, odds = ExactOdds()(FLOW, x, T)
    torch.testing.assert_close(got.x0, said.x0 + odds.clamp(max=math.log(50)).exp()[:, None] * (said.x0 - mean))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (dict(unsafe=torch.zeros(0, 2)), r"unsafe has shape \(0, 2\); wanted \(N, ...\) with 1 example or more"),
        (dict(unsafe=torch.zeros(3, 2), safe=torch.zeros(0, 2)), r"safe has shape \(0, 2\)"),
        (dict(unsafe=torch.zeros(3, 2), safe=torch.zeros(3, 4)), "wanted one size"),
        (dict(unsafe=torch.zeros(3, 2), prior=1.0), "prior is 1.0"),
    ],
)
def test_bad_examples_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        KernelOdds(**wrong)


def test_examples_of_another_size_and_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"examples \(8, 8\) and the model draws \(2,\); encode pictures"):
        Safe(whole(), KernelOdds(torch.zeros(3, 8, 8)))(randn(4, 2), T, {})
    with pytest.raises(ValueError, match="cap is 0"):
        Safe(whole(), ExactOdds(), cap=0.0)
    with pytest.raises(ValueError, match="low < high"):
        Safe(whole(), ExactOdds(), low=0.7, high=0.2)


def test_out_of_reach_of_what_is_not_wanted_nothing_is_done():
    """Odds compare two densities also where both are far away."""
    odds = KernelOdds(torch.full((1, 2), 5.0), torch.full((1, 2), 7.0))
    x, t = torch.zeros(1, 2), torch.tensor([0.5])
    assert float(Safe(whole(), odds).beta(x, t)[0]) > 1
    assert torch.equal(Safe(whole(), odds, reach=1.0)(x, t, {}).x0, whole()(x, t, {}).x0)
    near = Safe(whole(), KernelOdds(whole()(x, t, {}).x0 + 0.5, torch.full((1, 2), 7.0)), reach=1.0)(x, t, {})
    assert not torch.equal(near.x0, whole()(x, t, {}).x0)
