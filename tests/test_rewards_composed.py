"""Rewards made of rewards, and the verifier as a reward: values by hand, missing parts, gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tropism.base import Reward
from tropism.rewards import Hinge, Negated, RewardError, ScenesReward, Weighted, as_reward, score

NAN = float("nan")
IMAGES = torch.linspace(0.1, 0.9, 4 * 3 * 4 * 4).reshape(4, 3, 4, 4)
PROMPTS = ["a", "b", "c", "d"]


def fixed(name: str, *values: float) -> Reward:
    return as_reward(lambda images: torch.tensor(values), name=name)


def mean_of(channel: int) -> Reward:
    return as_reward(lambda images: images[:, channel].mean((1, 2)), name=f"channel{channel}", differentiable=True)


def test_weighted_sum_and_parts() -> None:
    total = Weighted([(fixed("u", 1, 2, 3, 4), 0.5), (fixed("v", 8, 0, NAN, 4), -1.0)])
    assert isinstance(total, Reward)
    assert total.name == "0.5*u + -1*v"
    assert not total.differentiable
    assert torch.equal(total(IMAGES, PROMPTS).nan_to_num(99), torch.tensor([-7.5, 1.0, 99.0, -2.0]))
    scores = score(total, IMAGES, PROMPTS)
    assert scores.info["u"].tolist() == [1, 2, 3, 4]
    assert torch.equal(total.combine(total.parts(IMAGES, PROMPTS)).nan_to_num(), scores.values.nan_to_num())


def test_normalised_by_the_batch_spread_of_the_scores_present() -> None:
    total = Weighted([(fixed("u", 0, 4, NAN, 8), 1.0), (fixed("v", 100, 300, 0, 200), 1.0)], normalise=True)
    u, v = np.array([0, 4, NAN, 8]), np.array([100, 300, 0, 200])
    wanted = u / np.nanstd(u) + v / v.std()
    np.testing.assert_allclose(total(IMAGES, PROMPTS).numpy(), wanted, rtol=1e-6)


def test_a_scale_free_sum_ignores_the_units_of_its_parts() -> None:
    def summed(unit: float) -> Tensor:
        first = as_reward(lambda images: unit * images.mean((1, 2, 3)), name="u")
        return Weighted([(first, 1.0), (fixed("v", 3, 1, 2, 5), 2.0)], normalise=True)(IMAGES, PROMPTS)

    torch.testing.assert_close(summed(1.0), summed(1000.0))


@pytest.mark.parametrize(
    "values", [(0.3, 0.3, 0.3, 0.3), (1000.0, 1000.0001, 1000.0, 1000.0), (7.0, NAN, NAN, NAN), (NAN, NAN, NAN, NAN)]
)
def test_a_part_without_spread_is_left_as_it_is(values: tuple[float, ...]) -> None:
    total = Weighted([(fixed("u", *values), 2.0)], normalise=True)(IMAGES, PROMPTS)
    torch.testing.assert_close(total, 2 * torch.tensor(values), equal_nan=True)


def test_a_part_of_weight_zero_is_logged_but_not_summed() -> None:
    total = Weighted([(mean_of(0), 1.0), (fixed("seen", NAN, 1, 1, 1), 0.0)])
    scores = score(total, IMAGES, PROMPTS)
    assert total.differentiable
    assert not scores.values.isnan().any()
    assert scores.info["seen"].isnan()[0]


def test_the_graph_goes_through_the_sum_but_not_through_the_scale() -> None:
    images = IMAGES.clone().requires_grad_()
    total = Weighted([(mean_of(0), 2.0), (mean_of(1), 3.0)], normalise=True)
    assert total.differentiable
    total(images, PROMPTS).sum().backward()
    assert images.grad is not None
    for channel, weight in [(0, 2.0), (1, 3.0), (2, 0.0)]:
        std = IMAGES[:, channel].mean((1, 2)).std(correction=0)
        torch.testing.assert_close(images.grad[:, channel], torch.full((4, 4, 4), float(weight / std / 16)))


def test_nothing_broadcasts() -> None:
    class Wide:
        name, differentiable = "wide", False

        def __call__(self, samples: Any, prompts: Sequence[str], **columns: Any) -> Tensor:
            return torch.ones(4, 1)

    with pytest.raises(RewardError, match=r"'wide' returned scores of shape \(4, 1\)"):
        Weighted([(fixed("u", 1, 2, 3, 4), 1.0), (Wide(), 1.0)])(IMAGES, PROMPTS)


def test_sums_that_make_no_sense_are_refused() -> None:
    for parts, message in [
        ([], "no rewards"),
        ([(fixed("u", 1), 1.0), (fixed("u", 2), 1.0)], "share a name"),
        ([(fixed("u", 1), NAN)], "not all finite"),
    ]:
        with pytest.raises(RewardError, match=message):
            Weighted(parts)


def test_hinge_and_negated() -> None:
    values = fixed("u", 1, 2, NAN, 3)
    torch.testing.assert_close(Hinge(values, 2)(IMAGES, PROMPTS), torch.tensor([-1.0, 0.0, NAN, 0.0]), equal_nan=True)
    torch.testing.assert_close(Negated(values)(IMAGES, PROMPTS), -torch.tensor([1, 2, NAN, 3]), equal_nan=True)
    images = IMAGES.clone().requires_grad_()
    middle = float(IMAGES[1, 0].mean()) + 1e-3
    Hinge(Negated(Negated(mean_of(0))), middle)(images, PROMPTS).sum().backward()
    assert images.grad is not None
    assert images.grad[:, 0].mean((1, 2)).gt(0).tolist() == [True, True, False, False]


# The verifier.


@dataclass
class Verdict:
    score: float
    parts: dict[str, bool]

    @property
    def passed(self) -> bool:
        return all(self.parts.values())


class Verifier:
    """Bright enough, and red enough where the caption says red; remembers what it was shown."""

    def __call__(self, images: Any, captions: Sequence[str]) -> list[Verdict]:
        self.seen = images
        return [self.judge(image, caption) for image, caption in zip(images, captions, strict=True)]

    def judge(self, image: Any, caption: str) -> Verdict:
        parts = {"bright": bool(image.mean() > 0.5)}
        if "red" in caption:
            parts["red"] = bool(image[0].mean() > image[1].mean())
        return Verdict(sum(parts.values()) / len(parts), parts)


def test_scenes_scores_passes_and_parts() -> None:
    verifier = Verifier()
    images = torch.full((3, 3, 8, 8), 0.8)
    images[1, 0] = 0.4
    images[2] = -1.5
    captions = ["plain", "a red one", "dark"]
    reward = ScenesReward(verifier)
    scores = score(reward, images.requires_grad_(), captions)
    assert isinstance(reward, Reward)
    assert not reward.differentiable
    assert scores.values.dtype == torch.float32
    assert scores.values.tolist() == [1.0, 0.5, 0.0]
    assert verifier.seen.dtype == np.float32 and verifier.seen.min() == 0.0, "pictures are clamped"
    assert scores.info["passed"].tolist() == [1.0, 0.0, 0.0]
    torch.testing.assert_close(scores.info["red"], torch.tensor([NAN, 0.0, NAN]), equal_nan=True)
    passes = ScenesReward(verifier, mode="pass")
    assert passes(images, captions).tolist() == [1.0, 0.0, 0.0]
    assert passes.name != reward.name


def test_scenes_mistakes() -> None:
    with pytest.raises(RewardError, match="choose 'score' or 'pass'"):
        ScenesReward(Verifier(), mode="other")  # type: ignore[arg-type]
    with pytest.raises(RewardError, match="gave 1 verdicts for 4 pictures"):
        ScenesReward(lambda images, captions: [Verdict(1.0, {})])(IMAGES, PROMPTS)

    def confused(images: Any, captions: Sequence[str]) -> list[Verdict]:
        raise LookupError("no such caption\nand more")

    with pytest.raises(RewardError, match=r"raised LookupError: no such caption$"):
        ScenesReward(confused)(IMAGES, PROMPTS)
    with pytest.raises(RewardError, match=r"wanted images \(B, 3, H, W\)"):
        ScenesReward(Verifier())(IMAGES[0], PROMPTS)
