"""Evaluation at equal seeds, its intervals, and gains."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tropism.data.prompts import PromptSet
from tropism.evaluate import deterministic, draw_images, evaluate, first_images, interval, paired_gain
from tropism.models.pipelines import load_pipeline
from tropism.rewards import PixelReward, Weighted, as_reward
from tropism.samplers import DDIM, EulerODE

PROMPTS = ["a red fox", "two blue cubes", "a green hill"]


def test_images_belong_to_seed_and_place_not_to_the_batch(tiny_sd: Path) -> None:
    model = load_pipeline(tiny_sd, steps=3, guidance_scale=2.0)
    small, large = (deterministic(model, 3, microbatch=size) for size in (1, 8))
    assert small.kernel == DDIM(0.0)
    text = PROMPTS + PROMPTS[:2]
    one, many = (torch.cat(list(draw_images(policy, text, seed=3))) for policy in (small, large))
    torch.testing.assert_close(one, many, rtol=0, atol=1e-5)
    fewer = torch.cat(list(draw_images(large, text[:2], seed=3)))
    torch.testing.assert_close(fewer, many[:2], rtol=0, atol=1e-5)
    again = torch.cat(list(draw_images(large, text, seed=3)))
    assert torch.equal(again, many)
    assert not torch.equal(torch.cat(list(draw_images(large, text, seed=4))), many)


def test_flows_follow_the_ode(tiny_sd3: Path) -> None:
    model = load_pipeline(tiny_sd3, steps=3)
    policy = deterministic(model, 3)
    assert policy.kernel == EulerODE()
    assert torch.cat(list(draw_images(policy, PROMPTS[:1], 0))).shape == (1, 3, 16, 16)


def test_evaluation_scores_every_image_with_its_own_columns(tiny_sd: Path) -> None:
    model = load_pipeline(tiny_sd, steps=2, guidance_scale=1.0)
    prompts = PromptSet(PROMPTS, {"answer": [1.0, 2.0, math.nan]})
    reward = Weighted(
        [(PixelReward("brightness"), 2.0), (as_reward(lambda images, answer: answer, name="echo"), 1.0)], name="sum"
    )
    found = evaluate(deterministic(model, 2, microbatch=2), reward, first_images(prompts, 5), seed=1)
    assert found.text == [*PROMPTS, *PROMPTS[:2]]
    assert found.images.shape == (5, 3, 16, 16)
    assert found.parts["echo"].nan_to_num(-1).tolist() == [1.0, 2.0, -1.0, 1.0, 2.0]
    expected = 2 * PixelReward("brightness")(found.images, found.text) + found.parts["echo"]
    torch.testing.assert_close(found.total, expected, equal_nan=True)


def test_several_images_a_prompt() -> None:
    assert first_images(PromptSet(PROMPTS), 2, 2).text == [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]


def test_interval_covers_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(300, 40, generator=generator)
    inside = sum(found.low <= 0 <= found.high for found in map(interval, draws))
    assert 0.90 <= inside / 300 <= 0.98  # a percentile bootstrap of 40 values covers a little less than 95 %


def test_interval_leaves_missing_scores_out() -> None:
    found = interval(torch.tensor([1.0, math.nan, 3.0]))
    assert (found.mean, found.count) == (2.0, 2)
    assert 1.0 <= found.low <= found.mean <= found.high <= 3.0
    assert math.isnan(interval(torch.tensor([math.nan])).mean)


def test_gain_is_paired() -> None:
    generator = torch.Generator().manual_seed(1)
    before = 10 * torch.randn(64, generator=generator)
    after = before + 0.1 + 0.01 * torch.randn(64, generator=generator)
    gain = paired_gain(before, after)
    assert 0.09 < gain.low < gain.mean < gain.high < 0.11
    assert (gain.pairs, gain.dropped, gain.win_rate) == (64, 0, 1.0)
    assert paired_gain(before, after) == gain


def test_gain_counts_what_it_drops_and_halves_ties() -> None:
    nan = math.nan
    gain = paired_gain(torch.tensor([1.0, nan, 3.0, 4.0, 5.0]), torch.tensor([1.0, 2.0, nan, 6.0, 4.0]))
    assert (gain.pairs, gain.dropped) == (3, 2)
    assert gain.mean == pytest.approx(1 / 3)
    assert gain.win_rate == pytest.approx(0.5)
    nothing = paired_gain(torch.tensor([nan]), torch.tensor([1.0]))
    assert (nothing.pairs, nothing.dropped) == (0, 1)
    assert math.isnan(nothing.mean)


def test_gain_refuses_unpaired_scores() -> None:
    with pytest.raises(ValueError, match=r"must both be \(N,\)"):
        paired_gain(torch.zeros(2), torch.zeros(3))
