"""What is wrong with a run is named before it starts, and nothing else is."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_run import FLOW, HOPS, OWN_NETWORK, said, small_place, train_words

from tropism import catalog
from tropism.methods.ddpo import DDPO
from tropism.models.adapters import Lora

REWARDS = """
import random

def chance(images):
    return [random.random() for _ in images]

def late(images):
    if images.std() < 0.28:  # noise is a uniform 0.289; pictures of the model are not
        raise KeyError("no such picture")
    return images.mean((1, 2, 3))

def unsure(images):
    return [None if images.std() < 0.28 else 1.0 + i for i in range(len(images))]

def rounded(images):
    return images.mean((1, 2, 3)).mul(0.001).round()
"""


@pytest.fixture
def place(tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(small_place(tiny_sd, tmp_path))
    Path("more.py").write_text(REWARDS)
    return tmp_path


def doctor(capsys: pytest.CaptureFixture[str], method: str = "ddpo", **changes: Any) -> tuple[int, dict[str, str], str]:
    """(exit code, what each row says, the error)."""
    before = {path for path in Path().rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    result = said(["doctor", *train_words(method, **changes)[1:]], capsys)
    assert {path for path in Path().rglob("*") if path.is_file() and "__pycache__" not in path.parts} == before
    assert "Traceback" not in result.out + result.err
    rows: dict[str, str] = {}
    for line in result.out.splitlines():
        if line[:5].strip() in ("ok", "warn", "fail"):
            name = line.split()[1]
            rows[name] = line
        elif line.startswith(" ") and rows:
            rows[name] += " " + line.strip()
    return result.code, rows, result.err


@pytest.mark.parametrize("method", sorted(set(catalog.method_names()) - OWN_NETWORK))
def test_a_correct_run_is_not_blamed(
    method: str, tiny_sd: Path, tiny_sd3: Path, tiny_lcm: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    model = tiny_sd3 if method in FLOW else tiny_lcm if method in HOPS else tiny_sd
    monkeypatch.chdir(small_place(model, tmp_path))
    code, rows, error = doctor(capsys, method, eval_prompts="prompts.txt")
    assert code == 0 and not error, (rows, error)
    assert not [row for row in rows.values() if row.startswith("fail")]
    assert set(rows) == {
        *("settings", "geometry", "prompts", "pictures", "reward", "reference", "advantages", "update", "saving"),
        *("memory", "time"),
    }
    assert "2 prompts x 2 images = 4 images a step, each of 3 moves" in rows["geometry"]
    assert rows["prompts"].startswith("warn") and "3 of these in both" in rows["prompts"]
    if method in ("flow-grpo", "dance-grpo"):
        assert "sums of groups" in rows["advantages"]


def fill(part: str, value: float) -> Callable[[Path, pytest.MonkeyPatch], None]:
    """All weights of a part of the model are that number."""

    def change(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (file,) = (place / "model" / part).glob("*.safetensors")
        save_file({name: torch.full_like(weight, value) for name, weight in load_file(file).items()}, file)

    return change


def off_by(field: str, much: float) -> Callable[[Path, pytest.MonkeyPatch], None]:
    """A field of every rollout is off by so much."""

    def change(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        plain = DDPO.rollout

        def rollout(method: DDPO, batch: Any) -> Any:
            found = plain(method, batch)
            return replace(found, **{field: getattr(found, field) + much})

        monkeypatch.setattr(DDPO, "rollout", rollout)

    return change


def moving_reference(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter stays on where it should be off."""
    from contextlib import nullcontext

    monkeypatch.setattr(Lora, "reference", lambda adapter: nullcontext())


def small_disk(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1000))


def small_memory(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tropism.doctor.free_mib", lambda device: -10_000.0)


def wrong_loading(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lora, "load", lambda adapter, folder: None)


def nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pass


@pytest.mark.parametrize(
    ("spoil", "changes", "row", "sentence"),
    [
        (nothing, {"reward": "bright"}, "set-up", "there is no reward 'bright'"),
        (nothing, {"prompts": "none.txt"}, "set-up", "none.txt"),
        (nothing, {"model": "elsewhere/"}, "set-up", "there is no model"),
        (nothing, {"resume": "latest"}, "set-up", "the doctor looks at runs that have not begun"),
        (nothing, {"lora_targets": "nowhere"}, "set-up", "nowhere"),
        (nothing, {"reward": "./rewards.py:silent"}, "set-up", "silent"),
        (nothing, {"reward": "./more.py:late"}, "reward", "raised KeyError: 'no such picture'"),
        (nothing, {"reward": "./more.py:unsure"}, "reward", "no score"),
        (nothing, {"reward": "./more.py:rounded"}, "update", "nothing to learn from"),
        (nothing, {"learning_rate": "1e-30"}, "update", "nothing was learnt"),
        (fill("vae", 0.0), {}, "pictures", "2 of 2 are black or of one colour"),
        (fill("vae", math.nan), {}, "pictures", "not finite"),
        (fill("unet", math.nan), {}, "pictures", "not finite"),
        (off_by("log_prob", 10), {}, "update", "the log-ratio to the acting policy is"),
        (off_by("advantage", 0.5), {"group_relative": ""}, "advantages", "sums of groups at most 1.0e+00"),
        (moving_reference, {}, "update", "the reference moved as well"),
        (small_disk, {}, "saving", "MiB of 0 free"),
        (small_memory, {}, "memory", "in backward; lower it by minibatch"),
        (wrong_loading, {}, "saving", "answers otherwise than what was saved"),
    ],
)
def test_what_is_broken_is_named(
    spoil: Callable[[Path, pytest.MonkeyPatch], None],
    changes: dict[str, str],
    row: str,
    sentence: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(place, monkeypatch)
    code, rows, error = doctor(capsys, **changes)
    assert code == 1 and "checks failed" in error and row in error, (rows, error)
    assert rows[row].startswith("fail") and sentence in rows[row]


def test_alignprop_without_a_gradient(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, rows, _ = doctor(capsys, "alignprop", reward="jpeg_compressibility")
    assert code == 1 and "has no gradient" in rows["set-up"]


def test_what_is_only_odd_is_noted(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, rows, _ = doctor(capsys, reward="./more.py:chance", save_every="0", eval_every="0", steps="10000000")
    assert code == 0, rows
    assert rows["reward"].startswith("warn") and "others when asked again" in rows["reward"]
    assert rows["time"].startswith("warn") and "save_every is 0" in rows["time"]
    assert abs(float(rows["update"].split("ratio 1 ")[1].split()[0])) < 1e-4
