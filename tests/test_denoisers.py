"""Denoisers: what a network says, in float32, as a consistent pair of a clean sample and a noise."""

import math

import pytest
import torch
from nets import FLOW, SD, TABLE, randn, wavy

from tropism.base import Prediction
from tropism.denoisers import Clipped, ConsistencyDenoiser, NetDenoiser, consistent, regression_target
from tropism.schedules import EDM, Cosine, ddpm_table

SCHEDULES = [TABLE, ddpm_table(1000, **SD, rescale_zero_terminal_snr=True), FLOW, EDM(), Cosine()]


@pytest.mark.parametrize("target", ["eps", "x0", "v", "flow"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
def test_both_halves_are_consistent_and_the_output_comes_back(schedule, target):
    low = 0.001 if target == "eps" else 0.0
    t = torch.tensor([low, 0.001, 0.3, 0.8, 0.95 if target == "eps" else 1.0])
    x = randn(5, 2, 3) * schedule.sigma(t).clamp(min=1).reshape(5, 1, 1)
    output = wavy(x, torch.arange(5), {})
    prediction = NetDenoiser(lambda *_: output, schedule, target)(x, t, {})
    alpha, sigma = (value(t).reshape(5, 1, 1) for value in (schedule.alpha, schedule.sigma))
    scale = x.abs().amax() + (alpha * prediction.x0).abs().amax() + (sigma * prediction.eps).abs().amax()
    assert prediction.x0.isfinite().all() and prediction.eps.isfinite().all()
    assert (alpha * prediction.x0 + sigma * prediction.eps - x).abs().max() < 1e-6 * scale
    back = regression_target(target, schedule, *prediction, t)
    noisy = slice(1, None) if target == "x0" else slice(None)  # at sigma = 0 the sample, not the network, says x0
    size = 1 + prediction.x0.abs().amax() + prediction.eps.abs().amax()
    assert (back[noisy] - output[noisy]).abs().max() < 1e-5 * size


@pytest.mark.parametrize("target", ["eps", "x0", "v", "flow"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
def test_a_network_that_says_its_target_is_right(schedule, target):
    x0, eps, t = randn(3, 4), randn(3, 4, seed=1), torch.tensor([0.01, 0.4, 0.9])
    x = schedule.alpha(t)[:, None] * x0 + schedule.sigma(t)[:, None] * eps
    said = regression_target(target, schedule, x0, eps, t)
    prediction = NetDenoiser(lambda *_: said, schedule, target)(x, t, {})
    size = 1 + schedule.sigma(t)[:, None] / schedule.alpha(t)[:, None]
    assert ((prediction.x0 - x0).abs() < 2e-6 * size).all()
    # where sigma is small the noise is a small part of x, so that its digits are lost in x and not in the conversion
    assert ((prediction.eps - eps).abs() < 1e-6 * (1 + 1 / schedule.sigma(t)[:, None])).all()


@pytest.mark.parametrize("target", ["eps", "x0", "v", "flow"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_prediction_is_float32_whatever_the_network_says(target, dtype):
    net = NetDenoiser(lambda x, number, cond: x.to(dtype), TABLE, target)
    for denoiser in (net, ConsistencyDenoiser(net), Clipped(net, rederive=True)):
        prediction = denoiser(randn(2, 3), torch.tensor([0.3, 0.9]), {})
        assert prediction.x0.dtype == prediction.eps.dtype == torch.float32


def test_the_four_targets():
    t = torch.tensor([0.3])
    x0, eps = torch.tensor([[2.0]]), torch.tensor([[5.0]])
    alpha, sigma = TABLE.alpha(t).item(), TABLE.sigma(t).item()
    values = [regression_target(target, TABLE, x0, eps, t).item() for target in ("eps", "x0", "v", "flow")]
    assert values == pytest.approx([5.0, 2.0, alpha * 5 - sigma * 2, 3.0])


def test_an_eps_network_at_alpha_zero_is_refused():
    table = ddpm_table(1000, **SD, rescale_zero_terminal_snr=True)
    with pytest.raises(ValueError, match="an eps network says nothing at alpha = 0"):
        NetDenoiser(wavy, table, "eps")(randn(2, 3), torch.tensor([0.5, 1.0]), {})


def test_denoisers_refuse_nonsense():
    with pytest.raises(ValueError, match="unknown target 'velocity'"):
        NetDenoiser(wavy, TABLE, "velocity")
    with pytest.raises(ValueError, match=r"answered \(2, 1\) for x \(2, 3\)"):
        NetDenoiser(lambda x, number, cond: x[:, :1], TABLE, "eps")(randn(2, 3), torch.tensor([0.5, 0.6]), {})
    with pytest.raises(ValueError, match="same shape"):
        regression_target("v", TABLE, randn(2, 3), randn(2, 1), torch.tensor([0.5, 0.6]))


def test_the_network_receives_the_number_it_was_trained_on():
    seen = []

    def net(x, number, cond):
        seen.append((x.dtype, number.tolist()))
        return x.float()

    t = torch.tensor([0.001, 1.0])
    NetDenoiser(net, TABLE, "eps", dtype=torch.bfloat16)(randn(2, 3), t, {})
    NetDenoiser(net, FLOW, "flow")(randn(2, 3), t, {})
    assert seen == [(torch.bfloat16, [0, 999]), (torch.float32, [1.0, 1000.0])]


def test_a_consistency_model_keeps_its_boundary():
    denoiser = ConsistencyDenoiser(NetDenoiser(wavy, TABLE, "eps"))
    x, t = randn(2, 3), torch.tensor([0.001, 0.021])
    prediction = denoiser(x, t, {})
    assert torch.equal(prediction.x0[0], x[0])  # tau = 0: c_skip = 1, c_out = 0
    alpha, sigma = TABLE.alpha(t)[1], TABLE.sigma(t)[1]
    inner, scaled = (x[1] - sigma * wavy(x[1:], torch.tensor([20]), {})[0]) / alpha, 200.0
    wanted = 0.25 / (scaled**2 + 0.25) * x[1] + scaled / math.sqrt(scaled**2 + 0.25) * inner
    torch.testing.assert_close(prediction.x0[1], wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(alpha * prediction.x0[1] + sigma * prediction.eps[1], x[1], rtol=1e-6, atol=1e-6)


def test_consistent_never_divides_by_zero():
    zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    assert consistent(torch.tensor([[9.0]]), torch.tensor([[2.0]]), one, zero) == Prediction(
        torch.tensor([[2.0]]), zero
    )
    assert consistent(torch.tensor([[9.0]]), torch.tensor([[2.0]]), zero, one).eps.item() == 2.0
