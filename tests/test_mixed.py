"""Mixed flows whose network is exact: plain draws follow their law, guided ones the tilted law."""

import math
from functools import partial

import pytest
import torch
from test_discrete_guidance import (
    LENGTH,
    MASK,
    PRIOR,
    STD,
    SYMBOLS,
    WORDS,
    apart,
    counts,
    prior,
    wanted,
    zeros,
)

from tropism.denoisers import regression_target, to_prediction
from tropism.guidance import RewardGuided
from tropism.mixed import draw
from tropism.randomness import row_generators
from tropism.schedules import RectifiedFlow
from tropism.transitions import Categorical

SHAPE, ROWS, STEPS = (LENGTH, 1, SYMBOLS), 2000, 12
MEANS = torch.tensor([1.5, -0.5, 0.5, -1.5])  # of x by its symbol, where the halves depend on one another


def network(means):
    """Positions by themselves: a ~ PRIOR and x ~ N(means[a], STD^2). The posterior of both halves is known."""

    def said(x, symbols, t):
        alpha, sigma = (1 - t)[:, None, None], t[:, None, None]
        variance = (alpha * STD) ** 2 + sigma**2
        off = x - alpha * means  # (B, N, V)
        logits = PRIOR.log() - off**2 / (2 * variance)
        shown = torch.nn.functional.one_hot(symbols, SYMBOLS + 1)[..., :-1].float().log()
        law = Categorical(logits.where((symbols == MASK)[..., None], shown)).log_probs.exp()
        each = means + alpha * STD**2 / variance * off
        return (law * each).sum(-1, keepdim=True), logits

    return said


def counted(x0, words, rows):
    return wanted(words)


def pulled(x0, words, rows):
    """Five zeros, and the first point up with their number."""
    return wanted(words) + x0[:, 0, 0] * (zeros(words) - 3.0) / 2


def noise_of(law, rows, seed=0):
    """Mean and standard deviation of the total variation that so many draws from ``law`` itself have."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(law.float().expand(400, -1), rows, True, generator=generator)
    found = (torch.nn.functional.one_hot(drawn, len(law)).float().mean(1) - law).abs().sum(1) / 2
    return float(found.mean()), float(found.std())


def drawn(means, value=None, seed=0, rows=ROWS, **settings):
    return draw(network(means), rows, SHAPE, STEPS, value, generator=torch.Generator().manual_seed(seed), **settings)


def test_plain_draws_follow_the_joint_law():
    found = draw(network(MEANS), ROWS, SHAPE, 40, generator=torch.Generator().manual_seed(0))
    assert found.x.shape == (ROWS, LENGTH, 1) and int(found.symbols.max()) < MASK
    exact = counts(WORDS, prior())
    mean, std = noise_of(exact, ROWS)
    assert apart(counts(found.symbols), exact) < mean + 3 * std
    for symbol in range(SYMBOLS):
        x = found.x[found.symbols == symbol]
        assert len(x) / ROWS / LENGTH == pytest.approx(float(PRIOR[symbol]), abs=3 * 0.5 / math.sqrt(ROWS * LENGTH))
        assert float(x.mean()) == pytest.approx(float(MEANS[symbol]), abs=0.04)
        assert float(x.std()) == pytest.approx(STD, abs=0.04)


def test_guided_draws_follow_the_tilted_law():
    """Halves that do not depend on one another until the value couples them."""
    found = drawn(torch.zeros(SYMBOLS), pulled)
    tilt = wanted(WORDS) + (STD * (zeros(WORDS) - 3.0) / 2) ** 2 / 2
    exact = counts(WORDS, prior() * tilt.exp())
    assert apart(counts(found.symbols), counts(WORDS, prior())) > 0.5
    assert apart(counts(found.symbols), exact) + 3 * noise_of(exact, ROWS)[1] < 0.05
    n = zeros(found.symbols)
    for count in (3, 4, 5):
        x = found.x[n == count, 0]
        assert float(x.mean()) == pytest.approx(STD**2 * (count - 3) / 2, abs=3 * STD / math.sqrt(len(x)))


def test_where_the_halves_depend_on_one_another_the_joint_candidate_is_exact_and_the_paper_s_is_not():
    """The value is of the symbols alone, so x given its symbol keeps its law. Without ``joint`` x drifts to where the
    flow would have its symbols, and the symbols follow x."""
    exact = counts(WORDS, prior() * wanted(WORDS).exp())
    paper = drawn(MEANS, counted, rows=500, count=32, guide=None)
    assert apart(counts(paper.symbols), exact) - 3 * noise_of(exact, 500)[1] > 0.15
    found = drawn(MEANS, counted, guide=None, joint=True)
    assert apart(counts(found.symbols), exact) + 3 * noise_of(exact, ROWS)[1] < 0.05
    for symbol in range(SYMBOLS):
        x = found.x[found.symbols == symbol]
        assert float(x.mean()) == pytest.approx(float(MEANS[symbol]), abs=0.08)
        assert float(x.std()) == pytest.approx(STD, abs=0.08)


def test_one_candidate_leaves_the_symbols_to_the_flow():
    plain, found = drawn(MEANS, rows=800), drawn(MEANS, counted, rows=800, count=1, guide=None)
    mean, std = noise_of(counts(WORDS, prior()), 800)
    assert apart(counts(found.symbols), counts(WORDS, prior())) < mean + 3 * std
    assert not torch.equal(plain.symbols, found.symbols)


@pytest.mark.parametrize("joint", [False, True])
def test_a_row_depends_on_its_own_seed_alone(joint):
    value = lambda x0, words, rows: wanted(words) + x0[:, 0, 0]  # noqa: E731
    seeds = torch.arange(5)
    how = {"value": value, "count": 8, "joint": joint}
    whole = draw(network(MEANS), 5, SHAPE, 6, generator=row_generators(seeds), **how)
    for row in (0, 3):
        alone = draw(network(MEANS), 1, SHAPE, 6, generator=row_generators(seeds[row : row + 1]), **how)
        assert torch.equal(alone.symbols[0], whole.symbols[row])
        torch.testing.assert_close(alone.x[0], whole.x[row])
    again = [
        draw(network(MEANS), rows, SHAPE, 6, generator=torch.Generator().manual_seed(1)).symbols for rows in (2, 5)
    ]
    assert torch.equal(again[0], again[1][:2])


def test_rows_are_told_to_the_value_and_those_without_a_score_are_not_guided():
    """Row r is wanted above: the points of every even row. NaN in the odd ones leaves them as they are."""
    value = lambda x0, words, rows: (8 * x0[:, 0, 0]).where(rows % 2 == 0, math.nan)  # noqa: E731
    seeds = torch.arange(200)
    how = {"shape": SHAPE, "steps": 10, "count": 1}
    plain, found = (
        draw(network(MEANS * 0), 200, value=each, generator=row_generators(seeds), **how)
        for each in (lambda x0, words, rows: 0 * x0[:, 0, 0], value)
    )
    assert torch.equal(found.x[1::2], plain.x[1::2]) and torch.equal(found.symbols[1::2], plain.symbols[1::2])
    assert float((found.x - plain.x)[::2, 0].mean()) == pytest.approx(8 * STD**2, rel=0.1)


@pytest.mark.parametrize("target", ["x0", "flow", "v"])
def test_what_the_network_says_may_be_any_target_of_the_house(target):
    flow = RectifiedFlow()

    def said(x, symbols, t):
        x0, logits = network(MEANS)(x, symbols, t)
        return regression_target(target, flow, *to_prediction("x0", flow, x0, x, t), t), logits

    one, other = (
        draw(net, 20, SHAPE, 8, target=name, generator=torch.Generator().manual_seed(0))
        for net, name in ((network(MEANS), "x0"), (said, target))
    )
    assert torch.equal(one.symbols, other.symbols)
    torch.testing.assert_close(one.x, other.x, rtol=1e-4, atol=1e-4)


MU = partial(RewardGuided, rho=0.0, mu=1.0)


@pytest.mark.parametrize(("guide", "calls"), [(None, 1), (MU, 1), (RewardGuided, 2)])
def test_the_network_is_asked_once_a_move_and_again_for_a_gradient_through_it(guide, calls):
    asked = []

    def counting(x, symbols, t):
        asked.append(len(x))
        return network(MEANS)(x, symbols, t)

    draw(counting, 3, SHAPE, 4, pulled, count=2, guide=guide, generator=torch.Generator().manual_seed(0))
    assert asked == [3] * 4 * calls


@pytest.mark.parametrize("setting", [{"steps": 0}, {"count": 0}, {"rows": 0}, {"shape": (LENGTH, 1, 0)}])
def test_numbers_below_one_are_refused(setting):
    with pytest.raises(ValueError, match="wanted all of them 1 or more"):
        draw(**{"network": network(MEANS), "rows": 2, "shape": SHAPE, "steps": 3} | setting)


def test_answers_of_another_shape_are_refused():
    go = partial(draw, network(MEANS), 3, SHAPE, 4, count=2)
    with pytest.raises(ValueError, match=r"value answered \(\) for 6 candidates; wanted one each"):
        go(lambda x0, words, rows: x0.sum())
    with pytest.raises(ValueError, match=r"value answered \(6, 6\) for 6 candidates"):
        go(lambda x0, words, rows: x0[..., 0])
    with pytest.raises(ValueError, match=r"logits \(3, 6, 3\); wanted \(3, 6, 4\)"):
        draw(lambda x, words, t: (x, torch.zeros(3, LENGTH, 3)), 3, SHAPE, 4)
    with pytest.raises(ValueError, match=r"the network answered \(3, 6, 2\) for x \(3, 6, 1\)"):
        draw(lambda x, words, t: (x.expand(-1, -1, 2), torch.zeros(3, LENGTH, 4)), 3, SHAPE, 4)
    with pytest.raises(ValueError, match="2 generators for 3 rows"):
        go(generator=row_generators(torch.arange(2)))


def test_a_value_without_a_gradient_needs_no_guide():
    with pytest.raises(TypeError, match="has no gradient"):
        drawn(MEANS, counted, rows=2, count=2)
    assert drawn(MEANS, counted, rows=2, count=2, guide=None).x.isfinite().all()
