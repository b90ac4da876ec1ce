"""A plain callable is a reward: whatever its signature, it gets the arguments that it names."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tropism.base import Reward
from tropism.rewards import RewardError, as_reward, score

IMAGES = torch.linspace(0, 1, 3 * 3 * 4 * 4).reshape(3, 3, 4, 4)
PROMPTS = ["a fox", "a cube", "a fox"]
MEANS = IMAGES.mean((1, 2, 3))
COLUMNS = {"answer": [1, 2, 3], "source": ["x", "y", "z"]}


# Signatures. Each row checks its own arguments, so that a wrong binding fails whatever it returns.


def ddpo(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Any:
    assert images is IMAGES
    assert prompts == PROMPTS
    assert metadata[1] == {"answer": 2, "source": "y"}
    assert len(metadata) == 3
    return np.array([1, 2, 3]), {"note": "from ddpo"}


def ddpo_other_words(x: Tensor, p: list[str], meta: list[dict[str, Any]], strict: bool = True) -> Any:
    assert x is IMAGES
    assert p == PROMPTS
    assert meta[0]["answer"] == 1
    assert strict is True
    return np.array([1, 2, 3]), {}


def ddpo_unused(images: Tensor, _: Any, __: Any) -> Any:
    assert images is IMAGES
    assert _ == PROMPTS
    assert __[2]["source"] == "z"
    return [1, 2, 3]


def grpo(prompts: list[str], completions: Tensor, answer: list[int], **columns: Any) -> list[float]:
    assert prompts == PROMPTS
    assert completions is IMAGES
    assert answer == [1, 2, 3]
    assert columns == {"answer": [1, 2, 3], "source": ["x", "y", "z"]} or columns == {"source": ["x", "y", "z"]}
    return [1.0, 2.0, 3.0]


def grpo_completions_first(completions: Tensor, answer: list[int], **kwargs: Any) -> list[int]:
    assert completions is IMAGES
    assert kwargs["prompts"] == PROMPTS
    assert "images" not in kwargs
    return answer


def grpo_all_keywords(**kwargs: Any) -> list[int]:
    assert kwargs["completions"] is kwargs["samples"] is kwargs["images"] is IMAGES
    assert kwargs["prompts"] == PROMPTS
    result: list[int] = kwargs["answer"]
    return result


async def grpo_async(prompts: list[str], images: Tensor, **columns: Any) -> list[int]:
    await asyncio.sleep(0)
    assert images is IMAGES
    assert prompts == PROMPTS
    return list(columns["answer"])


def prompts_first(prompt: list[str], image: Tensor, /, *, answer: list[int]) -> list[int]:
    assert prompt == PROMPTS
    assert image is IMAGES
    return answer


def images_and_column(images: Tensor, answer: list[int], scale: float = 1.0) -> list[float]:
    assert images is IMAGES
    assert scale == 1.0
    return [scale * value for value in answer]


def house_style(samples: Tensor, prompts: list[str], **columns: Any) -> list[int]:
    assert samples is IMAGES
    assert prompts == PROMPTS
    assert set(columns) == {"answer", "source"}
    return list(columns["answer"])


class Judge:
    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        assert images is IMAGES
        assert prompts == PROMPTS
        return torch.tensor([1, 2, 3])


class Head(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        assert images is IMAGES
        return torch.tensor([1.0, 2.0, 3.0])


def with_factor(images: Tensor, factor: float) -> list[float]:
    return [factor, 2 * factor, 3 * factor]


SHAPES: list[Callable[..., Any]] = [
    ddpo, ddpo_other_words, ddpo_unused, grpo, grpo_completions_first, grpo_all_keywords, grpo_async, prompts_first,
    images_and_column, house_style, Judge(), Head(), functools.partial(with_factor, factor=1.0),
    lambda x: [1, 2, 3], lambda images, prompts: (1.0, 2.0, 3.0),
]  # fmt: skip


@pytest.mark.parametrize("function", SHAPES, ids=lambda f: getattr(f, "__name__", type(f).__name__))
def test_every_signature_gets_its_arguments(function: Callable[..., Any]) -> None:
    reward = as_reward(function)
    assert isinstance(reward, Reward)
    values = reward(IMAGES, PROMPTS, **COLUMNS)
    assert values.dtype == torch.float32
    assert values.tolist() == [1.0, 2.0, 3.0]


def test_names() -> None:
    wanted = ["ddpo", "Judge", "with_factor", "Head"]
    functions: list[Callable[..., Any]] = [ddpo, Judge(), functools.partial(with_factor, factor=2.0), Head()]
    assert [as_reward(function).name for function in functions] == wanted
    assert as_reward(ddpo, name="mine").name == "mine"
    reward = as_reward(ddpo)
    assert as_reward(reward) is reward


def test_text_samples_and_no_columns() -> None:
    reward = as_reward(
        lambda completions, metadata: [len(text) + len(row) for text, row in zip(completions, metadata, strict=True)]
    )
    assert reward(["a", "bb"], ["p", "q"]).tolist() == [1.0, 2.0]


def test_a_column_beats_a_looser_name() -> None:
    reward = as_reward(lambda images, caption: [len(text) for text in caption])
    assert reward(IMAGES, PROMPTS).tolist() == [5.0, 6.0, 5.0]
    assert reward(IMAGES, PROMPTS, caption=["", "a", "bb"]).tolist() == [0.0, 1.0, 2.0]


def test_a_metadata_column_beats_the_made_one() -> None:
    reward = as_reward(lambda prompts, completions, metadata: metadata)
    assert reward(["a", "b"], ["p", "q"], metadata=[5, 6]).tolist() == [5.0, 6.0]


def test_async_works_inside_a_running_loop_and_keeps_the_gradient_mode() -> None:
    modes: list[bool] = []

    async def slow(images: Tensor) -> Tensor:
        await asyncio.sleep(0)
        modes.append(torch.is_grad_enabled())
        return images.mean((1, 2, 3))

    async def notebook() -> Tensor:
        return as_reward(slow)(IMAGES.clone().requires_grad_(), PROMPTS)

    assert asyncio.run(notebook()).requires_grad
    with torch.no_grad():
        assert not asyncio.run(notebook()).requires_grad
    assert modes == [True, False]


def test_info_comes_with_the_scores_and_is_not_kept() -> None:
    reward = as_reward(ddpo)
    assert score(reward, IMAGES, PROMPTS, **COLUMNS).info == {"note": "from ddpo"}
    assert "info" not in "".join(vars(reward))


def test_lengths_of_the_inputs_are_checked() -> None:
    with pytest.raises(RewardError, match="got 3 values as samples for 2 prompts"):
        as_reward(lambda images: [1, 2])(IMAGES, PROMPTS[:2])
    with pytest.raises(RewardError, match="got 1 values as column 'answer' for 3 prompts"):
        as_reward(grpo)(IMAGES, PROMPTS, answer=[1])


def test_signatures_that_say_nothing_are_refused() -> None:
    for function, message in [
        (lambda *args, **kwargs: [1], "name its inputs"),
        (lambda *args: [1], "name its inputs"),
        (lambda: [1], "takes no arguments"),
        (3, "is a int"),
    ]:
        with pytest.raises(RewardError, match=message):
            as_reward(function)  # type: ignore[arg-type]
