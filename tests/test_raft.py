"""RAFT and reward-weighted regression: which images count and how much, and what is fitted to them."""

from __future__ import annotations

import math

import pytest
import torch
from methods import Off, batch, toy

from tropism.base import Prompts
from tropism.methods import raft, rwr
from tropism.methods.raft import RAFT, best_of_group, softmax_of_group
from tropism.models.toy import PROMPTS, GaussianPolicy
from tropism.policy import Policy
from tropism.samplers import DDIM, EulerODE
from tropism.schedules import add_noise

NAN = math.nan
GROUP = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 3])
REWARD = torch.tensor([1.0, 5.0, 3.0, NAN, 2.0, 2.0, 2.0, NAN, 4.0, 9.0])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def method_on(model, **fields) -> RAFT:
    policy = Policy(model, DDIM(1.0), 5)
    return RAFT(policy, Off(), **{"generator": seeded(), "weigh": best_of_group(0.5), **fields})


def minibatches(method, prompts):
    return [list(update) for update in method.experience(prompts)]


# --- weights ---


@pytest.mark.parametrize(
    ("share", "kept"),
    [(0.01, [1]), (0.34, [1]), (0.5, [1, 2]), (1.0, [0, 1, 2])],
)
def test_the_best_share_of_a_group_is_kept_where_there_is_a_choice(share, kept):
    """Group 1 is flat, group 2 has one score, group 3 one image: none of them says what is better."""
    weight = best_of_group(share)(REWARD, GROUP)
    assert weight.nonzero().flatten().tolist() == kept and set(weight.tolist()) <= {0.0, 1.0}


def test_of_equal_images_the_first_are_kept():
    weight = best_of_group(0.5)(torch.tensor([1.0, 3.0, 3.0, 3.0]), torch.zeros(4))
    assert weight.tolist() == [0, 1, 1, 0]


def test_soft_weights_are_a_softmax_times_the_size_of_the_group():
    weight = softmax_of_group(2.0)(REWARD, GROUP)
    parts = [math.exp(r / 2) for r in (1, 5, 3)]
    wanted = [3 * part / sum(parts) for part in parts]
    assert weight.tolist() == pytest.approx([*wanted, 0, 0, 0, 0, 0, 0, 0])
    assert softmax_of_group(1e-6)(REWARD, GROUP)[:4].tolist() == [0, 3, 0, 0]


@pytest.mark.parametrize(
    "call", [lambda: best_of_group(0.0), lambda: best_of_group(1.1), lambda: softmax_of_group(0.0)]
)
def test_weights_refuse_nonsense(call):
    with pytest.raises(ValueError, match=r"share must lie in \(0, 1\]|beta must be positive"):
        call()


# --- what is fitted ---


def test_the_best_images_are_fitted_each_epoch_with_fresh_times_and_noise():
    method = method_on(toy(), epochs=3, updates=2, minibatch=5)
    updates = minibatches(method, batch(4))
    assert [[len(kept.x0) for kept in update] for update in updates] == [[5, 3], [5, 3]] * 3
    epochs = [[kept for update in updates[first : first + 2] for kept in update] for first in (0, 2, 4)]
    images = [torch.cat([kept.x0 for kept in epoch]) for epoch in epochs]
    times = [torch.cat([kept.t for kept in epoch]) for epoch in epochs]
    assert all(len(part.unique(dim=0)) == 16 for part in images)
    assert all(torch.equal(part.sort(dim=0).values, images[0].sort(dim=0).values) for part in images)
    assert not torch.equal(images[0], images[1])  # another order
    assert len(torch.cat(times).unique()) == 48 and 0.001 <= torch.cat(times).min() <= torch.cat(times).max() <= 1


def test_kept_images_are_the_best_of_their_prompts():
    method, prompts = method_on(toy(), epochs=1, weigh=best_of_group(0.25), drop=0.0), batch(4)
    latents = method.policy.draw(prompts.text, seeded())
    best = Off()(latents, prompts.text).reshape(8, 4).argmax(1) + 4 * torch.arange(8)
    ((kept,),) = minibatches(method, prompts)
    order = kept.x0[:, 0].argsort()
    wanted = best[latents[best, 0].argsort()]
    assert torch.equal(kept.x0[order], latents[wanted]) and torch.equal(kept.weight, torch.ones(8))
    cond = method.policy.model.encode([prompts.text[row] for row in wanted])
    assert torch.equal(kept.cond["prompt_embeds"][order], cond["prompt_embeds"])


@pytest.mark.parametrize("target", ["eps", "flow"])
def test_the_loss_is_the_weighted_error_of_the_networks_own_target(target):
    model = toy(target)
    kernel = DDIM(1.0) if target == "eps" else EulerODE()
    method = RAFT(Policy(model, kernel, 5), Off(), softmax_of_group(0.1), epochs=1, generator=seeded())
    ((kept,),) = minibatches(method, batch(4))
    loss = method.loss(kept)
    noisy = add_noise(model.schedule, kept.x0, kept.eps, kept.t)
    with torch.no_grad():
        said = model.net(noisy, model.schedule.net_time(kept.t), kept.cond)
    wanted = kept.eps if target == "eps" else kept.eps - kept.x0
    error = (said - wanted).square().mean(1)
    assert loss.total.item() == pytest.approx(float((kept.weight * error).sum()), rel=1e-5)
    assert loss.weight.item() == pytest.approx(32, rel=1e-6)  # eight groups of four
    assert loss.metrics["denoising_error"].item() == pytest.approx(float(error.mean()), rel=1e-5)


@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_prompts_are_dropped_as_often_as_asked(drop):
    model = toy()
    method = method_on(model, drop=drop, epochs=40)
    embeds = torch.cat([kept.cond["prompt_embeds"] for update in minibatches(method, batch(4)) for kept in update])
    null, known = model.null()["prompt_embeds"][0], model.encode(PROMPTS)["prompt_embeds"]
    dropped = (embeds == null).flatten(1).all(1)
    assert len(embeds) == 640 and abs(dropped.double().mean().item() - drop) < 0.07
    assert all(any(torch.equal(row, prompt) for prompt in known) for row in embeds[~dropped][:20])


def test_the_batch_is_what_the_log_says():
    method = method_on(toy(), epochs=1)
    prompts = Prompts(PROMPTS * 2, torch.arange(8).repeat(2), {"missing": [False] * 14 + [True] * 2})
    ((kept,),) = minibatches(method, prompts)
    assert kept.info["reward_missing"] == 2 and len(kept.x0) == 6 and kept.info["reward_mean"] < 0


def test_models_without_a_network_are_refused():
    """They have no target to regress on."""
    model = GaussianPolicy(["a"], torch.zeros(1, 2))
    with pytest.raises(TypeError, match="_PolicyDenoiser has none"):
        RAFT(Policy(model, DDIM(1.0), 3), Off(), generator=seeded())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (raft.Settings(images_per_prompt=1), "images_per_prompt is 1; wanted at least 2"),
        (raft.Settings(epochs=0), "epochs is 0"),
        (raft.Settings(updates=0), "updates 0"),
        (raft.Settings(drop=1.0), "drop 1.0"),
        (raft.Settings(keep=0.0), r"share must lie in \(0, 1\]; got 0.0"),
        (rwr.Settings(beta=-1.0), "beta must be positive; got -1.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(settings, says):
    with pytest.raises(ValueError, match=says):
        settings.check()


def test_settings_build_both():
    built = raft.Settings(keep=0.25, epochs=3).build(toy(), Off(), seeded())
    assert built.epochs == 3 and built.policy.kernel == DDIM(1.0) and built.weigh(REWARD, GROUP).sum() == 1
    soft = rwr.Settings(beta=0.5).build(toy("flow"), Off(), seeded())
    assert soft.epochs == 1 and soft.policy.kernel == EulerODE() and soft.weigh(REWARD, GROUP)[:3].min() > 0
