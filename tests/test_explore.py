"""DiffExp: the perturbation is a part of the condition, touches what it says, and is nowhere in evaluation."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from methods import PROMPTS, Off, batch, evaluate, toy

from tropism.explore import Exploration
from tropism.methods import alignprop, ddpo
from tropism.methods.settings import ExploreSettings
from tropism.models.toy import ToyTextToImage
from tropism.policy import Policy
from tropism.samplers import DDIM

MANY = list(PROMPTS) * 100


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Phrased(ToyTextToImage):
    """The toy with two more tokens that belong to no phrase: one before and one after."""

    def encode(self, prompts):
        rows = super().encode(prompts)["prompt_embeds"]
        return {"prompt_embeds": torch.nn.functional.pad(rows, (0, 0, 1, 1), value=0.3), "pooled": rows.mean(1)}

    def null(self):
        row = super().null()["prompt_embeds"]
        return {"prompt_embeds": torch.nn.functional.pad(row, (0, 0, 1, 1), value=-0.7), "pooled": row.mean(1)}

    def phrases(self, prompts):
        return torch.tensor([[-1, 0, 1, -1]]).expand(len(prompts), 4)


def phrased() -> Phrased:
    plain = toy()
    return Phrased(plain.net, plain.tokens)


# --- phrase weights ---


def test_weights_move_the_tokens_of_phrases_along_the_line_to_the_empty_prompt_and_nothing_else():
    model = phrased()
    cond, null = model.encode(MANY), model.null()["prompt_embeds"]
    got = Exploration(None, phrase_weights=(0.6, 1.4))(model, MANY, cond, seeded())
    assert set(got) == set(cond) and torch.equal(got["pooled"], cond["pooled"])
    before, after = cond["prompt_embeds"], got["prompt_embeds"]
    assert torch.equal(after[:, [0, 3]], before[:, [0, 3]])
    weight = ((after - null) * (before - null)).sum(2) / (before - null).square().sum(2)
    torch.testing.assert_close(after[:, 1:3], (null + weight[..., None] * (before - null))[:, 1:3])
    drawn = weight[:, 1:3]
    assert 0.6 <= drawn.min() < 0.61 and 1.39 < drawn.max() <= 1.4 and drawn.mean().item() == pytest.approx(1, abs=0.02)
    assert drawn.T.corrcoef()[0, 1].abs() < 0.1  # each phrase has its own draw
    assert len(drawn[::8].unique()) == len(drawn[::8].flatten())  # so has each image of a prompt


def test_tokens_of_one_phrase_share_their_weight():
    model = phrased()
    model.phrases = lambda prompts: torch.tensor([[-1, 0, 0, -1]]).expand(len(prompts), 4)
    cond, null = model.encode(PROMPTS), model.null()["prompt_embeds"]
    got = Exploration(None, phrase_weights=(0.0, 2.0))(model, PROMPTS, cond, seeded())["prompt_embeds"]
    weight = ((got - null) / (cond["prompt_embeds"] - null))[:, 1:3].mean(2)
    torch.testing.assert_close(weight[:, 0], weight[:, 1], rtol=1e-4, atol=1e-5)
    assert weight[:, 0].std() > 0.2


# --- guidance ---


def test_guidance_is_low_early_and_the_policys_own_afterwards_and_in_the_rows_left_alone():
    """The default is what the policy was told (5), which need not be the model's (2)."""
    explore = Exploration(low=1.5, until=0.4, probability=0.5)
    cond = explore(toy(), MANY, toy().encode(MANY), seeded())
    scale = explore.guidance(5.0)
    early, late = (scale(torch.full((800,), t), cond) for t in (0.41, 0.4))
    assert torch.equal(late, torch.full((800,), 5.0))
    assert set(early.tolist()) == {1.5, 5.0} and (early == 1.5).double().mean().item() == pytest.approx(0.5, abs=0.06)
    assert torch.equal(early == 1.5, ~cond["guidance_low"].isnan())


def test_rows_left_alone_sample_as_if_there_were_no_exploration():
    model, prompts = toy(), batch(4)
    explore = Exploration(low=1.0, until=0.3, phrase_weights=(0.5, 1.5), probability=0.5)
    plain = Policy(model, DDIM(1.0), 6, guidance=3.0)
    perturbed = plain.with_(guidance=explore.guidance(3.0))
    cond = model.encode(prompts.text)
    explored = explore(model, prompts.text, cond, seeded())
    x = plain.noise(32, seeded(1))
    with torch.no_grad():
        *_, expected = plain.chain(x, cond, seeded(2))
        *_, got = perturbed.chain(x, explored, seeded(2))
    alone = explored["guidance_low"].isnan()
    assert 8 < alone.sum() < 24
    assert torch.equal(got.x_next[alone], expected.x_next[alone])
    assert (got.x_next - expected.x_next)[~alone].norm(dim=1).min() > 1e-3


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_probability_is_a_share_of_rows(probability):
    model = toy()
    cond = model.encode(MANY)
    got = Exploration(1.0, 0.2, (0.5, 0.9), probability)(model, MANY, cond, seeded())
    touched = (got["prompt_embeds"] != cond["prompt_embeds"]).flatten(1).any(1)
    assert torch.equal(touched, ~got["guidance_low"].isnan()) and touched.double().mean() == probability


def test_knobs_that_are_off_do_nothing():
    model = toy()
    cond = model.encode(PROMPTS)
    assert set(Exploration(None)(model, PROMPTS, cond, seeded())) == {"prompt_embeds"}
    assert Exploration(None)(model, PROMPTS, cond, seeded())["prompt_embeds"] is cond["prompt_embeds"]
    assert Exploration(None).guidance(4.0) == 4.0
    assert ExploreSettings().exploration() is None
    assert ExploreSettings(explore_guidance=1.0).exploration() == Exploration(1.0)
    assert ExploreSettings(explore_weights=(0.8, 1.2)).exploration() == Exploration(None, phrase_weights=(0.8, 1.2))


# --- with a method around it ---

EXPLORING = dict(explore_guidance=1.0, explore_until=0.5, explore_weights=(0.5, 1.5))


def test_the_perturbation_is_in_the_rollout_and_statistics_key_on_the_prompt_as_written():
    model, prompts = toy(), batch(4)
    method = ddpo.Settings(inference_steps=5, **EXPLORING).build(model, Off(), seeded())
    rollout = method.rollout(prompts)
    assert not rollout.cond["guidance_low"].isnan().any()
    assert (rollout.cond["prompt_embeds"] != model.encode(prompts.text)["prompt_embeds"]).any(2).all()
    assert set(method.credit.stats.state_dict()["history"]) == set(PROMPTS)


def test_the_loss_evaluates_the_policy_that_acted_and_no_other():
    """The ratio is 1 with the stored perturbation, and far from 1 without either half of it."""
    model, prompts = toy(), batch(4)
    settings = ddpo.Settings(inference_steps=10, minibatch=10_000, updates=1, **EXPLORING)
    method = settings.build(model, Off(), seeded())
    ((cells,),) = (list(update) for update in method.experience(prompts))
    ratios = []
    method.objective = lambda now, acting, advantage: (ratios.append((now - acting).detach()), now)[1]
    method.loss(cells)
    assert ratios[0].abs().max() == 0
    for name, value in (
        ("guidance_low", torch.full_like(cells.cond["guidance_low"], math.nan)),
        ("prompt_embeds", cells.cond["prompt_embeds"] * 0 + model.null()["prompt_embeds"]),
    ):
        method.loss(dataclasses.replace(cells, cond={**cells.cond, name: value}, on_policy=False))
        assert (ratios[-1].abs() > 1e-4).double().mean() > 0.3


def test_reward_gradients_go_through_the_perturbed_chain():
    """The perturbed forward pass is the differentiated one: the samples differ from those without exploration."""
    seen = []

    class Seen(Off):
        def __call__(self, samples, prompts, **columns):
            seen.append(samples.detach())
            return super().__call__(samples, prompts)

    for options in ({}, EXPLORING):
        method = alignprop.Settings(inference_steps=5, minibatch=64, **options).build(toy(), Seen(), seeded())
        for update in method.experience(batch(1)):
            for draws in update:
                method.loss(draws)
                assert ("guidance_low" in draws.cond) == bool(options)
    assert (seen[0] - seen[1]).norm(dim=1).min() > 1e-3


def test_evaluation_is_not_perturbed():
    """The model is handed over as it is: default guidance, the prompt as written."""
    model, before = toy(), evaluate(toy(), Off())
    method = ddpo.Settings(inference_steps=5, **EXPLORING).build(model, Off(), seeded())
    method.rollout(batch(2))
    assert evaluate(model, Off()) == before
    assert model.guidance_scale == 2.0 and set(model.encode(PROMPTS)) == {"prompt_embeds"}


def test_an_image_is_perturbed_alike_whatever_else_is_in_the_batch():
    model, explore = toy(), Exploration(1.0, phrase_weights=(0.5, 1.5), probability=0.5)
    long, short = (explore(model, PROMPTS[:n], model.encode(PROMPTS[:n]), seeded()) for n in (8, 5))
    assert torch.equal(long["prompt_embeds"][:5], short["prompt_embeds"])
    assert torch.equal(long["guidance_low"][:5].nan_to_num(9.0), short["guidance_low"].nan_to_num(9.0))


@pytest.mark.parametrize(
    "fields",
    [dict(phrase_weights=(1.2, 0.8)), dict(phrase_weights=(-0.1, 1.0)), dict(until=1.1), dict(probability=-0.1)],
)
def test_ranges_that_make_no_sense_are_refused(fields):
    with pytest.raises(ValueError, match=r"wanted 0 <= phrase_weights\[0\] <= phrase_weights\[1\] and until"):
        Exploration(**fields)
