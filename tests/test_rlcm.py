"""RLCM is DDPO's file with another kernel, and its actions are the hops that draw noise."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from methods import Off, Row, batch, distilled, fit, toy, weights
from torch import Tensor

from tropism.credit import per_prompt
from tropism.methods import ddpo, rlcm
from tropism.methods.ddpo import DDPO, importance
from tropism.policy import Policy
from tropism.samplers import Consistency

SMALL = dict(prompts_per_step=8, images_per_prompt=4, inference_steps=4)


def learnt(settings: rlcm.Settings | ddpo.Settings) -> Tensor:
    """The weights after two batches."""
    model = distilled("eps", 4)
    fit(Row("", settings, 0.0), model, Off(), 2)
    return weights(model)


def test_it_is_ddpo_with_another_kernel_bit_by_bit() -> None:
    """DDPO put together by hand with the kernel, and the settings of DDPO, which takes that kernel for such a model."""
    by_name, by_ddpo = learnt(rlcm.Settings(**SMALL)), learnt(ddpo.Settings(**SMALL))
    model = distilled("eps", 4)

    @dataclasses.dataclass(frozen=True)
    class ByHand(ddpo.Settings):
        def build(self, model, reward, generator):
            return DDPO(
                Policy(model, Consistency(), 4), reward, per_prompt(32, 16), importance(1e-4), updates=2,
                generator=generator,
            )  # fmt: skip

    fit(Row("", ByHand(**SMALL), 0.0), model, Off(), 2)
    assert torch.equal(by_name, by_ddpo) and torch.equal(by_name, weights(model))
    assert not torch.equal(by_name, weights(distilled("eps", 4)))


def test_the_density_is_of_the_noise_that_is_added() -> None:
    """log N(x_s; alpha f(x_t, t), sigma^2), and none for the hop that shows f itself."""
    model = distilled("eps", 4)
    method = rlcm.Settings(**SMALL).build(model, Off(), torch.Generator().manual_seed(0))
    rollout = method.rollout(batch(2))
    assert rollout.mask.tolist() == [[True, True, True, False]] * 16 and not rollout.log_prob[:, -1].any()
    for k in range(3):
        t, s = (rollout.ts[place].expand(16) for place in (k, k + 1))
        with torch.no_grad():
            said = model.denoiser(rollout.xs[:, k], t, rollout.cond).x0
        alpha, sigma = float(model.schedule.alpha(s)[0]), float(model.schedule.sigma(s)[0])
        z = (rollout.xs[:, k + 1] - alpha * said) / sigma
        wanted = -0.5 * z.square().sum(1) - 2 * math.log(sigma * math.sqrt(2 * math.pi))
        torch.testing.assert_close(rollout.log_prob[:, k], wanted, rtol=1e-5, atol=1e-5)


def test_another_model_is_refused() -> None:
    for model in (toy(), toy().few_step("ode", 4)):
        with pytest.raises(ValueError, match="got NetDenoiser; wanted a consistency model, such as scenes-lcm or what"):
            rlcm.Settings().build(model, Off(), torch.Generator())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"inference_steps": 1}, "wanted at least 2"),
        ({"inference_steps": 9}, "inference_steps is 9; wanted 2 to 8 hops"),
        ({"min_count": 40}, "min_count is 40; wanted 1 to buffer, which is 32"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        rlcm.Settings(**changes).check()
