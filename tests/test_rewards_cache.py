"""Kept scores: the same bits as without, nothing scored twice, and nothing mistaken for something else."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_run import refused, said, small_place, train_words
from torch import Tensor

from tropism import catalog
from tropism.rewards import RewardError, as_reward
from tropism.rewards.cache import Cached, File, Memory
from tropism.rewards.version import version_of

IMAGES = torch.rand(6, 3, 5, 4, generator=torch.Generator().manual_seed(0))
TEXT = list("abcdef")


class Counting:
    """A reward that depends on all it is given and on its batch, and knows how often it was asked."""

    name, differentiable = "counting", True

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, samples: Tensor, prompts: Any, **columns: Any) -> Tensor:
        self.asked += len(prompts)
        extra = torch.tensor([ord(p) + sum(c) for p, *c in zip(prompts, *columns.values(), strict=True)])
        return samples.pow(3).mean((1, 2, 3)) / 3 + extra + samples.mean()


@pytest.fixture(params=["memory", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Any]:
    """Opens the same store each time."""
    memory = Memory()
    return lambda: memory if request.param == "memory" else File(tmp_path / "scores.sqlite")


def test_scores_are_the_same_bits_and_are_asked_for_once(store: Callable[[], Any]) -> None:
    plain, reward = Counting(), Counting()
    wanted = plain(IMAGES, TEXT, n=[1, 2, 3, 4, 5, 6])
    for time in range(3):
        cached = Cached(reward, "v1", store())  # as another run would
        found = cached(IMAGES, TEXT, n=[1, 2, 3, 4, 5, 6])
        assert torch.equal(found, wanted) and found.dtype == torch.float32
        assert (cached.hits, cached.misses) == ((6, 0) if time else (0, 6))
    assert reward.asked == 6


def test_a_call_with_a_new_picture_is_scored_whole(store: Callable[[], Any]) -> None:
    """So that a score that depends on its batch, if only in its last bit, is the one it would have been."""
    cached = Cached(Counting(), "v1", store())
    cached(IMAGES[:4], TEXT[:4])
    assert torch.equal(cached(IMAGES[2:], TEXT[2:]), Counting()(IMAGES[2:], TEXT[2:]))
    assert cached.hits == 0 and cached.misses == 8


@pytest.mark.parametrize(
    "change",
    [
        {"images": IMAGES[[1]]}, {"images": IMAGES[[0]].double()}, {"images": IMAGES[[0]].reshape(1, 3, 4, 5)},
        {"text": ["z"]}, {"n": [2]}, {"n": [1.5]}, {"m": [1]}, {"version": "v2"}, {"name": "other"},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_what_differs_has_another_key(change: dict[str, Any], store: Callable[[], Any]) -> None:
    def ask(reward: Counting, **changes: Any) -> int:
        given: dict[str, Any] = {"images": IMAGES[[0]], "text": ["a"], "version": "v1", "n": [1]} | changes
        reward.name = given.pop("name", "counting")
        Cached(reward, given.pop("version"), store())(given.pop("images"), given.pop("text"), **given)
        return reward.asked

    assert ask(Counting()) == 1
    assert ask(Counting()) == 0
    assert ask(Counting(), **change) == 1


def test_a_missing_score_is_asked_for_again(store: Callable[[], Any]) -> None:
    calls = list[int]()

    def unlucky(images: Tensor) -> list[float | None]:
        calls.append(len(images))
        return [None if len(calls) == 1 else 1.0, 2.0]

    cached = Cached(as_reward(unlucky), "v1", store())
    assert cached(IMAGES[:2], TEXT[:2]).isnan().tolist() == [True, False]
    assert cached(IMAGES[:2], TEXT[:2]).tolist() == [1.0, 2.0]
    assert cached(IMAGES[:2], TEXT[:2]).tolist() == [1.0, 2.0]
    assert calls == [2, 2]


def test_gradients_go_past_the_cache() -> None:
    reward = Counting()
    cached = Cached(reward, "v1")
    images = IMAGES.clone().requires_grad_()
    for _ in range(2):
        cached(images, TEXT).sum().backward()
    assert images.grad is not None and reward.asked == 12
    with torch.no_grad():
        cached(images, TEXT)
        cached(images, TEXT)
    assert reward.asked == 18
    assert cached.differentiable and not cached.concurrent and cached.name == "counting"


def test_memory_forgets_what_was_used_least_recently() -> None:
    memory = Memory(2)
    memory.put({b"a": 1.0, b"b": 2.0})
    assert memory.get([b"a"]) == [1.0]
    memory.put({b"c": 3.0})
    assert memory.get([b"b"]) is None and memory.get([b"a", b"c"]) == [1.0, 3.0]


def test_processes_share_a_file(tmp_path: Path) -> None:
    """Two at once, each writing 400 scores in 40 transactions; none is lost and none is another's."""
    code = (
        "import sys; from tropism.rewards.cache import File\n"
        "def write(path, who):\n"
        "    for part in range(40):\n"
        "        File(path).put({bytes([who, part, i]): who + part / 64 + i / 1024 for i in range(10)})\n"
    )
    path, own = tmp_path / "scores.sqlite", dict[str, Any]()
    exec(code, own)
    go = subprocess.Popen(
        [sys.executable, "-c", f"{code}print('go', flush=True)\nwrite(sys.argv[1], 1)", str(path)],
        stdout=subprocess.PIPE,
    )
    assert go.stdout is not None and go.stdout.readline() == b"go\n"
    own["write"](path, 0)
    assert go.wait(60) == 0
    keys = [(who, part, i) for who in range(2) for part in range(40) for i in range(10)]
    assert File(path).get([bytes(key) for key in keys]) == [who + part / 64 + i / 1024 for who, part, i in keys]


def test_a_file_of_another_kind_is_refused_and_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "notes.txt"
    other.write_text("not scores, and long enough to look like something" * 10)
    before = other.read_bytes()
    for path in (other, tmp_path, other / "below"):
        with pytest.raises(RewardError, match="cannot be used to keep scores") as caught:
            File(path)
        assert "\n" not in str(caught.value)
    assert other.read_bytes() == before


def test_a_file_that_breaks_on_the_way_is_one_sentence(tmp_path: Path) -> None:
    cached = Cached(Counting(), "v1", File(tmp_path / "s"))
    with sqlite3.connect(tmp_path / "s") as file:
        file.execute("DROP TABLE scores")
    with pytest.raises(RewardError, match="the scores kept for reward 'counting' cannot be used"):
        cached(IMAGES, TEXT)


# --- versions ---


def test_the_version_covers_name_code_and_weights(tmp_path: Path) -> None:
    code, weights = tmp_path / "r.py", tmp_path / "w"
    code.write_text("a = 1")
    weights.mkdir()
    (weights / "x.bin").write_bytes(b"1")
    first = version_of("r", code, weights)
    assert version_of("r", code, weights) == first and len(first) == 16
    assert version_of("s", code, weights) != first and version_of("r", code) != first
    (weights / "x.bin").rename(weights / "y.bin")
    assert version_of("r", code, weights) != first
    (weights / "y.bin").rename(weights / "x.bin")
    assert version_of("r", code, weights) == first
    code.write_text("a = 2")
    assert version_of("r", code, weights) != first


def test_the_clip_that_ships_and_another_have_different_versions(tmp_path: Path) -> None:
    (spec,) = catalog.check_rewards(["clip"])
    reward = as_reward(lambda images: [0.0])
    assert catalog.reward_version(spec, reward, "scenes") != catalog.reward_version(spec, reward, "other/model")
    assert catalog.reward_version(spec, reward, "scenes") == catalog.reward_version(spec, reward, "scenes-sd")
    (own,) = catalog.check_rewards([f"{__file__}:fixed"])
    assert own.call is not None and catalog.reward_version(own, reward, "scenes")


def fixed(images: Tensor) -> list[float]:
    return [0.0] * len(images)


# --- the commands ---


@pytest.fixture
def place(tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(small_place(tiny_sd, tmp_path))
    (tmp_path / "log.py").write_text(
        "def log(images):\n    open('asked.txt', 'a').write('.' * len(images))\n    return images.mean((1, 2, 3))\n"
    )
    return tmp_path


def asked() -> int:
    """Pictures that the reward was shown since the last time."""
    file = Path("asked.txt")
    count = len(file.read_text()) if file.exists() else 0
    file.unlink(missing_ok=True)
    return count


def test_a_run_with_kept_scores_is_bit_for_bit_the_run_without(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts, adapters = [], []
    for name, cache in (("plain", []), ("first", ["scores"]), ("again", ["scores"])):
        words = train_words(reward="./log.py:log", out=name, reward_cache=cache or None)
        assert said(words, capsys).code == 0
        counts.append(asked())
        adapters.append(load_file(Path(name) / "adapter" / "pytorch_lora_weights.safetensors"))
    assert counts[0] == counts[1] > 10
    assert counts[2] == counts[0] - 2 * 4 - 3 * 3 == 4, "only the try on noise is asked again"
    for adapter in adapters[1:]:
        assert all(torch.equal(adapter[key], value) for key, value in adapters[0].items())


def test_eval_keeps_scores_too(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", "--model", "model", "--prompts", "prompts.txt", "--reward", "./log.py:log", "--images", "3"]
    tables = [said([*words, *rest], capsys) for rest in ([], ["--reward-cache", "s"], ["--reward-cache", "s"])]
    assert [table.code for table in tables] == [0] * 3 and len({table.out for table in tables}) == 1
    assert asked() == 3 * 4 + 2 * 3


def test_a_file_that_is_no_cache_is_refused_before_anything_is_written(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(train_words(reward_cache="prompts.txt"), capsys)
    assert "prompts.txt cannot be used to keep scores (file is not a database); give a new file" in message
    assert (place / "prompts.txt").read_text().startswith("a red fox\n")
