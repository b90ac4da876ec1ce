"""Feynman-Kac steering against the exact tilted law of the chain it steers, and what it does with bad input."""

import dataclasses
import math
import warnings

import pytest
import torch
from chains_law import DIRECTION, FLOW, MODEL, SEEDS, TABLE, WALK, chain_law, evidence, reward, target_mean

from tropism.counting import Counting
from tropism.guidance.cfg import Guided
from tropism.models.toy import MixtureDenoiser
from tropism.particles import (
    POTENTIALS,
    SCHEMES,
    Sampled,
    Walker,
    around,
    by_chain,
    fk_steer,
    learned,
    schedule,
    through,
)
from tropism.particles.walking import Cost, counted
from tropism.randomness import row_generators, row_seeds
from tropism.samplers import DDIM, Consistency, ConstantSDE, EulerODE, walk
from tropism.schedules import table_grid
from tropism.transitions import Gaussian


def steer(seed=0, prompts=100, count=50, walker=WALK, score=reward, **options):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(prompts, count, 2, generator=generator)
    return fk_steer(walker, x, {}, score, **({"scale": 1.0, "at": (3, 6), "generator": generator} | options))


def check(particles, walker=WALK, scale=1.0):
    """Evidence and mean within 3 standard errors of the exact ones, which are many errors away from the untilted."""
    mean, variance = chain_law(walker, 2)
    direction = scale * DIRECTION.double()
    exact = math.exp(float(direction @ mean) + variance * float(direction @ direction) / 2)
    z, error = evidence(particles)
    assert error < 0.12 * exact
    assert abs(z - exact) < 3 * error
    found, errors = target_mean(particles)
    assert float(errors[0]) < 0.2 * variance * float(direction[0])
    assert bool(((found - mean - variance * direction).abs() < 3 * errors).all())


@pytest.mark.parametrize("ess_below", [1.0, 0.5])
@pytest.mark.parametrize("potential", POTENTIALS)
@pytest.mark.parametrize("seed", SEEDS)
def test_every_potential_has_the_tilted_law_as_its_target(seed, potential, ess_below):
    particles, _ = steer(seed, potential=POTENTIALS[potential], ess_below=ess_below)
    check(particles)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("seed", SEEDS)
def test_every_scheme_has_the_tilted_law_as_its_target(seed, scheme):
    check(steer(seed, resample=SCHEMES[scheme])[0])


@pytest.mark.parametrize("walker", [FLOW, dataclasses.replace(FLOW, kernel=ConstantSDE(0.7)),
                                    dataclasses.replace(WALK, kernel=Consistency()),
                                    dataclasses.replace(WALK, kernel=DDIM(0.6))],
                         ids=["flow_sde", "constant_sde", "consistency", "ddim"])  # fmt: skip
@pytest.mark.parametrize("seed", SEEDS)
def test_every_random_kernel_can_be_steered(seed, walker):
    check(steer(seed, walker=walker)[0], walker)


def optimal(x, t, cond):
    """log E[exp(r(x_0)) | x_t] for the Gaussian model."""
    alpha, sigma = TABLE.alpha(t), TABLE.sigma(t)
    spread = (0.7 * sigma) ** 2 / ((0.7 * alpha) ** 2 + sigma**2)
    return MODEL(x, t, cond).x0 @ DIRECTION + spread * float(DIRECTION @ DIRECTION) / 2


INTERMEDIATE = {"around": Sampled(around(0.7), 3), "chain": Sampled(by_chain(2), 2), "learned": learned(optimal)}


@pytest.mark.parametrize("name", INTERMEDIATE)
@pytest.mark.parametrize("seed", SEEDS)
def test_every_intermediate_reward_has_the_same_target(seed, name):
    check(steer(seed, intermediate=INTERMEDIATE[name])[0])


def test_many_draws_estimate_the_value_function():
    x, t = torch.tensor([[0.5, 1.0]]), torch.tensor([0.5])
    walker = Walker(DDIM(1.0), MODEL, WALK.ts)
    seen = _seen(walker, x.expand(2_000, 2), t.expand(2_000))
    found = Sampled(around(0.7), 64)(lambda x0, rows: reward(x0, rows).double(), seen)
    error = float(found.std() / len(found) ** 0.5)
    assert error < 0.005
    assert abs(float(found.mean() - optimal(x, t, {}))) < 3 * error + 0.006  # the log of a mean of 64 is biased


def _seen(walker, x, t):
    from tropism.particles.walking import Seen

    rows = torch.arange(len(x))
    generators = row_generators(row_seeds(len(x), torch.Generator().manual_seed(0)))
    return Seen(x, t, t - 0.1, MODEL(x, t, {}), {}, rows, generators, walker, Cost())


def shifted(law, seen):
    return Gaussian(law.mean + 0.3 * law.std[:, None] * DIRECTION, law.std * 1.1)


PROPOSALS = {"shifted": shifted, "through": through(DDIM(1.0), MODEL.tilted(0.7 * DIRECTION)[0])}


@pytest.mark.parametrize("name", PROPOSALS)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_proposal_is_paid_for_in_weights(seed, name):
    check(steer(seed, proposal=PROPOSALS[name])[0])


def test_the_tilted_model_is_a_perfect_proposal():
    """With steps short enough: what the path saves is what the end is worth, and no weight is left."""
    walker = Walker(DDIM(1.0), MODEL, table_grid(1000, 200, "leading", 1))
    tilted, _ = MODEL.tilted(DIRECTION)
    given = {"walker": walker, "potential": None, "prompts": 20}
    perfect, _ = steer(proposal=through(DDIM(1.0), tilted), **given)
    assert float(perfect.ess.mean()) > 0.97 * 50
    assert float(steer(**given)[0].ess.mean()) < 0.7 * 50


@pytest.mark.parametrize("seed", SEEDS)
def test_a_mixture_is_tilted_as_its_closed_form(seed):
    """200 steps, so that the chain's own law is that of the model within the error."""
    model = MixtureDenoiser(
        torch.tensor([[-1.0, 0.0], [1.2, 0.5]]), torch.tensor([0.5, 0.4]), torch.tensor([0.8, 0.2]), TABLE
    )
    walker = Walker(DDIM(1.0), model, table_grid(1000, 200, "leading", 1))
    tilted, log_z = model.tilted(0.8 * DIRECTION)
    particles, _ = steer(seed, walker=walker, scale=0.8, prompts=40, at=schedule(200, 40))
    z, error = evidence(particles)
    assert error < 0.05 * math.exp(log_z)
    assert abs(z - math.exp(log_z)) < 3 * error
    mean, errors = target_mean(particles)
    assert bool((errors < 0.06).all())
    exact = (tilted.weights[:, None] * tilted.means).sum(0)
    assert bool(((mean - exact).abs() < 3 * errors).all())


@pytest.mark.parametrize("potential", POTENTIALS)
def test_without_resampling_the_weights_are_those_of_the_end(potential):
    """Potentials multiply to exp(scale r) on every path: a wrong last step, or dropped weights, cannot hide here."""
    particles, trace = steer(prompts=3, count=7, scale=2.5, potential=POTENTIALS[potential], ess_below=1e-9)
    assert not any(bool(step.resampled.any()) for step in trace.steps)
    torch.testing.assert_close(particles.log_weight, 2.5 * particles.reward, rtol=0, atol=1e-12)
    torch.testing.assert_close(particles.reward, reward(particles.rows, None).double().reshape(3, 7))


@pytest.mark.parametrize("potential", ["difference", "max"])
def test_weights_survive_where_nothing_is_resampled(potential):
    """Adaptive resampling that never happens: without its weights the mean is that of the base, far off."""
    particles, _ = steer(potential=POTENTIALS[potential], scale=0.5, ess_below=0.05)
    check(particles, scale=0.5)
    mean, _ = chain_law(WALK, 2)
    dropped = particles.rows.double().mean(0)
    assert abs(float(dropped[0] - mean[0])) < 0.04
    _, errors = target_mean(particles)
    assert float((particles.mean().mean(0) - dropped)[0]) > 10 * float(errors[0])


@pytest.mark.parametrize("potential", ["max", "sum"])
def test_a_last_step_of_the_running_value_would_miss(potential):
    """exp(scale * last maximum or sum) instead of exp(scale r) / prod G, as published code has it, is another law."""
    at, scale = (3, 6), 1.0
    particles, _ = steer(potential=POTENTIALS[potential], ess_below=1e-9, at=at, scale=scale)
    _, variance = chain_law(WALK, 2)
    mean, errors = target_mean(particles)
    untilted = particles.rows.double().mean(0)
    wrong = dataclasses.replace(particles, log_weight=3 * particles.log_weight)
    drift = wrong.mean().mean(0) - untilted
    assert float(drift[0]) > float((mean - untilted)[0]) + 5 * float(errors[0])
    assert abs(float((mean - untilted)[0]) - variance) < 0.1


def test_resampling_permutes_cond_with_the_particles():
    table = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    model = MixtureDenoiser(
        torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), torch.tensor([0.1, 0.1]), torch.tensor([0.5, 0.5]), TABLE, table
    )
    labels = torch.tensor([0, 1]).repeat(8)
    walker = Walker(DDIM(1.0), model, WALK.ts)
    x = torch.randn(1, 16, 2, generator=torch.Generator().manual_seed(0))
    options = {"scale": 20.0, "at": (2,), "generator": torch.Generator().manual_seed(1)}
    particles, _ = fk_steer(walker, x, {"label": labels}, lambda x0, rows: x0[:, 0], **options)
    assert bool((labels[particles.ancestor] == 1).all())
    assert bool((particles.x[..., 0] > 1.5).all())


@pytest.mark.parametrize("intermediate", [None, Sampled(around(0.7), 2), Sampled(by_chain(2), 2)])
@pytest.mark.parametrize("single", [True, False])
def test_microbatches_change_nothing(single, intermediate):
    found = []
    for size in (1 << 30, 7, 1):
        generator = torch.Generator().manual_seed(5)
        options = {"generator": generator if single else row_generators(row_seeds(15, generator))}
        options |= {} if intermediate is None else {"intermediate": intermediate}
        walker = dataclasses.replace(WALK, microbatch=size)
        found.append(steer(prompts=3, count=5, walker=walker, proposal=shifted, **options)[0])
    for other in found[1:]:
        assert torch.equal(found[0].x, other.x)
        assert torch.equal(found[0].log_weight, other.log_weight)
        assert torch.equal(found[0].ancestor, other.ancestor)


def test_a_prompt_does_not_depend_on_its_neighbours():
    x = torch.randn(4, 6, 2, generator=torch.Generator().manual_seed(0))
    seeds = torch.arange(24)
    options = {"scale": 2.0, "at": (2, 5, 8), "ess_below": 0.7}
    together, _ = fk_steer(WALK, x, {}, reward, generator=row_generators(seeds), **options)
    for place in range(4):
        own = row_generators(seeds[6 * place : 6 * place + 6])
        alone, _ = fk_steer(WALK, x[place : place + 1], {}, reward, generator=own, **options)
        assert torch.equal(alone.x[0], together.x[place])
        assert torch.equal(alone.log_weight[0], together.log_weight[place])


def test_rows_without_score_keep_their_weights_and_one_warning_is_given():
    def holey(x0, rows):
        return reward(x0, rows).masked_fill(rows % 5 == 0, math.nan)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        particles, trace = steer(prompts=2, count=10, score=holey, at=(2, 4, 6), ess_below=1e-9)
    assert len(caught) == 1
    assert "no score" in str(caught[0].message)
    assert bool(particles.log_weight[:, ::5].isneginf().all())
    assert torch.equal(particles.best() % 5 != 0, torch.tensor([True, True]))
    there = [k for k in range(10) if k % 5]
    torch.testing.assert_close(particles.log_weight[:, there], particles.reward[:, there], rtol=0, atol=1e-12)
    assert all(bool(step.reward.isfinite().all()) for step in trace.steps)


@pytest.mark.parametrize("potential", ["difference", "max", "sum", "immediate"])
def test_a_sample_that_loses_its_score_counts_as_it_did_last(potential):
    last = {}

    def fading(x0, rows):
        value = reward(x0, rows).double()
        last["calls"] = last.get("calls", 0) + 1
        if last["calls"] <= 2:
            last["value"] = value
            return value
        return value.masked_fill(rows == 1, math.nan)

    with pytest.warns(UserWarning, match="no score"):
        particles, _ = steer(prompts=1, count=4, score=fading, potential=POTENTIALS[potential], ess_below=1e-9)
    assert float(particles.log_weight[0, 1]) == pytest.approx(float(last["value"][1]), abs=1e-12)


def test_prompts_without_any_score_keep_equal_weights():
    with pytest.warns(UserWarning, match="no score"):
        particles, _ = steer(prompts=2, count=3, score=lambda x0, rows: torch.full((len(x0),), math.nan))
    assert torch.equal(particles.log_weight, torch.zeros(2, 3, dtype=torch.float64))
    assert torch.equal(particles.log_evidence, torch.zeros(2, dtype=torch.float64))


def test_large_scales_stay_logs():
    """Weights of exp(4000): nothing saturates, and the evidence stays a log."""
    particles, _ = steer(prompts=4, count=8, scale=1000.0)
    assert bool(particles.log_evidence.isfinite().all())
    assert float(particles.log_evidence.max()) > 100
    assert bool((particles.weight.sum(1) - 1).abs().max() < 1e-12)


@pytest.mark.parametrize("potential", POTENTIALS)
def test_what_it_costs_is_counted(potential):
    null = {"label": torch.tensor([-1])}
    mixture = MixtureDenoiser(torch.zeros(2, 2), torch.ones(2), torch.ones(2), TABLE, torch.eye(2))
    walker = dataclasses.replace(WALK, denoiser=Guided(mixture, null, 2.0))
    x, cond = torch.randn(2, 3, 2), {"label": torch.zeros(6, dtype=torch.int64)}
    options = {"scale": 1.0, "at": (2, 5), "potential": POTENTIALS[potential]}
    _, trace = fk_steer(walker, x, cond, reward, **options)
    assert trace.network_rows == 2 * 6 * 10
    assert trace.reward_rows == (6 if potential == "importance" else 18)
    assert [step.index for step in trace.steps] == ([10] if potential == "importance" else [2, 5, 10])
    _, dearer = fk_steer(walker, x, cond, reward, **options, intermediate=Sampled(by_chain(3), 2))
    if potential != "importance":
        assert dearer.network_rows - trace.network_rows == 2 * 2 * 2 * 3 * 6


def test_counting_leaves_a_denoiser_as_it_is():
    cost = Cost()
    wrapped = counted(MODEL, cost)
    x, t = torch.randn(4, 2), torch.full((4,), 0.5)
    assert torch.equal(wrapped(x, t, {}).x0, MODEL(x, t, {}).x0)
    assert isinstance(wrapped, Counting)
    assert wrapped.std == MODEL.std
    assert wrapped.schedule is TABLE
    assert cost.network_rows == 4


@pytest.mark.parametrize("potential", ["difference", "max"])
def test_a_deterministic_kernel_is_refused(potential):
    walker = dataclasses.replace(FLOW, kernel=EulerODE())
    with pytest.raises(ValueError, match=r"EulerODE draws no noise.*stochastic_solver"):
        steer(walker=walker, potential=POTENTIALS[potential])
    steer(walker=walker, potential=None)


BAD = {
    "at names moves": {"at": (3, 10)},
    "ess_below must lie": {"ess_below": 0.0},
    "scale must be finite": {"scale": math.inf},
    "infinite reward": {"score": lambda x0, rows: torch.full((len(x0),), -math.inf)},
    "wanted one number each": {"score": lambda x0, rows: x0},
    "2 generators for 6 particles": {"generator": row_generators(torch.arange(2))},
    "the proposal draws no noise": {"proposal": lambda law, seen: Gaussian(law.mean, 0 * law.std)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused(message):
    with pytest.raises(ValueError, match=message):
        steer(prompts=2, count=3, **BAD[message])


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(prompts, particles, ...\)"):
        fk_steer(WALK, torch.zeros(4, 2), {}, reward, scale=1.0)
    with pytest.raises(ValueError, match="one a particle, 2 \\* 3"):
        fk_steer(WALK, torch.zeros(2, 3, 2), {"label": torch.zeros(2)}, reward, scale=1.0)
    with pytest.raises(ValueError, match="no move of 20"):
        schedule(20, 15, 0.2, 0.5)


def test_the_schedule_of_the_paper():
    """A hundred steps, at 20, 40, 60 and 80."""
    assert schedule(100, 20) == (20, 40, 60, 80)
    assert schedule(20, 4, 0.0, 1.0) == (0, 4, 8, 12, 16)


def test_steered_by_nothing_it_is_the_chain():
    """The same generator, scale 0: the states of ``walk``."""
    x = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(0))
    particles, _ = fk_steer(WALK, x, {}, reward, scale=0.0, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    row_seeds(6, generator)
    *_, last = walk(WALK.kernel, MODEL, x.flatten(0, 1), WALK.ts, {}, generator)
    assert torch.equal(particles.rows, last.x_next)


def test_particles_answer_for_themselves():
    particles, _ = steer(prompts=300, count=6, scale=2.0, at=(), potential=None)
    equal = particles.resampled(torch.Generator().manual_seed(0))
    assert torch.equal(equal.log_weight, torch.zeros(300, 6, dtype=torch.float64))
    gap = equal.mean() - particles.mean()
    assert abs(float(gap[:, 0].mean())) < 3 * float(gap[:, 0].std() / math.sqrt(300))
    torch.testing.assert_close(reward(equal.rows, None).double().reshape(300, 6), equal.reward)
    index = particles.draw(torch.Generator().manual_seed(0))
    drawn = particles.at(index)
    assert drawn.shape == (300, 2)
    assert torch.equal(drawn, particles.x[torch.arange(300), index])
    assert bool((particles.unique_ancestors == 6).all())
