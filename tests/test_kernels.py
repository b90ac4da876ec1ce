"""What every kernel and the one loop promise, whatever the formula."""

import dataclasses
import math

import pytest
import torch
from nets import FLOW, TABLE, flow_rows, randn, wavy

from tropism.base import Kernel, Prediction
from tropism.denoisers import NetDenoiser
from tropism.samplers import DDIM, Consistency, ConstantSDE, EulerODE, FlowSDE, Heun, Jump, noise_until, walk, widen
from tropism.schedules import RectifiedFlow, flow_grid, table_grid
from tropism.transitions import Categorical

KERNELS = [
    DDIM(1.0),
    DDIM(0.0),
    EulerODE(),
    FlowSDE(),
    ConstantSDE(),
    Consistency(),
    Heun(),
    Jump(),
    Jump(0.5),
    widen(DDIM(1.0), 1.3),
    noise_until(FlowSDE(), 0.5),
]


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_rows_may_sit_at_different_times(kernel):
    denoiser = NetDenoiser(wavy, RectifiedFlow(), "flow")
    _, t, s = flow_rows()
    x = randn(5, 3, 4, 4)
    together, belief = kernel(denoiser, x, t, s, {})
    for row in range(5):
        one = slice(row, row + 1)
        alone, alone_belief = kernel(denoiser, x[one], t[one], s[one], {})
        assert torch.equal(alone.mean, together.mean[one]) and torch.equal(alone.std, together.std[one])
        assert torch.equal(alone_belief.x0, belief.x0[one])
        assert torch.equal(alone.log_prob(x[one]), together.log_prob(x)[one])


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_kernels_are_frozen_values(kernel):
    assert kernel == dataclasses.replace(kernel)
    name = dataclasses.fields(kernel)[0].name if dataclasses.fields(kernel) else "anything"
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(kernel, name, 0.5)


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_a_bfloat16_network_still_gives_float32_log_probabilities(kernel):
    net = torch.nn.Linear(64, 64, dtype=torch.bfloat16)
    torch.nn.init.normal_(net.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    denoiser = NetDenoiser(lambda x, number, cond: net(x), RectifiedFlow(), "flow", dtype=torch.bfloat16)
    x = randn(5, 64).requires_grad_()
    for move in walk(kernel, denoiser, x, flow_grid(10, 3.0), {}, torch.Generator().manual_seed(0)):
        log_prob = move.transition.log_prob(move.x_next.detach())
        assert log_prob.dtype == move.x_next.dtype == move.prediction.x0.dtype == torch.float32
        assert log_prob.isfinite().all() and log_prob.requires_grad and move.x_next.isfinite().all()
    move.x_next.sum().backward()
    assert x.grad.isfinite().all() and net.weight.grad.isfinite().all() and net.weight.grad.abs().sum() > 0


def test_widen_scales_the_noise_and_nothing_else():
    denoiser = NetDenoiser(wavy, TABLE, "eps")
    x, t, s = randn(3, 8), torch.tensor([0.9, 0.5, 0.001]), torch.tensor([0.8, 0.4, 0.0])
    plain, _ = DDIM(1.0)(denoiser, x, t, s, {})
    wide, _ = widen(DDIM(1.0), 1.5)(denoiser, x, t, s, {})
    assert torch.equal(wide.mean, plain.mean) and torch.equal(wide.std, plain.std * 1.5)
    assert wide.is_random.tolist() == plain.is_random.tolist() == [True, True, False]
    for factor in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="positive and finite"):
            widen(DDIM(1.0), factor)
    tokens: Kernel = lambda denoiser, x, t, s, cond: (Categorical(x), Prediction(x, x))  # noqa: E731
    with pytest.raises(TypeError, match="only a Gaussian law can be widened; "):
        widen(tokens, 2.0)(denoiser, x, t, s, {})


def test_noise_until_is_the_kernel_before_and_deterministic_after():
    denoiser = NetDenoiser(wavy, TABLE, "eps")
    x, t, s = randn(4, 8), torch.tensor([0.9, 0.51, 0.5, 0.001]), torch.tensor([0.8, 0.4, 0.4, 0.0])
    random, _ = DDIM(1.0)(denoiser, x, t, s, {})
    quiet, _ = DDIM(0.0)(denoiser, x, t, s, {})
    law, _ = noise_until(DDIM(1.0), 0.5)(denoiser, x, t, s, {})
    assert torch.equal(law.mean[:2], random.mean[:2]) and torch.equal(law.std[:2], random.std[:2])
    torch.testing.assert_close(law.mean[2:], quiet.mean[2:], rtol=0, atol=1e-6)
    assert law.is_random.tolist() == [True, True, False, False]
    flow = NetDenoiser(wavy, FLOW, "flow")
    late, _ = noise_until(FlowSDE(), 0.95)(flow, x, t, s, {})
    ode, _ = EulerODE()(flow, x, t, s, {})
    torch.testing.assert_close(late.mean, ode.mean, rtol=0, atol=1e-6)
    assert noise_until(DDIM(1.0), 0.0) == DDIM(1.0)
    for time in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="must lie in"):
            noise_until(DDIM(1.0), time)
    tokens: Kernel = lambda denoiser, x, t, s, cond: (Categorical(x), Prediction(x, x))  # noqa: E731
    with pytest.raises(TypeError, match="only a Gaussian law can lose its noise; "):
        noise_until(tokens, 0.5)(denoiser, x, t, s, {})


def test_walk_yields_every_step_and_depends_on_its_generator_only():
    denoiser, grid = NetDenoiser(wavy, TABLE, "eps"), table_grid(1000, 10, "leading", 1)
    x = randn(4, 2).double()
    moves = list(walk(DDIM(1.0), denoiser, x, grid, {}, torch.Generator().manual_seed(5)))
    torch.randn(3)
    again = list(walk(DDIM(1.0), denoiser, x, grid, {}, torch.Generator().manual_seed(5)))
    assert len(moves) == 10 and moves[0].x.dtype == torch.float32
    for k, (move, other) in enumerate(zip(moves, again, strict=True)):
        assert torch.equal(move.x_next, other.x_next)
        assert move.t.tolist() == [grid[k].item()] * 4 and move.s.tolist() == [grid[k + 1].item()] * 4
        assert k == 0 or move.x is moves[k - 1].x_next
        assert torch.equal(DDIM(1.0)(denoiser, move.x, move.t, move.s, {})[0].mean, move.transition.mean)


def test_walk_hands_the_condition_on_and_keeps_the_graph():
    seen = []

    def net(x, number, cond):
        seen.append(cond["c"])
        return x * cond["c"]

    c = torch.tensor([[0.5], [0.6]], requires_grad=True)
    grid = table_grid(1000, 40, "leading", 1)
    *_, last = walk(DDIM(1.0), NetDenoiser(net, TABLE, "eps"), randn(2, 3), grid, {"c": c})
    last.x_next.sum().backward()
    assert len(seen) == 40 and all(value is c for value in seen) and (c.grad != 0).all()


@pytest.mark.parametrize(
    "ts", [[1.0], [0.5, 0.5, 0.0], [0.0, 1.0], [1.2, 0.0], [1.0, -0.1], [[1.0, 0.0]], [1.0, math.nan]]
)
def test_walk_refuses_what_is_no_grid(ts):
    with pytest.raises(ValueError, match="strictly decreasing"):
        next(walk(DDIM(1.0), NetDenoiser(wavy, TABLE, "eps"), randn(2, 3), torch.tensor(ts), {}))


def test_kernels_refuse_what_they_cannot_do():
    x, t, s = randn(1, 3), torch.tensor([0.5]), torch.tensor([0.4])
    for kernel in (EulerODE(), FlowSDE(), ConstantSDE()):
        with pytest.raises(TypeError, match="walks the path of RectifiedFlow, the denoiser has DDPMTable"):
            kernel(NetDenoiser(wavy, TABLE, "eps"), x, t, s, {})
    with pytest.raises(ValueError, match=r"eta must lie in \[0, 1\]; got 1\.5"):
        DDIM(1.5)
    with pytest.raises(ValueError, match="noise_level must not be negative"):
        FlowSDE(-0.1)
    with pytest.raises(ValueError, match="eta must not be negative"):
        ConstantSDE(-0.1)
