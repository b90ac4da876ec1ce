"""DITTO: on a Gaussian the best noise is known, checkpoints change nothing, and the control survives the drawing."""

from __future__ import annotations

import pytest
import torch
from families import ROWS
from policies import Line
from torch import Tensor

from tropism.base import Prompts, bcast
from tropism.evaluate import deterministic
from tropism.models.toy import GaussianPolicy
from tropism.policy import Policy
from tropism.rewards import as_reward
from tropism.samplers import DDIM
from tropism.steer import steer
from tropism.steering import image_seeds, steer_policy
from tropism.steering.ditto import Settings, _end

NAMES = ["left", "right"]
MEANS = torch.tensor([[-1.0, 0.0], [1.0, 0.5]])


def toy(steps: int = 5) -> Policy:
    return Policy(GaussianPolicy(NAMES, MEANS, 0.5), DDIM(0.0), steps)


def drawn(settings: Settings, policy: Policy, seed: int = 0) -> tuple[Tensor, object]:
    found, trace = steer_policy(policy, Line(), Prompts(NAMES, torch.arange(2), {}), [settings], image_seeds(2, seed))
    return found.latents, trace


@pytest.mark.parametrize("surrogate", [0, 1])
def test_the_best_noise_of_a_given_length_is_found(surrogate: int) -> None:
    """The end of a Gaussian's chain is linear in the noise, so that noise along the reward's direction is best."""
    policy = toy()
    latents, _ = drawn(Settings(updates=400, step_size=0.05, surrogate=surrogate), policy)
    x = policy.noise(2, [torch.Generator().manual_seed(int(seed)) for seed in image_seeds(2, 0)])
    best = bcast(x.norm(dim=1), x) * Line.direction / Line.direction.norm()
    *_, last = policy.chain(best, policy.model.encode(NAMES))
    *_, plain = policy.chain(x, policy.model.encode(NAMES))
    assert torch.allclose(latents, last.x_next, atol=2e-3)
    assert bool(((latents - plain.x_next) @ Line.direction > 0.005).all())


def test_a_free_noise_leaves_its_shell() -> None:
    _, free = drawn(Settings(updates=50, hold_norm=False), toy())
    _, held = drawn(Settings(updates=50), toy())
    assert free.steps[-1]["noise_power"] > 2 * free.steps[0]["noise_power"]
    assert held.steps[-1]["noise_power"] == pytest.approx(held.steps[0]["noise_power"], rel=1e-5)
    assert len(held.steps) == 50 and held.steps[-1]["reward"] > held.steps[0]["reward"]


def test_a_move_of_a_distilled_model_is_cheaper_than_the_chain() -> None:
    _, one = drawn(Settings(updates=10, surrogate=1), toy(5))
    _, all_ = drawn(Settings(updates=10, surrogate=0), toy(5))
    assert (one.calls, one.scored) == (10 * 1 + 5, 10)
    assert all_.calls == 10 * 5 * 2 + 5  # checkpoints ask again on the way back


def test_checkpoints_change_no_gradient() -> None:
    model = ROWS["sd"].model(onednn=False)
    policy = deterministic(model, 3, 2.0)
    x, cond = policy.noise(2, torch.Generator().manual_seed(0)), model.encode(["a fox", "a hill"])
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    x.requires_grad_()
    *_, last = policy.chain(x, cond)
    (plain,) = torch.autograd.grad((last.x_next * weight).sum(), [x])
    (kept,) = torch.autograd.grad((_end(policy, x, cond) * weight).sum(), [x])
    assert plain.abs().max() > 0 and torch.allclose(plain, kept, atol=1e-6 * float(plain.abs().max()))


def test_a_pipeline_is_controlled_and_keeps_its_weights() -> None:
    def bright(images: Tensor) -> Tensor:
        return images.mean((1, 2, 3))

    model = ROWS["lcm"].model()
    model.add_lora(2, generator=torch.Generator().manual_seed(0))
    before = [parameter.clone() for parameter in model.parameters()]
    pipeline = steer(model, as_reward(bright, "bright", True), "ditto", updates=8, step_size=0.3)
    steered = pipeline(["a fox"], num_inference_steps=2, output_type="pt").images
    unsteered = steer(model, bright, [])(["a fox"], num_inference_steps=2, output_type="pt").images
    assert float(bright(steered)) > float(bright(unsteered)) + 0.001
    assert all(torch.equal(now, old) and now.grad is None for now, old in zip(model.parameters(), before, strict=True))


def test_what_cannot_be_is_one_sentence() -> None:
    with pytest.raises(TypeError, match="reward 'count' has no gradient, which this guide follows"):
        prompts = Prompts(NAMES, torch.arange(2), {})
        steer_policy(toy(), as_reward(lambda images: [0.0] * 2, "count"), prompts, [Settings()], image_seeds(2, 0))
    for wrong, sentence in ((dict(updates=0), "updates is 0"), (dict(step_size=0.0), "step_size is 0.0")):
        with pytest.raises(ValueError, match=sentence):
            Settings(**wrong).check()
