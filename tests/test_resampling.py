"""Resampling schemes: unbiased, ordered in variance, and right at the edges."""

import pytest
import torch

from tropism.particles import SCHEMES, ess, multinomial, residual, stratified, systematic
from tropism.particles.resampling import _invert
from tropism.randomness import row_generators

ALL = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
WEIGHTS = torch.tensor([0.37, 0.02, 0.26, 0.0, 0.31, 0.04], dtype=torch.float64)
VALUES = torch.tensor([1.0, -4.0, 2.0, 9.0, -1.0, 5.0], dtype=torch.float64)


def means(scheme, repeats=20_000, count=6, seed=0):
    """(repeats,) the mean value of the offspring."""
    logs = WEIGHTS.log().expand(repeats, -1)
    return VALUES[scheme(logs, count, torch.Generator().manual_seed(seed))].mean(1)


@ALL
@pytest.mark.parametrize("seed", range(5))
def test_the_mean_of_the_offspring_is_the_weighted_mean(scheme, seed):
    found = means(scheme, seed=seed)
    error = float(found.std() / len(found) ** 0.5)
    assert error < 0.01
    assert abs(float(found.mean() - WEIGHTS @ VALUES)) < 3 * error


@ALL
def test_expected_offspring_are_count_times_the_weight(scheme):
    index = scheme(WEIGHTS.log().expand(20_000, -1), 10, torch.Generator().manual_seed(3))
    counts = torch.stack([(index == k).sum(1) for k in range(6)], 1).double()
    error = counts.std(0) / len(counts) ** 0.5
    assert bool(((counts.mean(0) - 10 * WEIGHTS).abs() <= 3.5 * error + 1e-12).all())


def test_variances_are_ordered():
    variance = {scheme.__name__: float(means(scheme).var()) for scheme in SCHEMES.values()}
    assert variance["systematic"] < variance["stratified"] < variance["multinomial"]
    assert variance["residual"] < variance["multinomial"]
    exact = float((WEIGHTS @ VALUES**2 - (WEIGHTS @ VALUES) ** 2) / 6)
    assert abs(variance["multinomial"] / exact - 1) < 0.03


def test_systematic_and_residual_give_at_least_the_whole_part():
    logs = WEIGHTS.log().expand(500, -1)
    for scheme, top in ((systematic, 1), (residual, 6)):
        index = scheme(logs, 6, torch.Generator().manual_seed(1))
        counts = torch.stack([(index == k).sum(1) for k in range(6)], 1)
        assert bool((counts >= (6 * WEIGHTS).floor()).all())
        assert bool((counts <= (6 * WEIGHTS).floor() + top).all())


@ALL
def test_the_scale_of_logs_does_not_matter(scheme):
    logs = torch.randn(7, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = scheme(logs, 5, torch.Generator().manual_seed(4))
    for shift in (-3e4, 3e4):
        assert torch.equal(plain, scheme(logs + shift, 5, torch.Generator().manual_seed(4)))
    assert plain.dtype == torch.int64
    assert plain.shape == (7, 5)


@ALL
def test_all_weight_on_one(scheme):
    logs = torch.full((3, 4), -torch.inf)
    logs[torch.arange(3), torch.tensor([0, 2, 3])] = 5.0
    index = scheme(logs, 6, torch.Generator().manual_seed(0))
    assert torch.equal(index, torch.tensor([[0] * 6, [2] * 6, [3] * 6]))


@ALL
def test_what_has_no_weight_is_never_drawn(scheme):
    logs = torch.zeros(2000, 5)
    logs[:, [0, 2, 4]] = -torch.inf
    index = scheme(logs, 7, torch.Generator().manual_seed(0))
    assert set(index.unique().tolist()) == {1, 3}


def test_a_sum_below_one_leaves_no_point_out():
    weights = torch.full((10,), 0.1, dtype=torch.float64)
    assert float(weights.cumsum(0)[-1]) < 1
    points = torch.tensor([0.0, 1 - 2.0**-53, 1.0], dtype=torch.float64)
    assert _invert(weights, points).tolist() == [0, 9, 9]


def test_equal_weights_leave_everyone_in_place():
    for scheme in (systematic, stratified, residual):
        assert torch.equal(scheme(torch.full((64,), -7.3), 64, torch.Generator().manual_seed(0)), torch.arange(64))


@ALL
@pytest.mark.parametrize("logs", [[0.0, float("nan")], [0.0, float("inf")], [-float("inf")] * 2, []])
def test_bad_weights_are_refused(scheme, logs):
    with pytest.raises(ValueError, match="log-weight"):
        scheme(torch.tensor(logs), 3, None)
    with pytest.raises(ValueError, match="count must be"):
        scheme(torch.zeros(3), 0, None)


@ALL
def test_a_row_with_its_own_generator_does_not_depend_on_its_neighbours(scheme):
    logs = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    seeds = torch.arange(4)
    together = scheme(logs, 9, row_generators(seeds))
    alone = [scheme(logs[row : row + 1], 9, row_generators(seeds[row : row + 1])) for row in range(4)]
    assert torch.equal(together, torch.cat(alone))
    with pytest.raises(ValueError, match="3 generators for 4 rows"):
        scheme(logs, 9, row_generators(seeds[:3]))


def test_effective_sample_size():
    assert float(ess(torch.zeros(8))) == pytest.approx(8)
    assert float(ess(torch.tensor([0.0, -torch.inf, -torch.inf]))) == pytest.approx(1)
    assert float(ess(torch.tensor([0.5, 0.25, 0.25]).double().log() + 900)) == pytest.approx(1 / 0.375)


def test_multinomial_and_stratified_are_different_draws():
    logs = WEIGHTS.log().expand(50, -1)
    same = [scheme(logs, 6, torch.Generator().manual_seed(0)) for scheme in (multinomial, stratified)]
    assert not torch.equal(*same)
