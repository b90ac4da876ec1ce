"""Quality against cost: calls are counted, not computed; scores are those of an evaluation; the files say the same."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from families import ROWS
from PIL import Image
from small_run import said, small_place

from tropism.config import BadInput
from tropism.data.prompts import PromptSet
from tropism.evaluate import deterministic, evaluate, first_images
from tropism.few_step_command import labels
from tropism.few_step_report import few_step_report
from tropism.models.latent_pipeline import LatentPipeline
from tropism.models.pipelines import load_pipeline
from tropism.rewards import Weighted, as_reward

PROMPTS = [*tiny.PROMPTS, "a green hill"]
COMMAND = ["few-steps", "--model", "model", "--reward", "brightness", "--prompts", "prompts.txt", "--images", "3"]


def bright(images: torch.Tensor) -> torch.Tensor:
    return images.mean((1, 2, 3))


def with_lora(model: LatentPipeline) -> LatentPipeline:
    model.add_lora(2, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def test_calls_scores_and_gains() -> None:
    """Guidance asks twice, a network that is told it once, a student once."""
    reward = Weighted([(as_reward(bright, "bright", True), 2.0)])
    rows = first_images(PromptSet(PROMPTS), 3)
    teacher, told = ROWS["sd3"].model(), ROWS["flux-dev"].model()
    student = with_lora(ROWS["sd3"].model()).few_step("consistency", 2)
    policies = {
        "guided": deterministic(teacher, 7, 3.0, 2),
        "unguided": deterministic(teacher, 7, 1.0, 2),
        "told": deterministic(told, 7, 3.0, 2),
        "student": deterministic(student, 2, None, 2),
    }
    points = few_step_report(policies, reward, rows, [1, 3], seed=5, rounds=1)
    assert [(point.name, point.moves) for point in points] == [(name, n) for name in policies for n in (1, 3)]
    assert [point.calls for point in points] == [2, 6, 1, 3, 1, 3, 1, 3]
    assert all(point.seconds > 0 for point in points)
    for point in points:
        alone = evaluate(policies[point.name].with_(steps=point.moves), reward, rows, 5)
        assert torch.equal(point.evaluation.total, alone.total) and point.reward.count == 3
        difference = alone.total - points[1].evaluation.total
        assert point.gain.mean == pytest.approx(float(difference.double().mean()), abs=1e-12)
    assert points[1].gain.mean == 0 and points[6].reward.mean != points[2].reward.mean


@pytest.mark.parametrize(("counts", "sentence"), [([], "0 counts"), ([60], "original_steps")])
def test_what_cannot_be_walked_is_said_before_anything_is_drawn(counts: list[int], sentence: str) -> None:
    student = with_lora(ROWS["sd"].model()).few_step("consistency", 2)
    reward = Weighted([(as_reward(lambda images: 1 / 0, "broken"), 1.0)])
    with pytest.raises(ValueError, match=sentence):
        few_step_report({"s": deterministic(student, 2)}, reward, first_images(PromptSet(PROMPTS), 2), counts)


def test_names_of_students() -> None:
    assert labels(["runs/a", "b/"]) == {"a": "runs/a", "b": "b/"}
    assert labels(["x/a", "y/a", "z/teacher"]) == {"x/a": "x/a", "y/a": "y/a", "z/teacher": "z/teacher"}
    with pytest.raises(BadInput, match="wanted another name for that folder"):
        labels(["teacher"])


@pytest.fixture(scope="module")
def place(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and a student in ``student``."""
    folder = small_place(tiny_sd3, tmp_path_factory.mktemp("few"))
    student = with_lora(load_pipeline(folder / "model")).few_step("ode", 2)
    student.save_adapter(folder / "student" / "adapter")
    return folder


@pytest.fixture(autouse=True)
def inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def test_the_command_writes_what_it_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report"
    words = ["--adapter", "student", "--counts", "2", "1", "--rounds", "1", "--shown", "1", "--out", str(out)]
    result = said([*COMMAND, *words], capsys)
    assert result.code == 0, result
    assert "note: inference_steps is 1, but this student was made for 2 moves" in result.out
    assert sorted(file.name for file in out.iterdir()) == ["chart.png", "pictures.png", "report.csv", "report.json"]
    found = json.loads((out / "report.json").read_text())
    with (out / "report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["moves"], row["calls"]) for row in rows] == [
        ("teacher", "1", "2.0"), ("teacher", "2", "4.0"), ("student", "1", "1.0"), ("student", "2", "2.0")]  # fmt: skip
    assert [float(row["reward"]) for row in rows] == [row["reward"] for row in found["rows"]]
    assert (found["reward"], found["images"], len(found["rows"][0]["scores"])) == ("brightness", 3, 3)
    head, *lines = result.out[result.out.index("model  ") :].splitlines()[:5]
    assert head.split() == ["model", "moves", "calls", "seconds", "brightness", "against", "teacher", "in", "2"]
    assert lines[3].startswith("student  2      2      ") and f"{found['rows'][3]['reward']:.3f} (" in lines[3]
    width, height = Image.open(out / "pictures.png").size
    assert width < 2 * 192 + 60 and height > 2 * 192 + 60  # two columns of counts, a row a model
    seen = {"eval": said(["eval", *COMMAND[1:], "--adapter", "student"], capsys).out}
    assert f"with the adapter {found['rows'][3]['reward']:.4g} " in seen["eval"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--counts", "0", "1"], "counts is 0 1; wanted different whole numbers of at least 1"),
        (["--counts", "2", "2"], "counts is 2 2; wanted different"),
        (["--images", "1"], "images is 1; wanted at least 2"),
        (["--rounds", "0"], "rounds is 0; wanted at least 1"),
        (["--adapter", "nowhere"], "adapter is nowhere, but there is no such folder"),
        (["--adapter", "student", "student"], "wanted each student once"),
        (["--adapter", "model/vae"], "model/vae"),
    ],
)
def test_what_is_wrong_is_one_sentence(words: list[str], sentence: str, capsys: Any) -> None:
    result = said([*COMMAND, *words], capsys)
    assert result.code == 2 and sentence in result.err and result.err.count("\n") == 1, result
    assert not Path("runs").exists()
