"""Search without weights: the best of n, and beams over noise, against what order statistics say."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from chains_law import DIRECTION, FLOW, SEEDS, WALK, chain_law, reward

from tropism.particles import beam_search, best_of_n
from tropism.randomness import row_generators
from tropism.samplers import DDIM, EulerODE


@pytest.mark.parametrize("seed", SEEDS)
def test_best_of_n_is_the_maximum(seed):
    """The expected largest of 8 normals is 1.42360 standard deviations above the mean."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4000, 8, 2, generator=generator)
    particles, trace = best_of_n(WALK, x, {}, reward, generator=generator)
    best = reward(particles.at(particles.best()), None).double()
    assert torch.equal(best, particles.reward.max(1).values)
    mean, variance = chain_law(WALK, 2)
    exact = float(DIRECTION.double() @ mean) + 1.423600 * math.sqrt(variance * float(DIRECTION @ DIRECTION))
    error = float(best.std() / math.sqrt(len(best)))
    assert error < 0.01
    assert abs(float(best.mean()) - exact) < 3 * error
    assert torch.equal(particles.log_weight, torch.zeros(4000, 8, dtype=torch.float64))
    assert (trace.network_rows, trace.reward_rows) == (320_000, 32_000)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_beam_of_one_move_is_the_best_of_its_draws(seed):
    """x_0 ~ N(mean(x), std^2) and the expected largest of 4 normals is 1.029375."""
    walker = dataclasses.replace(FLOW, ts=torch.tensor([0.9, 0.0]))
    generator = torch.Generator().manual_seed(seed)
    x = torch.ones(5000, 1, 2)
    particles, trace = beam_search(walker, x, {}, reward, expand=4, at=(0,), generator=generator)
    law, _ = walker.kernel(walker.denoiser, x[:1, 0], torch.tensor([0.9]), torch.tensor([0.0]), {})
    exact = float(reward(law.mean, None)) + 1.029375 * float(law.std * DIRECTION.norm())
    error = float(particles.reward.std() / math.sqrt(5000))
    assert error < 0.025
    assert abs(float(particles.reward.mean()) - exact) < 3 * error
    assert (trace.network_rows, trace.reward_rows) == (5000, 20_000)


def test_a_beam_looks_ahead_for_what_it_costs():
    x = torch.randn(200, 3, 2, generator=torch.Generator().manual_seed(0))
    options = {"expand": 4, "at": (2, 5), "generator": torch.Generator().manual_seed(1)}
    particles, trace = beam_search(WALK, x, {}, reward, **options)
    assert trace.network_rows == 600 * (10 + 2 * 3)
    assert trace.reward_rows == 600 * (2 * 4 + 1)
    torch.testing.assert_close(particles.reward, reward(particles.rows, None).double().reshape(200, 3))
    base, _ = best_of_n(WALK, x, {}, reward, generator=torch.Generator().manual_seed(1))
    assert float(particles.reward.mean()) > float(base.reward.mean()) + 0.3


def test_a_beam_keeps_the_best_and_says_whose_they_are():
    """One prompt's particle starts at the far end of the reward and the last move adds next to nothing."""
    walker = dataclasses.replace(WALK, kernel=DDIM(0.05))
    x = torch.zeros(1, 3, 2)
    x[0, 2] = 2.0
    found, trace = beam_search(walker, x, {}, reward, expand=3, at=(4,), generator=torch.Generator().manual_seed(0))
    assert found.ancestor.tolist() == [[2, 2, 2]]
    assert trace.steps[-1].unique_ancestors.tolist() == [1]
    with pytest.raises(ValueError, match="move 3 of EulerODE is without noise"):
        beam_search(dataclasses.replace(FLOW, kernel=EulerODE()), x, {}, reward, expand=2, at=(3,))
    with pytest.raises(ValueError, match="expand must be"):
        beam_search(walker, x, {}, reward, expand=0, at=(3,))


def test_beams_do_not_depend_on_microbatches_or_neighbours():
    x = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(0))
    seeds = torch.arange(6)
    options = {"expand": 3, "at": (2, 8)}
    whole, _ = beam_search(WALK, x, {}, reward, generator=row_generators(seeds), **options)
    small = dataclasses.replace(WALK, microbatch=4)
    parts, _ = beam_search(small, x, {}, reward, generator=row_generators(seeds), **options)
    alone, _ = beam_search(WALK, x[1:2], {}, reward, generator=row_generators(seeds[2:4]), **options)
    assert torch.equal(whole.x, parts.x)
    assert torch.equal(whole.x[1], alone.x[0])
    assert torch.equal(whole.reward, reward(whole.rows, None).double().reshape(3, 2))
