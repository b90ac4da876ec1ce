"""Held-out rewards, the best checkpoint and early stopping: in arithmetic, in runs, and in runs that are resumed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from small_run import refused, said, small_place, train_words

from tropism.best import Best, EnoughSeen
from tropism.catalog import RewardSpec, check_held_out, check_rewards
from tropism.checkpoint import OLD, tidy
from tropism.config import BadInput
from tropism.plan import check_best_by

SCRIPTED = """
calls = 0

def scripted(images):
    "What each evaluation says, in turn, after two tries with noise."
    global calls
    calls += 1
    told = [0, 0, 0.5, 0.6, 0.7, 0.65, 0.4, 0.6, 0.1, 0.1, 0.1]
    return [told[calls - 1] + 1e-3 * i for i in range(len(images))]
"""


@pytest.fixture
def place(tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(small_place(tiny_sd, tmp_path))
    return tmp_path


def rows(run: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if "second" not in name} for row in found]


def watched(**changes: Any) -> list[str]:
    """A run whose held-out reward says what it was told to; each by a module of its own."""
    name = f"told_{changes['out']}"
    Path(f"{name}.py").write_text(SCRIPTED)
    return train_words(eval_reward=f"./{name}.py:scripted", steps="7", **changes)


def test_best_is_strictly_better_and_missing_values_are_not() -> None:
    best = Best("eval_x", 1.0)
    seen = [best.see(step, value) for step, value in enumerate([1.0, math.nan, 1.5, 1.5, 1.4], 1)]
    assert seen == [False, False, True, False, False]
    assert (best.value, best.step, best.since) == (1.5, 3, 2)
    assert Best.from_state(json.loads(json.dumps(best.state_dict()))) == best
    best.check(0, 5)
    best.check(3, 5)
    with pytest.raises(EnoughSeen, match=r"after step 5: in 2 evaluations eval_x .* than the 1.5 of step 3"):
        best.check(2, 5)
    first = Best("eval_x")
    restored = Best.from_state(json.loads(json.dumps(first.state_dict())))
    assert math.isnan(restored.value) and restored.see(1, -3.0) and not restored.see(2, math.nan)


def test_who_is_held_out_and_who_says_which_is_best() -> None:
    def found(reward: list[str], eval_reward: list[str], model: str = "scenes", best: str | None = None) -> Any:
        held = check_held_out(eval_reward, reward, model)
        return [spec.text for spec in held], check_best_by(best, check_rewards(reward), held)

    assert found(["brightness"], []) == (["scenes"], "scenes")
    assert found(["scenes"], []) == ([], "reward")
    assert found(["brightness", "scenes=0"], []) == ([], "scenes")
    assert found(["brightness"], [], "folder") == ([], "reward")
    assert found(["brightness"], ["contrast", "saturation"]) == (["contrast", "saturation"], "contrast")
    assert found(["brightness"], ["contrast"], best="brightness") == (["contrast"], "brightness")
    assert all(spec.weight == 0 for spec in check_held_out(["contrast"], ["brightness"], "folder"))
    with pytest.raises(BadInput, match="best_by is contrats, which is not evaluated; did you mean"):
        found(["brightness"], ["contrast"], best="contrats")
    with pytest.raises(BadInput, match="a reward is called kl, as an entry of the metrics is"):
        check_best_by(None, check_rewards(["brightness"]), [RewardSpec("x:kl", "kl", "x", 0.0, False)])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"eval_reward": "contrast=2"}, "eval_reward is contrast=2; wanted it without a weight"),
        (
            {"eval_reward": "brightness"},
            "eval_reward has brightness, which reward has too; wanted what is not trained on",
        ),
        ({"eval_reward": ["contrast", "contrast"]}, "reward contrast is given twice"),
        ({"eval_reward": "contrats"}, "there is no reward 'contrats'; did you mean contrast?"),
        ({"best_by": "contrast"}, "best_by is contrast, which is not evaluated; wanted one of reward, brightness"),
        ({"patience": "-1"}, "patience is -1; wanted 0 or more"),
    ],
)
def test_wrong_settings_are_one_sentence(
    changes: dict[str, Any], sentence: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in refused(train_words(**changes), capsys)


def test_held_out_rewards_change_nothing_but_what_is_said(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Patience ends the run; the best checkpoint outlives the last two, and training is what it would have been."""
    result = said(watched(out="watched", patience="3"), capsys)
    assert result.code == 0, result
    assert "stopping after step 5: in 3 evaluations eval_scripted has not been better than the 0.701" in result.out
    assert [round(row["eval_scripted"], 3) for row in rows("watched")] == [0.501, 0.601, 0.701, 0.651, 0.401, 0.601]
    assert [row.get("best_step") for row in rows("watched")] == [None, 1, 2, 2, 2, 2]
    assert rows("watched")[2]["eval_scripted_gain"] == pytest.approx(0.2)
    assert [rows("watched")[0][f"eval_{name}_weight"] for name in ("brightness", "scripted")] == [1, 0]
    names = sorted(path.name for path in Path("watched/checkpoints").iterdir())
    assert names == ["best", "step-000004", "step-000005"]
    state = json.loads(Path("watched/checkpoints/best/state.json").read_text())
    assert (state["step"], state["run"]["best"]["step"]) == (2, 2)
    assert "after step" not in result.err and not Path("watched/error.txt").exists()

    assert said(train_words(out="alone", steps="5"), capsys).code == 0
    for mine, other in zip(rows("watched"), rows("alone"), strict=True):
        for name in ("reward_mean", "loss", "eval_reward", "eval_kl", "eval_diversity", "eval_contrast"):
            assert mine.get(name) == other.get(name), name
    saved = [load_file(Path(run, "adapter/pytorch_lora_weights.safetensors")) for run in ("watched", "alone")]
    assert all(saved[0][name].equal(saved[1][name]) for name in saved[1])
    assert rows("alone")[0]["eval_kl"] == 0 < rows("alone")[5]["eval_kl"]


def test_going_on_remembers_the_best(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From step 4, when the best was 2 steps old, to where patience ends the run that was never stopped."""
    assert said(watched(out="whole", reward="./rewards.py:bright", patience="3"), capsys).code == 0
    assert said(watched(out="parts", reward="./rewards.py:bright", patience="3"), capsys).code == 0
    Path("told_parts.py").write_text(SCRIPTED.replace("0.6, 0.7, 0.65, 0.4, 0.6", "0.6"))  # what follows step 4
    result = said(["train", "ddpo", "--resume", "parts/checkpoints/step-000004"], capsys)
    assert result.code == 0, result
    assert "stopping after step 5: in 3 evaluations" in result.out
    told = ("eval_scripted", "best_step", "step", "loss", "eval_kl")
    assert [[row.get(k) for k in told] for row in rows("parts")] == [
        [row.get(k) for k in told] for row in rows("whole")
    ]
    assert rows("parts")[:5] == rows("whole")[:5]


def test_going_on_from_the_best(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    none = said(["train", "ddpo", "--resume", "best"], capsys)
    assert none.code == 2 and "no run of ddpo in runs has a checkpoint better than the untrained model" in none.err
    assert said([*watched(out="it", patience="3"), "--out", "runs/it"], capsys).code == 0
    result = said(["train", "ddpo", "--resume", "best", "--steps", "3"], capsys)
    assert result.code == 0, result
    assert "going on after step 2 of 3" in result.out
    assert [row["step"] for row in rows("runs/it")] == [0, 1, 2, 3]
    assert sorted(path.name for path in Path("runs/it/checkpoints").iterdir()) == ["best", "step-000003"]
    drawn = ["sample", "--model", "model", "--prompt", "a fox", "--inference-steps", "2", "--out", "a.png"]
    assert said([*drawn, "--adapter", "runs/it/checkpoints/best"], capsys).code == 0


def test_an_average_is_saved_as_it_was_evaluated(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(train_words(out="run", ema="0.9", steps="1"), capsys).code == 0
    lora = "pytorch_lora_weights.safetensors"
    folders = ("adapter", "checkpoints/step-000001/adapter", "checkpoints/step-000001")
    final, averaged, raw = (load_file(Path("run", folder, lora)) for folder in folders)
    assert all(final[name].equal(averaged[name]) for name in final)
    assert not all(final[name].equal(raw[name]) for name in final)


@pytest.mark.parametrize("stage", ["half written", "old moved away", "replaced"])
def test_a_process_that_is_killed_while_it_replaces_a_checkpoint_leaves_one(stage: str, tmp_path: Path) -> None:
    best, half = tmp_path / "best", tmp_path / ".saving-x"
    for folder, text in ((best, "old"), (half / "best", "new")):
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(text)
    if stage != "half written":
        best.rename(half / OLD)
    if stage == "replaced":
        (half / "best").rename(best)
    tidy(tmp_path, 5)
    assert (best / "state.json").read_text() == ("old" if stage == "half written" else "new")
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
