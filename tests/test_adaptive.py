"""Adaptive guidance: what is left out is really not asked for, and what is drawn is nearly what full guidance draws."""

import json

import pytest
import torch
from nets import FLOW, TABLE, randn

from tropism.adaptive import adaptive, adaptive_walk, remembered
from tropism.denoisers import Clipped, NetDenoiser
from tropism.guidance import Guided
from tropism.guidance.adaptive import Linear, Memory, agreement, fit_linear
from tropism.models.toy import MixtureDenoiser
from tropism.samplers import DDIM, EulerODE, FlowSDE, Heun, walk
from tropism.schedules import flow_grid, table_grid

SIZE, LABELS, W, STEPS = 32, 8, 5.0, 20
NULL = {"label": torch.tensor([-1])}


class Counting:
    """A denoiser that counts the rows of every call."""

    def __init__(self, inner):
        self.inner, self.rows, self.schedule = inner, [], inner.schedule

    def __call__(self, x, t, cond):
        self.rows.append(len(x))
        return self.inner(x, t, cond)


def mixture(schedule=TABLE):
    means = randn(LABELS, SIZE, seed=5) * 1.5
    return MixtureDenoiser(means, torch.full((LABELS,), 0.6), torch.full((LABELS,), 1 / LABELS), schedule, torch.eye(8))


def setting(rows=64, flow=False, seed=0):
    inner = Counting(mixture(FLOW if flow else TABLE))
    grid = flow_grid(STEPS) if flow else table_grid(1000, STEPS, "leading", 1)
    kernel = EulerODE() if flow else DDIM(0.0)
    return inner, Guided(inner, NULL, W), kernel, grid, randn(rows, SIZE, seed=seed), {"label": torch.arange(rows) % 8}


def last(moves):
    *_, end = moves
    return end.x_next


def off(got, wanted):
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("kernel", [EulerODE(), FlowSDE(), Heun(), DDIM(0.5)], ids=lambda kernel: type(kernel).__name__)
def test_without_a_threshold_it_is_the_walk(kernel):
    inner, guided, _, grid, x, cond = setting(8, flow=True)
    plain = list(walk(kernel, guided, x, grid, cond, torch.Generator().manual_seed(1)))
    asked, inner.rows = inner.rows, []
    ours = list(adaptive_walk(kernel, guided, x, grid, cond, torch.Generator().manual_seed(1)))
    assert inner.rows == asked
    for one, other in zip(plain, ours, strict=True):
        assert torch.equal(one.x_next, other.x_next) and torch.equal(one.prediction.eps, other.prediction.eps)


@pytest.mark.parametrize("flow", [False, True])
def test_rows_that_agreed_are_asked_once(flow):
    inner, guided, kernel, grid, x, cond = setting(flow=flow)
    full = last(walk(kernel, guided, x, grid, cond))
    calls, inner.rows = sum(inner.rows) / len(x), []
    ours = last(adaptive_walk(kernel, guided, x, grid, cond, threshold=0.999))
    saved, rows = 1 - sum(inner.rows) / len(x) / calls, inner.rows
    assert calls == 2 * STEPS and 0.2 < saved < 0.6 and off(ours, full) < 1e-3
    assert rows == sorted(rows, reverse=True) and rows[0] == 2 * len(x) and rows[-1] == len(x)
    fewer = (
        flow_grid(round(STEPS * (1 - saved))) if flow else table_grid(1000, round(STEPS * (1 - saved)), "leading", 1)
    )
    assert off(last(walk(kernel, guided, x, fewer, cond)), full) > 10 * off(ours, full)  # for the same calls


def test_a_row_stops_when_its_own_halves_agree():
    inner, guided, kernel, grid, x, cond = setting()
    together = list(adaptive_walk(kernel, guided, x, grid, cond, threshold=0.99))
    for row in (0, 5):
        inner.rows = []
        alone = list(
            adaptive_walk(
                kernel, guided, x[row : row + 1], grid, {"label": cond["label"][row : row + 1]}, threshold=0.99
            )
        )
        torch.testing.assert_close(alone[-1].x_next[0], together[-1].x_next[row], rtol=1e-5, atol=1e-5)
        seen = [agreement(*guided.halves(move.x, move.t, {"label": cond["label"][row : row + 1]})) for move in alone]
        first = next(place for place, cosine in enumerate(seen) if cosine >= 0.99)
        assert inner.rows[:STEPS] == [2] * (first + 1) + [1] * (STEPS - first - 1)


def test_a_threshold_of_minus_one_asks_for_one_pair():
    inner, guided, kernel, grid, x, cond = setting(8)
    list(adaptive_walk(kernel, guided, x, grid, cond, threshold=-1.0))
    assert inner.rows == [16] + [8] * (STEPS - 1)


def test_a_second_call_of_a_move_leaves_out_the_same_rows():
    inner, guided, _, grid, x, cond = setting(8, flow=True)
    list(adaptive_walk(Heun(), guided, x, grid, cond, threshold=-1.0))
    assert inner.rows == [16, 16] + [8] * (2 * STEPS - 3)


def test_guides_around_the_guidance_stay_there():
    inner, guided, kernel, grid, x, cond = setting(8)
    clipped = Clipped(guided, 1.0)
    plain = last(walk(kernel, clipped, x, grid, cond))
    assert torch.equal(last(adaptive_walk(kernel, clipped, x, grid, cond)), plain)
    inner.rows = []
    list(adaptive_walk(kernel, clipped, x, grid, cond, threshold=-1.0))
    assert sum(inner.rows) == 8 * (STEPS + 1)


ODD = [move % 2 == 0 for move in range(STEPS)]


def fitted(asked=ODD):
    _, guided, kernel, grid, _, _ = setting()
    chains = [remembered(kernel, guided, *(setting(200, seed=7)[4], grid, setting(200, seed=7)[5]))]
    return fit_linear(chains, grid, W, asked)


def test_linear_guidance_foretells_the_half_that_is_not_asked():
    inner, guided, kernel, grid, x, cond = setting()
    full, linear = last(walk(kernel, guided, x, grid, cond)), fitted()
    inner.rows = []
    ours = last(adaptive_walk(kernel, guided, x, grid, cond, linear=linear))
    assert sum(inner.rows) == 30 * len(x) and inner.rows[:2] == [128, 64]
    fewer = last(walk(kernel, guided, x, table_grid(1000, 15, "leading", 1), cond))
    assert off(ours, full) < 0.5 * off(fewer, full)  # 15 moves of full guidance cost the same
    both = last(adaptive_walk(kernel, guided, x, grid, cond, linear=linear, threshold=0.999))
    assert off(both, full) < 0.5 * off(fewer, full)


def test_the_fit_is_least_squares():
    told = [randn(40, 3, seed=seed) for seed in range(3)]
    null = [randn(40, 3, seed=9), 0.5 * told[0] - 2 * told[1] + 0.25 * randn(40, 3, seed=9), randn(40, 3, seed=8)]
    memory = Memory(torch.zeros(40, dtype=torch.bool), tuple(told), tuple(null))
    linear = fit_linear(
        [memory.rows(torch.arange(20)), memory.rows(torch.arange(20, 40))],
        torch.tensor([1.0, 0.6, 0.3, 0]),
        W,
        [True, False, True],
    )
    assert linear.coefficients[0] is None and linear.coefficients[2] is None and linear.error[1] < 1e-6
    assert linear.coefficients[1] == pytest.approx([0.5, -2.0, 0.25], abs=1e-6)
    null[1] = randn(40, 3, seed=7)
    memory = Memory(memory.agreed, memory.told, tuple(null))
    rest = fit_linear([memory], torch.tensor([1.0, 0.6, 0.3, 0]), W, [True, True, False])
    left = torch.stack([each.flatten() for each in (*told, *null[:2])], 1).double()
    normal = torch.linalg.solve(left.T @ left, left.T @ null[2].flatten().double())
    assert rest.coefficients[2] == pytest.approx(normal.tolist(), abs=1e-6)


def test_coefficients_are_kept_as_json(tmp_path):
    linear, file = fitted(), tmp_path / "linear.json"
    linear.save(file)
    assert Linear.load(file) == linear and [path.name for path in tmp_path.iterdir()] == ["linear.json"]
    found = json.loads(file.read_text())
    file.write_text(json.dumps({**found, "coefficients": found["coefficients"][:-1]}))
    with pytest.raises(ValueError, match="do not fit its 20 moves"):
        Linear.load(file)
    file.write_text("[]")
    with pytest.raises(ValueError, match="holds no coefficients"):
        Linear.load(file)
    with pytest.raises(ValueError, match="holds no coefficients"):
        Linear.load(tmp_path / "none.json")


def test_bad_settings_are_refused():
    _, guided, kernel, grid, x, cond = setting(2)
    with pytest.raises(ValueError, match=r"threshold is 1\.5; wanted a cosine"):
        adaptive(1.5)
    with pytest.raises(ValueError, match=r"fitted on 20 moves from 0\.952, and this chain has 10"):
        next(adaptive_walk(kernel, guided, x, table_grid(1000, 10, "leading", 1), cond, linear=fitted()))
    with pytest.raises(TypeError, match="NetDenoiser has no classifier-free guidance inside"):
        next(adaptive_walk(kernel, NetDenoiser(lambda *a: a[0], TABLE, "eps"), x, grid, cond, threshold=0.9))
    with pytest.raises(ValueError, match="strictly decreasing"):
        next(adaptive_walk(kernel, guided, x, grid.flip(0), cond))
    with pytest.raises(ValueError, match="fitted on fully guided chains of 20 moves"):
        fit_linear([], grid, W, ODD)


def test_memory_follows_particles():
    _, guided, kernel, grid, x, cond = setting(6)
    memory = remembered(kernel, guided, x, grid, cond)
    rows = memory.rows(torch.tensor([3, 3, 0]))
    assert torch.equal(rows.told[4], memory.told[4][[3, 3, 0]]) and torch.equal(rows.null[4], memory.null[4][[3, 3, 0]])
