"""``tropism reward test``: a sound reward passes, and each thing that can be wrong fails in its own row."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import said
from torch import Tensor

from tropism import catalog
from tropism.rewards import RewardError, as_reward
from tropism.rewards.trial import Row, table, try_out

IMAGES, TEXT = catalog.sample_pictures(8, 32, 0)
LATER = itertools.count()


def bright(images: Tensor) -> Tensor:
    return images.mean((1, 2, 3))


def rows_of(function: Callable[..., Any], differentiable: bool | None = None) -> dict[str, Row]:
    return {row.check: row for row in try_out(as_reward(function, differentiable=differentiable), IMAGES, TEXT)}


def test_the_samples_are_drawings_that_show_their_captions_then_noise_black_and_white() -> None:
    assert IMAGES.shape == (8, 3, 32, 32) and IMAGES.dtype == torch.float32 and len(set(TEXT)) == 8
    assert float(IMAGES.min()) == 0 and float(IMAGES.max()) == 1
    assert not IMAGES[6].any() and bool((IMAGES[7] == 1).all()) and len(IMAGES[5].unique()) > 1000
    images, text = catalog.sample_pictures(8, 64, 0)
    (scenes,) = catalog.check_rewards(["scenes"])
    scores = catalog.build_reward(scenes, "scenes", torch.device("cpu"))(images, text)
    assert scores[:5].tolist() == [1.0] * 5 and float(scores[5:].max()) < 1


def test_a_sound_reward_passes_every_row() -> None:
    rows = rows_of(bright)
    assert list(rows) == [
        "shape", "finite", "range", "tells apart", "prompts", "twice the same", "order", "batch size", "input",
        "bfloat16", "gradient", "speed",
    ]  # fmt: skip
    assert {row.verdict for row in rows.values()} == {"ok"}
    assert rows["shape"].measured == "(8,) for pictures (8, 3, 32, 32)"
    assert rows["range"].measured.startswith("0 to 1, mean ")
    assert rows["prompts"].measured == "do not matter to it"
    assert rows["gradient"].measured == "finite; 0 for 0 of 8 pictures, mean norm 0.018"  # 1 / sqrt(3 * 32 * 32)


def noisy(images: Tensor) -> Tensor:
    return bright(images) + 0.5 * next(LATER)


def from_batch(images: Tensor) -> Tensor:
    return bright(images) - bright(images).mean()


def placed(images: Tensor) -> Tensor:
    return torch.arange(len(images)).float()


def writes(images: Tensor) -> Tensor:
    return images.mul_(0.5).mean((1, 2, 3))


def flat(images: Tensor) -> list[float]:
    return [1.0] * len(images)


def nothing(images: Tensor) -> list[None]:
    return [None] * len(images)


def some_missing(images: Tensor) -> list[float | None]:
    return [None if value > 0.5 else value for value in bright(images).tolist()]


def picky(images: Tensor) -> Tensor:
    if images.dtype != torch.float32:
        raise TypeError(f"{images.dtype} is not for me")
    return bright(images)


def rooted(images: Tensor) -> Tensor:
    return images.square().sum((1, 2, 3)).sqrt()  # black: 0 / 0


def slow(images: Tensor) -> Tensor:
    time.sleep(0.02 * len(images))
    return bright(images)


def stuck(images: Tensor) -> Tensor:
    if len(images) == 1:
        raise ValueError("one is not enough")
    return bright(images)


def words(images: Tensor, prompts: Sequence[str]) -> list[float]:
    return [len(prompt) + value for prompt, value in zip(prompts, bright(images).tolist(), strict=True)]


BAD: list[tuple[Callable[..., Any], bool | None, dict[str, tuple[str, str]]]] = [
    (flat, None, {"tells apart": ("fail", "1 different scores of 8, standard deviation 0")}),
    (nothing, None, {"finite": ("fail", "8 missing"), "range": ("fail", "no score"), "tells apart": ("fail", "0 ")}),
    (some_missing, None, {"finite": ("warn", "5 finite, 3 missing, 0 infinite")}),
    (noisy, None, {"twice the same": ("fail", "differs"), "order": ("fail", ""), "batch size": ("fail", "")}),
    (from_batch, None, {"batch size": ("fail", "differs"), "order": ("ok", "equal"), "gradient": ("fail", "0 every")}),
    (placed, None, {"order": ("fail", "differs by up to 7"), "batch size": ("fail", "differs by up to 7")}),
    (writes, None, {"input": ("fail", "it writes into the pictures")}),
    (picky, None, {"bfloat16": ("warn", "torch.bfloat16 is not for me")}),
    (rooted, None, {"gradient": ("fail", "not finite for 1 of 8 pictures")}),
    (lambda images: bright(images.round()), None, {"gradient": ("fail", "0 everywhere")}),
    (lambda images: bright(images).tolist(), None, {"gradient": ("ok", "none")}),
    (lambda images: bright(images).tolist(), True, {"gradient": ("fail", "its scores have no graph")}),
    (stuck, None, {"batch size": ("fail", "one is not enough"), "speed": ("fail", "one is not enough")}),
    (words, None, {"prompts": ("ok", "of 8 scores change")}),
]  # fmt: skip


@pytest.mark.parametrize(("function", "differentiable", "wanted"), BAD)
def test_what_is_wrong_is_said_in_its_row(
    function: Callable[..., Any], differentiable: bool | None, wanted: dict[str, tuple[str, str]]
) -> None:
    rows = rows_of(function, differentiable)
    for check, (verdict, measured) in wanted.items():
        assert rows[check].verdict == verdict, rows[check]
        assert measured in rows[check].measured
        assert rows[check].remedy or verdict == "ok"
    assert {row.check for row in rows.values() if row.verdict == "fail"} <= set(wanted)


def test_a_slow_reward_is_told_to_run_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tropism.rewards.trial.SLOW", 0.01)
    row = {row.check: row for row in try_out(as_reward(slow), IMAGES[:2], TEXT[:2])}["speed"]
    assert row.verdict == "warn" and "tropism reward serve" in row.remedy
    assert 20 <= float(row.measured.split(" ms")[0]) < 200


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (lambda images: images, r"wanted \(8,\)"),
        (lambda images: 1 / 0, "raised ZeroDivisionError: division by zero"),
        (lambda images, answer: [0.0] * len(images), "wants 'answer'"),
    ],
)
def test_a_reward_that_does_not_answer_gets_one_row(function: Callable[..., Any], sentence: str) -> None:
    (row,) = try_out(as_reward(function), IMAGES, TEXT)
    assert row.check == "shape" and row.verdict == "fail" and row.remedy
    with pytest.raises(RewardError, match=sentence):
        raise RewardError(row.measured)


def test_the_table_has_a_line_a_row_and_one_for_each_remedy() -> None:
    lines = table([Row("a", "1"), Row("longer", "2", "fail", "mend it"), Row("b", "3", "ok", "not shown")]).split("\n")
    assert lines == ["ok    a       1", "fail  longer  2", "              mend it", "ok    b       3"]


# --- the command ---


def test_the_command_prints_a_table_and_its_exit_code_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "def good(images, answer):\n    return images.mean((1, 2, 3)) + 0 * sum(answer)\n"
        "def bad(images):\n    return [1.0] * len(images)\n"
    )
    Path("p.jsonl").write_text('{"prompt": "x", "answer": 1}\n{"prompt": "y", "answer": 2}\n')
    done = said(["reward", "test", "./mine.py:good", "contrast", "--images", "5", "--prompts", "p.jsonl"], capsys)
    assert done.code == 0, done
    assert done.out.count("\nok") == 24 and "./mine.py:good on 5 pictures, " in done.out
    done = said(["reward", "test", "contrast", "./mine.py:bad"], capsys)
    assert done.code == 1
    assert done.err == "tropism: 1 checks failed: tells apart of ./mine.py:bad; the table says what to do\n"
    assert "fail  tells apart" in done.out
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix) == ["mine.py", "p.jsonl"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "reward is not given"),
        (["nothing"], "there is no reward 'nothing'"),
        (["contrast", "--images", "3"], "images is 3; wanted at least 4"),
        (["contrast", "--size", "8"], "size is 8; wanted 16 to 4096"),
        (["contrast", "--seed", "-1"], "seed is -1"),
        (["contrast", "--prompts", "none.txt"], "prompts is none.txt"),
        (["contrast", "--mixed-precision", "bf16"], "there is no setting --mixed-precision"),
        (["remote"], "wanted remote:http://127.0.0.1:8000"),
    ],
)
def test_the_command_refuses(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    done = said(["reward", "test", *words], capsys)
    assert done.code == 2 and sentence in done.err and done.err.count("\n") == 1
