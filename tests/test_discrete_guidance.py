"""Symbols guided by importance sampling follow the tilted law, alone and beside a continuous part."""

import itertools
import math

import pytest
import torch
from nets import FLOW, randn

from tropism.guidance import RewardGuided
from tropism.guidance.discrete import revealed, reweighted
from tropism.models.toy import GaussianDenoiser
from tropism.samplers import EulerODE
from tropism.transitions import Categorical

LENGTH, SYMBOLS, MASK, ROWS, STEPS = 6, 4, 4, 1500, 30
PRIOR = torch.tensor([0.35, 0.3, 0.2, 0.15])
WORDS = torch.tensor(list(itertools.product(range(SYMBOLS), repeat=LENGTH)))
STD = 0.5


def network(symbols):
    """The exact posterior of independent positions: what is revealed stays, the rest follows the prior."""
    known = torch.nn.functional.one_hot(symbols, SYMBOLS + 1)[..., :SYMBOLS].float()
    return Categorical(PRIOR.expand_as(known).where((symbols == MASK)[..., None], known).log())


def zeros(words):
    return (words == 0).sum(-1)


def wanted(words):
    """Five zeros."""
    return -((zeros(words) - 5.0) ** 2) / 2


def counts(words, weights=None):
    return torch.bincount(zeros(words), weights, minlength=LENGTH + 1) / (
        len(words) if weights is None else weights.sum()
    )


def apart(one, other):
    return float((one - other).abs().sum() / 2)


def prior():
    return PRIOR[WORDS].prod(1)


def drawn(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    state, grid = torch.full((ROWS, LENGTH), MASK), torch.linspace(0, 1, STEPS + 1)
    for now, after in itertools.pairwise(grid):
        law = network(state)
        if count:
            law = reweighted(law, lambda words, rows: wanted(words), count, generator).law
        state = revealed(law, state, MASK, ((after - now) / (1 - now)).expand(ROWS)).sample(generator)
    return state


def test_the_walk_draws_the_prior_and_guided_the_tilted_law():
    exact, tilted = counts(WORDS, prior()), counts(WORDS, prior() * wanted(WORDS).exp())
    plain, few, many = drawn(0), drawn(4), drawn(64)
    assert int(plain.max()) < MASK and apart(counts(plain), exact) < 0.04 and apart(exact, tilted) > 0.5
    assert apart(counts(many), tilted) < 0.05
    assert apart(counts(few), tilted) > 3 * apart(counts(many), tilted)


def test_marginals_are_those_of_the_tilted_joint_law():
    state = torch.tensor([[0, MASK, MASK, 2, MASK, MASK]]).expand(200, -1)
    fits = ((state[0] == MASK) | (state[0] == WORDS)).all(1)
    weight = prior() * fits * wanted(WORDS).exp()
    exact = torch.stack([torch.bincount(WORDS[:, i], weight, minlength=SYMBOLS) for i in range(LENGTH)]) / weight.sum()
    found = reweighted(network(state), lambda words, rows: wanted(words), 500, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.law.log_probs.exp().mean(0), exact.float(), rtol=0, atol=0.01)
    assert (found.chosen[:, 0] == 0).all() and (found.chosen[:, 3] == 2).all()
    assert abs(float((found.chosen[:, 1] == 0).float().mean()) - float(exact[1, 0])) < 0.1
    assert (found.effective > 1).all() and (found.effective < 500).all()


def test_beside_a_continuous_part_both_follow_the_joint_law():
    """x ~ N(0, STD^2) and words, towards exp(wanted(a) + x (zeros - 3) / 2): the mean of x given the count is known,
    and so is the law of the count, in which exp of the mean is not the mean of exp: that bias is bounded here."""
    pull = lambda words: (zeros(words) - 3.0) / 2  # noqa: E731
    generator = torch.Generator().manual_seed(0)
    plain, state, x = (
        GaussianDenoiser(torch.zeros(1), STD, FLOW),
        torch.full((ROWS, LENGTH), MASK),
        randn(ROWS, 1, seed=7),
    )
    for now, after in itertools.pairwise(torch.linspace(0, 1, STEPS + 1)):
        t, s = (1 - now).expand(ROWS), (1 - after).expand(ROWS)  # noise is t = 1 here, and 0 there
        x0 = plain(x, t, {}).x0[:, 0]
        found = reweighted(network(state), lambda a, rows, x0=x0: wanted(a) + x0[rows] * pull(a), 64, generator)
        guide = RewardGuided(plain, lambda x0, rows, a=found.chosen: x0[:, 0] * pull(a[rows]))
        x = EulerODE()(guide, x, t, s, {})[0].mean
        state = revealed(found.law, state, MASK, ((after - now) / (1 - now)).expand(ROWS)).sample(generator)
    tilted = prior() * (wanted(WORDS) + (STD * pull(WORDS)) ** 2 / 2).exp()
    assert apart(counts(state), counts(WORDS, tilted)) < 0.05
    n = zeros(state)
    for count in (3, 4, 5):
        got = float(x[n == count].mean())
        assert got == pytest.approx(STD**2 * (count - 3) / 2, abs=0.12)
    assert float(x[n == 5].mean()) > float(x[n == 3].mean()) + 0.1


def test_candidates_without_a_score_weigh_nothing():
    law = Categorical(torch.zeros(2, 1, 2))
    value = lambda words, rows: torch.where((words[:, 0] == 1) | (rows == 1), math.nan, 0.0)  # noqa: E731
    found = reweighted(law, value, 200, torch.Generator().manual_seed(0))
    assert found.law.log_probs[0, 0].exp().tolist() == [1.0, 0.0] and (found.chosen[0] == 0).all()
    assert float(found.law.log_probs[1, 0, 0].exp()) == pytest.approx(0.5, abs=0.15)


def test_extreme_values_do_not_underflow():
    law = Categorical(torch.zeros(3, LENGTH, SYMBOLS))
    found = reweighted(law, lambda words, rows: 1e5 * wanted(words) - 1e7, 64, torch.Generator().manual_seed(0))
    assert found.law.log_probs.exp().isfinite().all() and float(found.law.log_probs.exp().sum()) == pytest.approx(18.0)


def test_bad_input_is_refused():
    law = Categorical(torch.zeros(3, LENGTH, SYMBOLS))
    with pytest.raises(ValueError, match="count is 0; wanted 1 candidate or more"):
        reweighted(law, lambda words, rows: wanted(words), 0)
    with pytest.raises(ValueError, match=r"value answered \(\) for 12 candidates"):
        reweighted(law, lambda words, rows: wanted(words).sum(), 4)
