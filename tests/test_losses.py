"""Losses against hand values and torch.distributions; reductions against sums written out."""

import math

import pytest
import torch

from tropism.losses.policy import clipped, k1, k2, k3, score_function
from tropism.losses.reduce import per_entry, per_row, same_shape


def test_clipped_by_hand():
    log_ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.0, 1.05, 0.0]).log()
    log_ratio[-1] = -50.0
    advantage = torch.tensor([2.0, -2.0, 2.0, -2.0, 3.0, 1.0, -1.0])
    wanted = [-2.4, 3.0, -1.0, 1.8, -3.0, -1.05, 0.9]  # clip to [0.9, 1.2]
    torch.testing.assert_close(clipped(log_ratio, advantage, 0.1, 0.2), torch.tensor(wanted))


def test_clipped_gradients_stop_where_the_clip_is_active_and_stay_finite():
    log_ratio = torch.tensor([0.3, 0.3, -0.3, -0.3, 0.0, 500.0, 500.0, -500.0], requires_grad=True)
    advantage = torch.tensor([2.0, -2.0, 2.0, -2.0, 3.0, 1.0, -1.0, 1.0])
    loss = clipped(log_ratio, advantage, 0.1, 0.1)
    loss.sum().backward()
    up, down = math.exp(0.3), math.exp(-0.3)
    wanted = [0.0, 2 * up, -2 * down, 0.0, -3.0, 0.0, 0.0, 0.0]
    assert loss.isfinite().all() and log_ratio.grad.tolist() == pytest.approx(wanted, rel=1e-6)
    assert loss[6].item() == pytest.approx(math.exp(20), rel=1e-6)


def test_at_ratio_one_clipped_is_the_score_function():
    log_prob = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    advantage = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    (a,) = torch.autograd.grad(clipped(log_prob - log_prob.detach(), advantage, 1e-4, 1e-4).sum(), log_prob)
    (b,) = torch.autograd.grad(score_function(log_prob, advantage).sum(), log_prob)
    assert torch.equal(a, b) and torch.equal(a, -advantage)
    assert torch.equal(score_function(log_prob, advantage), -advantage * log_prob)


def test_kl_estimates_average_to_the_kl():
    p = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
    q = torch.distributions.Normal(torch.tensor(0.2, dtype=torch.float64), 1.1)
    exact = torch.distributions.kl_divergence(p, q).item()
    x = torch.randn(400_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    here, there = p.log_prob(x), q.log_prob(x)
    for estimate in (k1, k3):
        value = estimate(here, there)
        assert value.mean().item() == pytest.approx(exact, abs=4 * (value.std() / 400_000**0.5).item())
    assert k3(here, there).min() >= 0 and k3(here, there).std() < k1(here, there).std() / 2
    gap = (here - there)[:3]
    torch.testing.assert_close(k1(here, there)[:3], gap)
    torch.testing.assert_close(k2(here, there)[:3], gap**2 / 2)
    torch.testing.assert_close(k3(here, there)[:3], (-gap).exp() - 1 + gap)


@pytest.mark.parametrize(
    "call",
    [
        lambda a, b: clipped(a, b, 0.1, 0.1),
        score_function,
        k1,
        k2,
        k3,
    ],
)
@pytest.mark.parametrize("shapes", [((4, 7), (4,)), ((4, 4), (4,)), ((4, 7), (4, 1)), ((4, 7), ()), ((4,), (1,))])
def test_losses_never_broadcast(call, shapes):
    with pytest.raises(ValueError, match="must have the same shape"):
        call(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


def test_the_message_names_what_differs():
    with pytest.raises(
        ValueError, match=r"^a \(4,\) and b \(4, 7\) must have the same shape; expand per-row values first"
    ):
        same_shape(a=torch.zeros(4), b=torch.zeros(4, 7))


@pytest.mark.parametrize(("low", "high"), [(-0.1, 0.1), (1.5, 0.1), (0.1, -0.1)])
def test_clip_bounds_are_checked(low, high):
    with pytest.raises(ValueError, match="wanted 0 <= low <= 1, high >= 0"):
        clipped(torch.zeros(2), torch.zeros(2), low, high)


VALUE = torch.tensor([[1.0, 2.0, 4.0], [8.0, math.nan, math.nan], [math.nan, math.nan, math.nan]])
MASK = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])


def test_per_entry_counts_every_entry_once():
    assert [x.item() for x in per_entry(VALUE, MASK)] == [15.0, 4.0]
    assert [x.item() for x in per_entry(VALUE[0])] == [7.0, 3.0]


def test_per_row_counts_every_row_once():
    total, weight = per_row(VALUE, MASK)
    assert total.item() == pytest.approx(7 / 3 + 8) and weight.item() == 2
    assert [x.item() for x in per_row(VALUE[:1])] == pytest.approx([7 / 3, 1.0])
    with pytest.raises(ValueError, match=r"per_row wants \(B, K\)"):
        per_row(VALUE[0])


@pytest.mark.parametrize("reduce", [per_entry, per_row])
def test_masked_entries_carry_no_gradient_and_slices_add_up(reduce):
    value = VALUE.clone().requires_grad_()
    total, weight = reduce(value, MASK)
    total.backward()
    assert torch.equal(value.grad != 0, MASK)
    parts = [reduce(VALUE[i : i + 1], MASK[i : i + 1]) for i in range(3)]
    assert sum(part[0].item() for part in parts) == pytest.approx(total.item())
    assert sum(part[1].item() for part in parts) == weight.item()
    assert total.shape == weight.shape == ()


def test_reductions_refuse_masks_that_do_not_fit():
    with pytest.raises(ValueError, match=r"value \(3, 3\) and mask \(3,\)"):
        per_entry(VALUE, MASK[:, 0])
    with pytest.raises(TypeError, match="mask must be bool"):
        per_entry(VALUE, MASK.float())
