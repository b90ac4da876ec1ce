"""Which cells DDPO trains on, from which noise, with which credit, and which settings it refuses."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from methods import PROMPTS, Off, batch, toy
from policies import method_on, seeded

from tropism.base import Prompts
from tropism.credit import group_relative, group_relative_global, per_prompt
from tropism.methods import dance_grpo, ddpo, flow_grpo
from tropism.methods.ddpo import score_function
from tropism.samplers import DDIM, FlowSDE
from tropism.train import train
from tropism.transitions import Gaussian


def test_images_of_a_group_start_from_one_noise_or_each_from_its_own():
    prompts = batch(3)
    for same in (True, False):
        method = dance_grpo.Settings(inference_steps=3, same_noise=same).build(toy("flow"), Off(), seeded())
        first = method.rollout(prompts).xs[:, 0].reshape(8, 3, 2)
        assert bool((first[:, :1] == first).all()) == same
        assert len(first[:, 0].unique(dim=0)) == 8
        ends = method.rollout(prompts).xs[:, -1]
        assert len(ends.unique(dim=0)) == 24


def test_move_fraction_and_the_last_move():
    """0.6 of Flow-GRPO's 9 trained moves is 6 (rounded up) of each image, the last move never among them."""
    settings = flow_grpo.Settings(inference_steps=10, move_fraction=0.6, updates=3, minibatch=50)
    method = settings.build(toy("flow"), Off(), seeded())
    prompts = batch(4)
    cells = [cells for minibatches in method.experience(prompts) for cells in minibatches]
    s = torch.cat([cells.s for cells in cells])
    assert len(s) == 32 * 6 and s.min() > 0
    places = {(*x.tolist(), t) for part in cells for x, t in zip(part.x, part.t.tolist(), strict=True)}
    assert len(places) == 32 * 6 and max(len(part.s) for part in cells) == 50


def test_noise_until_trains_the_early_moves_and_weighting_counts_them_by_their_noise():
    model = toy()
    method = method_on(model, noise_until=0.5, noise_weighting=True)
    (minibatches,) = method.experience(batch(2))
    (cells,) = minibatches
    assert cells.t.min() > 0.5 and len(cells.t.unique()) == int((model.grid(10)[:-1] > 0.5).sum())
    law, _ = DDIM(1.0)(method.policy.denoiser, cells.x, cells.t, cells.s, cells.cond)
    weighted = dataclasses.replace(cells, advantage=cells.advantage * law.std)
    assert law.std.unique().numel() > 1
    total = method.loss(cells).total
    method.noise_weighting = False
    torch.testing.assert_close(total, method.loss(weighted).total, rtol=1e-6, atol=0)
    assert not torch.isclose(total, method.loss(cells).total)


def test_weighting_by_noise_needs_a_noise():
    method = method_on(toy(), noise_weighting=True)
    (minibatches,) = method.experience(batch(1))
    (cells,) = minibatches

    def kernel(denoiser, x, t, s, cond):
        law, prediction = DDIM(1.0)(denoiser, x, t, s, cond)
        return Gaussian(law.mean, law.std[:, None]), prediction

    method.policy = method.policy.with_(kernel=kernel)
    with pytest.raises(TypeError, match="one std a row; got Gaussian"):
        method.loss(cells)


def test_an_epoch_has_every_cell_once_in_as_many_updates_as_asked_even_when_there_are_few_cells():
    method = method_on(toy(), updates=4, inner_epochs=2, minibatch=5)
    sizes = [[len(cells.s) for cells in minibatches] for minibatches in method.experience(batch(1))]
    assert [sum(part) for part in sizes] == [18] * 8 and all(part == [5, 5, 5, 3] for part in sizes)
    method = method_on(toy(), updates=4, inference_steps=2)
    prompts = Prompts(PROMPTS[:3], torch.arange(3), {"missing": [False, False, True]})
    assert [[len(cells.s) for cells in part] for part in method.experience(prompts)] == [[1], [1], [], []]


def test_a_batch_with_fewer_cells_than_updates_makes_the_updates_it_can():
    model, seen = toy(), []
    method = method_on(model, updates=4, inference_steps=2)
    prompts = Prompts(PROMPTS[:3], torch.arange(3), {"missing": [False, False, True]})
    train(method, [prompts], torch.optim.SGD(model.parameters(), lr=1e-3), steps=1, hooks=[seen.append])
    assert seen[0].metrics["updates"] == 2


def test_advantages_are_clamped_and_come_from_the_credit():
    method = method_on(toy())
    method.credit = lambda prompts, reward, group: torch.arange(8.0) - 7
    rollout = method.rollout(batch(1))
    assert rollout.advantage.tolist() == [-5, -5, -5, -4, -3, -2, -1, 0]
    (minibatches,) = method.experience(batch(1))
    assert sum(len(cells.s) for cells in minibatches) == 7 * 9


def test_credit_is_against_the_group_the_batch_or_the_history_of_the_prompt():
    prompts, group = ["a", "a", "b", "b"], torch.tensor([0, 0, 1, 1])
    reward = torch.tensor([1.0, 3.0, 10.0, 20.0])
    torch.testing.assert_close(
        group_relative(prompts, reward, group), torch.tensor([-1.0, 1, -1, 1]), rtol=0, atol=2e-4
    )
    wanted = torch.tensor([-1.0, 1, -5, 5]) / reward.std(correction=0)
    torch.testing.assert_close(group_relative_global(prompts, reward, group), wanted, rtol=1e-4, atol=0)
    credit = per_prompt(buffer=4, min_count=3)
    batchwise = (reward - reward.mean()) / reward.std(correction=0)
    torch.testing.assert_close(credit(prompts, reward, group), batchwise, rtol=1e-5, atol=0)  # two scores a prompt: few
    history = torch.tensor([1.0, 3.0, 5.0, 7.0])
    wanted = (history[2:] - 4) / history.std(correction=0)
    torch.testing.assert_close(credit(["a", "a"], history[2:], group[:2]), wanted, rtol=1e-5, atol=0)


def test_settings_build_the_published_methods():
    flow, eps = toy("flow"), toy("eps")
    plain = ddpo.Settings().build(eps, Off(), seeded())
    assert plain.policy.kernel == DDIM(1.0) and plain.credit.stats.buffer == 32 and not plain.skip_last
    on_flow = ddpo.Settings().build(flow, Off(), seeded())
    assert on_flow.policy.kernel == FlowSDE(0.7) and on_flow.skip_last
    grpo = flow_grpo.Settings().build(flow, Off(), seeded())
    assert grpo.policy.detach_null and grpo.credit is group_relative_global and grpo.policy.kernel == FlowSDE(0.7)
    dance = dance_grpo.Settings().build(eps, Off(), seeded())
    assert dance.same_noise and dance.move_fraction == 0.6 and dance.credit is group_relative
    assert ddpo.Settings(clip=0.0, updates=1).build(eps, Off(), seeded()).objective is score_function
    assert (
        plain.policy.guidance == 2.0
        and ddpo.Settings(guidance_scale=1.5).build(eps, Off(), seeded()).policy.guidance == 1.5
    )


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (ddpo.Settings(eta=0.0), "eta is 0.0; wanted above 0"),
        (ddpo.Settings(clip=0.0), "updates is 2 and inner_epochs 1; wanted 1 of each with clip 0"),
        (ddpo.Settings(clip=-1.0), "clip is -1.0"),
        (ddpo.Settings(min_count=40), "min_count is 40; wanted 1 to buffer, which is 32"),
        (ddpo.Settings(updates=0), "updates 0; wanted at least 1"),
        (ddpo.Settings(move_fraction=0.0), "move_fraction is 0.0"),
        (ddpo.Settings(minibatch=0), "minibatch is 0"),
        (ddpo.Settings(learning_rate=2.0), "learning_rate is 2.0"),
        (ddpo.Settings(weight_decay=-1.0), "weight_decay is -1.0"),
        (ddpo.Settings(guidance_scale=-1.0), "guidance_scale is -1.0"),
        (ddpo.Settings(explore_weights=(2.0, 1.0)), "explore_weights is 2.0 1.0; wanted two numbers"),
        (ddpo.Settings(explore_until=1.5), "explore_until is 1.5; wanted a number from 0 to 1"),
        (ddpo.Settings(noise_until=1.0), "noise_until is 1.0; wanted 0 to below 1"),
        (flow_grpo.Settings(noise_level=0.0), "noise_level is 0.0"),
        (flow_grpo.Settings(images_per_prompt=1), "images_per_prompt is 1; wanted at least 2 with group_relative"),
        (dance_grpo.Settings(eta=0.0), "eta is 0.0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_that_make_no_sense_are_refused_by_name(settings, says):
    with pytest.raises(ValueError, match=says):
        settings.check()
