"""What a callable may return, what becomes of its graph, and one sentence for every mistake."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tropism.rewards import RewardError, ScoredReward, as_reward, check_scores, statistics

IMAGES = torch.linspace(0, 1, 3 * 3 * 4 * 4).reshape(3, 3, 4, 4)
PROMPTS = ["a fox", "a cube", "a fox"]
MEANS = IMAGES.mean((1, 2, 3))
COLUMNS = {"answer": [1, 2, 3], "source": ["x", "y", "z"]}


def returning(result: Any) -> ScoredReward:
    reward = as_reward(lambda images: result, name="fixed")
    assert isinstance(reward, ScoredReward)
    return reward


RESULTS: list[Any] = [
    [0.0, 1, True], (0.0, 1.0, 1.0), np.array([0, 1, 1]), np.array([0, 1, 1], dtype=np.float16),
    np.array([False, True, True]), torch.tensor([0, 1, 1], dtype=torch.uint8), torch.tensor([0, 1, 1]).bfloat16(),
    torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64), [torch.tensor(0), torch.tensor(1.0), 1],
    [np.float32(0), np.int64(1), np.array(1.0)], (value for value in (0, 1, 1)), ([0, 1, 1], {}), ([0, 1, 1], None),
    np.array([0, 1, 1], dtype=object),
]  # fmt: skip


@pytest.mark.parametrize("result", RESULTS, ids=lambda r: type(r).__name__)
def test_every_kind_of_result(result: Any) -> None:
    values = returning(result)(IMAGES, PROMPTS)
    assert values.dtype == torch.float32
    assert values.shape == (3,)
    assert values.tolist() == [0.0, 1.0, 1.0]


@given(st.lists(st.one_of(st.none(), st.floats(-1e30, 1e30)), min_size=1, max_size=6))
def test_list_array_and_tensor_agree(scores: list[float | None]) -> None:
    images, prompts = torch.zeros(len(scores), 3, 2, 2), [""] * len(scores)
    floats = [float("nan") if value is None else value for value in scores]
    kinds = [scores, np.array(scores, dtype=object), np.array(floats), torch.tensor(floats, dtype=torch.float64)]
    values = [returning(kind)(images, prompts) for kind in kinds]
    assert all(torch.equal(value.isnan(), values[0].isnan()) for value in values)
    assert all(torch.equal(value.nan_to_num(), values[0].nan_to_num()) for value in values)
    assert values[0].isnan().tolist() == [value is None for value in scores]


def test_one_number_is_for_one_sample() -> None:
    assert returning(0.5)(IMAGES[:1], ["p"]).tolist() == [0.5]
    assert returning(torch.tensor(0.5))(IMAGES[:1], ["p"]).tolist() == [0.5]
    with pytest.raises(RewardError, match=r"shape \(\); wanted \(3,\)"):
        returning(0.5)(IMAGES, PROMPTS)


def test_two_scores_in_a_tuple_are_not_scores_and_info() -> None:
    assert returning((0.5, 0.75))(IMAGES[:2], PROMPTS[:2]).tolist() == [0.5, 0.75]
    values = returning((0.5, None))(IMAGES[:2], PROMPTS[:2])
    assert values[0] == 0.5
    assert values[1].isnan()


# Gradients.


def test_the_graph_is_kept_only_towards_samples_that_ask() -> None:
    scale = torch.ones((), requires_grad=True)
    reward = as_reward(lambda images: scale * images.mean((1, 2, 3)))
    images = IMAGES.clone().requires_grad_()
    reward(images, PROMPTS).sum().backward()
    assert images.grad is not None
    assert torch.allclose(images.grad, torch.full_like(images, 1 / 48))
    assert not reward(IMAGES, PROMPTS).requires_grad
    with torch.no_grad():
        assert not reward(images, PROMPTS).requires_grad
    listed = as_reward(lambda images: [None, *images.mean((1, 2, 3))[1:]])(images, PROMPTS)
    assert listed.requires_grad
    assert listed.isnan().tolist() == [True, False, False]


def test_declared_and_probed() -> None:
    def means(images: Tensor) -> Tensor:
        return images.mean((1, 2, 3))

    images = IMAGES.clone().requires_grad_()
    assert not as_reward(means, differentiable=False)(images, PROMPTS).requires_grad
    assert as_reward(means, differentiable=True).differentiable
    broken = as_reward(lambda images: means(images.detach()), differentiable=True)
    with pytest.raises(RewardError, match="declared differentiable but its scores have no graph"):
        broken(images, PROMPTS)
    assert broken(IMAGES, PROMPTS).shape == (3,)
    undeclared = as_reward(means)
    assert isinstance(undeclared, ScoredReward)
    assert not undeclared.differentiable
    assert undeclared.probed(IMAGES, PROMPTS).differentiable
    assert not returning([1, 2, 3]).probed(IMAGES, PROMPTS).differentiable
    assert not IMAGES.requires_grad


# Mistakes.


def raising(images: Tensor) -> None:
    raise KeyError("colour")


MISTAKES: list[tuple[Any, str]] = [
    (raising, "reward 'raising' raised KeyError: 'colour'"),
    (lambda images: [1, 2], r"shape \(2,\); wanted \(3,\)"),
    (lambda images: torch.ones(3, 1), r"shape \(3, 1\); wanted \(3,\)"),
    (lambda images: np.ones((3, 3), dtype=object), r"ndarray of shape \(3, 3\)"),
    (lambda images: None, "returned NoneType None"),
    (lambda images: "good", "returned str 'good'"),
    (lambda images: {"avg": [1, 2, 3]}, "returned dict"),
    (lambda images: [1, "good", 3], "returned str 'good' at entry 1; wanted a number or None"),
    (lambda images: [[1], [2], [3]], r"list \[1\] at entry 0"),
    (lambda images: [torch.ones(1)] * 3, r"Tensor of shape \(1,\) at entry 0"),
    (lambda images: np.array(["a", "b", "c"]), "returned str"),
    (lambda images: torch.ones(3, dtype=torch.complex64), "wanted real numbers"),
    (lambda images: [0, float("inf"), 0], "infinite score .* sample 1"),
    (lambda images: [0, 0, -(10.0**300)], "infinite score .* sample 2"),
    (lambda images: [0, 10**400, 0], "infinite score .* sample 1"),
    (lambda images, prompts, target: [1, 2, 3], r"wants 'target', .* the columns are \['answer', 'source'\]"),
]


@pytest.mark.parametrize(("function", "message"), MISTAKES)
def test_mistakes_are_one_sentence(function: Callable[..., Any], message: str) -> None:
    with pytest.raises(RewardError, match=message) as caught:
        as_reward(function)(IMAGES, PROMPTS, **COLUMNS)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_the_cause_is_chained() -> None:
    with pytest.raises(RewardError) as caught:
        as_reward(raising)(IMAGES, PROMPTS)
    assert isinstance(caught.value.__cause__, KeyError)


def test_check_scores() -> None:
    nan = float("nan")
    good = torch.tensor([1.0, nan])
    assert check_scores(good, 2) is good
    for values, message in [
        (torch.tensor([nan, nan]), "my reward gave no score for any of the 2 samples"),
        (torch.ones(2, 1), r"shape \(2, 1\)"),
        (torch.tensor([1.0, -torch.inf]), "infinite score"),
    ]:
        with pytest.raises(RewardError, match=message):
            check_scores(values, 2, "my reward")


def test_statistics() -> None:
    found = statistics(torch.tensor([1.0, float("nan"), 3.0, 8.0]))
    assert found == {"mean": 4.0, "std": pytest.approx((26 / 3) ** 0.5), "min": 1.0, "max": 8.0, "missing": 0.25}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert statistics(torch.tensor([float("nan")]))["missing"] == 1.0
