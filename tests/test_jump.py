"""Jumps: a model that is told where to go gets there in one move, or in any number of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import tiny
import torch
from torch import Tensor

from tropism.base import Cond, Prediction, bcast
from tropism.denoisers import END, FlowMap, NetDenoiser, takes_end, towards
from tropism.distillation import carried
from tropism.models.pipelines import wrap_pipeline
from tropism.models.ring import Ring
from tropism.models.toy import PROMPTS, ToyNet, ToyTextToImage
from tropism.policy import Policy
from tropism.samplers import EulerODE, Jump, solver, walk
from tropism.schedules import RectifiedFlow

MEAN, STD = torch.tensor([1.5, -0.5]), 0.4


@dataclass(frozen=True)
class Exact:
    """The flow map of N(MEAN, STD^2): what it believes when told s is what leads to s, on the straight path."""

    schedule: RectifiedFlow = field(default_factory=RectifiedFlow)
    takes_end: bool = True

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        end = cond[END] / 1000
        there = moved(x, t, end)
        u = (x - there) / bcast(t - end, x)
        return Prediction(x - bcast(t, x) * u, x + bcast(1 - t, x) * u)


def moved(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Along the probability flow from t to s: the distance to the mean goes as the standard deviation."""
    spread = [((1 - each) ** 2 * STD**2 + each**2).sqrt() for each in (s, t)]
    return bcast(1 - s, x) * MEAN + bcast(spread[0] / spread[1], x) * (x - bcast(1 - t, x) * MEAN)


def noise(rows: int = 64) -> Tensor:
    return torch.randn(rows, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("steps", [1, 2, 4, 32])
def test_any_number_of_jumps_ends_in_one_place(steps: int) -> None:
    x, denoiser = noise(), FlowMap(Exact())
    *_, last = walk(Jump(), denoiser, x, torch.linspace(1, 0, steps + 1), {})
    one = torch.ones(len(x))
    torch.testing.assert_close(last.x_next, moved(x, one, 0 * one), atol=2e-6, rtol=0)
    assert not last.transition.is_random.any()


def test_a_jump_is_x_minus_the_mean_velocity() -> None:
    x, t, s = noise(5), torch.linspace(0.4, 1, 5), torch.linspace(0, 0.3, 5)
    u = torch.randn(5, 2)

    def net(x: Tensor, number: Tensor, cond: Cond) -> Tensor:
        assert torch.equal(cond[END], 1000 * s) and torch.equal(number, 1000 * t)
        return u

    denoiser = FlowMap(NetDenoiser(net, RectifiedFlow(), "flow", takes_end=True))
    law, prediction = Jump()(denoiser, x, t, s, {})
    torch.testing.assert_close(law.mean, x - bcast(t - s, x) * u, atol=1e-6, rtol=0)
    torch.testing.assert_close(prediction.eps - prediction.x0, u, atol=1e-6, rtol=0)
    assert torch.equal(carried(denoiser, x, t, s, {}), law.mean)


def test_who_is_told_the_end() -> None:
    """Only a flow map, and itself when nobody says."""
    heard: list[Cond] = []

    def net(x: Tensor, number: Tensor, cond: Cond) -> Tensor:
        heard.append(cond)
        return x

    inner = NetDenoiser(net, RectifiedFlow(), "flow", takes_end=True)
    x, t, s = noise(3), torch.full((3,), 0.5), torch.full((3,), 0.25)
    assert towards(inner, {}, s) == {}
    EulerODE()(inner, x, t, s, {})
    EulerODE()(FlowMap(inner), x, t, s, {})
    Jump()(FlowMap(inner), x, t, s, {})
    assert END not in heard[0] and [float(each[END][0]) for each in heard[1:]] == [500.0, 250.0]


def test_which_models_jump() -> None:
    """The ring and the toy by their views; a diffusers pipeline is told one time and says so."""
    toy = ToyTextToImage(ToyNet(torch.Generator().manual_seed(0)), torch.randn(8, 16), "flow")
    for model, prompt in ((Ring(RectifiedFlow()), "any"), (toy, PROMPTS[0])):
        view = model.few_step("jump", 4)
        assert takes_end(model.denoiser) and solver(view.denoiser) == Jump() and view.guidance_scale == 1
        assert Policy(view, solver(view.denoiser), 3).draw([prompt] * 2, torch.Generator()).shape == (2, 2)
    assert not takes_end(NetDenoiser(lambda x, number, cond: x, RectifiedFlow(), "flow"))
    for pipe in (tiny.sd_pipeline(), tiny.sd3_pipeline()):
        with pytest.raises(ValueError, match="is told one time, and this method needs one that is told a second"):
            wrap_pipeline(pipe).few_step("jump", 4)
