"""The average of parameters: its arithmetic, and that swapping it in and out loses nothing."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn

from tropism.ema import Ema
from tropism.models.pipelines import wrap_pipeline


def test_average_is_the_weighted_sum_of_what_was_seen() -> None:
    parameter = nn.Parameter(torch.tensor([1.0, -2.0]))
    ema = Ema([parameter], decay=0.9)
    expected = parameter.detach().clone()
    for value in (3.0, 5.0, -7.0):
        parameter.data.fill_(value)
        ema.update()
        expected = 0.9 * expected + 0.1 * value
    with ema.swapped():
        torch.testing.assert_close(parameter.detach(), expected)
    assert ema.updates == 3


def test_swap_is_exact_nested_and_survives_errors() -> None:
    parameter = nn.Parameter(torch.randn(50, generator=torch.Generator().manual_seed(0)).bfloat16())
    ema = Ema([parameter], decay=0.99)
    now = parameter.detach().clone()
    parameter.data.mul_(3)
    later = parameter.detach().clone()
    with pytest.raises(RuntimeError, match=r"leave swapped\(\) first"), ema.swapped():
        assert torch.equal(parameter, now)
        with ema.swapped():
            assert torch.equal(parameter, now)
        assert torch.equal(parameter, now)
        ema.update()
    assert torch.equal(parameter, later) and parameter.requires_grad


def test_state_continues_exactly() -> None:
    def run(parameter: nn.Parameter, ema: Ema, values: list[float]) -> None:
        for value in values:
            parameter.data.fill_(value)
            ema.update()

    first, second = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(3))
    whole, half = Ema([first], 0.7), Ema([first], 0.7)
    run(first, whole, [1.0, 2.0, 3.0, 4.0])
    first.data.zero_()
    run(first, half, [1.0, 2.0])
    rest = Ema([second], 0.7)
    rest.load_state_dict(half.state_dict())
    run(second, rest, [3.0, 4.0])
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in rest.state_dict().items())


def test_refusals() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\); got 1"):
        Ema([parameter], 1.0)
    with pytest.raises(ValueError, match="no parameters"):
        Ema([], 0.9)
    state = Ema([parameter], 0.9).state_dict()
    with pytest.raises(ValueError, match=r"shape \(3,\); wanted \(4,\)"):
        Ema([nn.Parameter(torch.zeros(4))], 0.9).load_state_dict(state)
    with pytest.raises(ValueError, match="1 tensors, the average 2"):
        Ema([parameter, parameter], 0.9).load_state_dict(state)


def test_average_of_a_lora() -> None:
    model = wrap_pipeline(tiny.sd_pipeline())
    model.add_lora(rank=1, generator=torch.Generator().manual_seed(0))
    x, t, rows = tiny.noise(2), torch.tensor([0.4, 0.9]), model.encode(tiny.PROMPTS)
    with torch.no_grad():
        before = model.denoiser(x, t, rows).eps
        ema = Ema(model.parameters(), decay=0.5)
        for parameter in model.parameters():
            parameter.add_(0.3)
        after = model.denoiser(x, t, rows).eps
        with ema.swapped():
            assert torch.equal(model.denoiser(x, t, rows).eps, before)
        assert torch.equal(model.denoiser(x, t, rows).eps, after) and not torch.equal(before, after)
