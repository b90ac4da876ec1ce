"""Whole runs of ``tropism train`` on a tiny pipeline: what they leave, and what happens when they fail."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from small_run import Said, refused, said, small_place, train_words

import tropism.run
from tropism.evaluate import deterministic, draw_images
from tropism.log import Lines, Progress, clock
from tropism.methods.ddpo import DDPO
from tropism.models.pipelines import load_pipeline
from tropism.randomness import normal, row_generators, row_seeds

RUN = Path("runs") / "ddpo-model-1"
CHECKPOINT = ("pytorch_lora_weights.safetensors", "state.json", "state.safetensors", "SHA256SUMS")


@pytest.fixture
def place(tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(small_place(tiny_sd, tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def finished(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of three steps; not to be written to."""
    folder = small_place(tiny_sd, tmp_path_factory.mktemp("finished"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        from tropism.cli import main

        assert main(train_words(steps="3", reward=["brightness", "./rewards.py:bright=0.5"])) == 0
    return folder


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_everything(finished: Path) -> None:
    run = finished / RUN
    names = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    lora, steps = "pytorch_lora_weights.safetensors", ("step-000002", "step-000003")
    assert names == {
        "config.yaml", "metrics.jsonl", "README.md", "curve.png", "before_after.png", f"adapter/{lora}",
        "report.html", "strips/prompts.json",
        *(f"{folder}/step-{step:06}.png" for folder in ("samples", "strips") for step in range(4)),
        *(f"checkpoints/{step}/{file}" for step in steps for file in CHECKPOINT),
    }  # fmt: skip
    for name in names:
        if name.endswith(".png") and not name.startswith("strips"):
            assert min(Image.open(run / name).size) > 200


def test_metrics_say_what_happened(finished: Path) -> None:
    rows = metrics(finished / RUN)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert [row.get("images") for row in rows] == [None, 4, 8, 12]
    for row in rows[1:]:
        assert row["seconds"] > 0
        assert row["images_per_second"] > 0
        assert {"reward_mean", "reward_std", "loss", "grad_norm", "approx_kl"} <= set(row)
        assert row["eval_gain_low"] <= row["eval_gain"] <= row["eval_gain_high"]
    for row in rows:
        assert row["eval_reward_low"] <= row["eval_reward"] <= row["eval_reward_high"]
        assert row["eval_reward"] == pytest.approx(row["eval_brightness"] + 0.5 * row["eval_bright"], abs=1e-6)
    assert rows[3]["eval_reward"] != rows[0]["eval_reward"]


def test_the_adapter_draws_the_same_in_plain_diffusers(finished: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(finished / "model")
    pipe.load_lora_weights(finished / RUN / "adapter")
    pipe.set_progress_bar_config(disable=True)
    x = normal((1, 4, 8, 8), row_generators(row_seeds(1, torch.Generator().manual_seed(0))), torch.device("cpu"))
    plain = pipe("a red fox", latents=x, num_inference_steps=3, guidance_scale=2.0, output_type="pt").images
    model = load_pipeline(finished / "model")
    base = next(draw_images(deterministic(model, 3), ["a red fox"], 0))
    model.load_adapter(finished / RUN / "adapter")
    ours = next(draw_images(deterministic(model, 3), ["a red fox"], 0))
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5)
    assert (ours - base).abs().max() > 1e-4


def test_checkpoints_hold_what_the_next_step_needs(finished: Path) -> None:
    folder = finished / RUN / "checkpoints" / "step-000003"
    state, tensors = json.loads((folder / "state.json").read_text()), load_file(folder / "state.safetensors")
    assert state["step"] == 3
    histories = state["method"]["statistics"]["history"]
    assert sum(map(len, histories.values())) == 12
    assert state["optimizer"][0]["lr"] == 1e-3
    assert tensors["generator"].dtype == torch.uint8
    assert tensors["optimizer/0/step"] == 6  # two updates a step
    weights = load_file(folder / "pytorch_lora_weights.safetensors")
    assert sum(name.endswith("exp_avg") for name in tensors) == len(weights)


def test_the_model_card(finished: Path) -> None:
    text = (finished / RUN / "README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert header["base_model"] == "model"
    assert header["library_name"] == "diffusers"
    assert {"lora", "text-to-image", "ddpo"} <= set(header["tags"])
    assert "license" in header
    assert 'pipe.load_lora_weights("adapter")' in text
    assert "](before_after.png)" in text
    assert "| brightness |" in text
    assert "| weighted sum |" in text
    assert "| learning_rate | 0.001 |" in text


def test_the_configuration_runs_again_to_the_same_metrics(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(finished)
    again = tmp_path / "again"
    result = said(["train", "ddpo", "--config", str(RUN / "config.yaml"), "--out", str(again)], capsys)
    assert result.code == 0, result
    timed = {"seconds", "images_per_second", "eval_seconds"}
    for old, new in zip(metrics(RUN), metrics(again), strict=True):
        assert {k: v for k, v in old.items() if k not in timed} == {k: v for k, v in new.items() if k not in timed}
    assert (again / "config.yaml").read_text().split("\n", 1)[1] == (RUN / "config.yaml").read_text().split("\n", 1)[1]
    refusal = said(["train", "ddpo", "--config", str(RUN / "config.yaml"), "--out", str(again)], capsys)
    assert refusal.code == 2
    assert "which holds a run already" in refusal.err


def test_one_line_a_step_where_there_is_no_terminal(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = said(train_words(save_every="0", eval_every="0"), capsys)
    assert result.code == 0
    assert result.err == ""
    assert [line[:9] for line in result.out.splitlines() if line.startswith("step")] == ["step 1/2 ", "step 2/2 "]
    assert str(RUN / "before_after.png") in result.out
    assert not (RUN / "checkpoints").exists()
    assert sorted(path.name for path in (RUN / "samples").iterdir()) == ["step-000000.png", "step-000002.png"]


def test_another_run_gets_another_folder(place: Path) -> None:
    (place / RUN).mkdir(parents=True)
    assert tropism.plan.next_folder(Path("runs"), "ddpo-model") == Path("runs") / "ddpo-model-2"


@pytest.mark.parametrize(
    "changes",
    [
        {"full": "", "lora_targets": None},
        {"ema": "0.5", "mixed_precision": "bf16", "gradient_checkpointing": "", "save_every": "2"},
        {"report_to": "tensorboard", "lora_rank": "2", "lora_targets": ["to_q", "to_v"]},
    ],
    ids=["full", "ema", "tracker"],
)
def test_other_ways_to_train(
    changes: dict[str, str | list[str] | None], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    method = "raft" if "ema" in changes else "ddpo"  # bfloat16 answers differently in batches of another size
    result = said(train_words(method, **changes), capsys)
    assert result.code == 0, result
    (run,) = Path("runs").iterdir()
    if "full" in changes:
        assert (run / "adapter" / "unet" / "config.json").is_file()
        assert "UNet2DConditionModel.from_pretrained" in (run / "README.md").read_text()
        words = [
            "eval",
            "--model",
            "model",
            "--adapter",
            str(run),
            "--reward",
            "brightness",
            "--prompts",
            "prompts.txt",
        ]
        assert "with the adapter" in said([*words, "--images", "2"], capsys).out
    elif "ema" in changes:
        saved = load_file(run / "checkpoints" / "step-000002" / "state.safetensors")
        assert saved["ema/updates"] > 0
    else:
        assert list((run / "trackers").rglob("events.out.*"))


def test_a_flow_model(tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tropism.cli import main

    monkeypatch.chdir(small_place(tiny_sd3, tmp_path))
    assert main(train_words("flow-grpo", reward="jpeg-compressibility", steps="1")) == 0
    assert Path("runs/flow-grpo-model-1/adapter/pytorch_lora_weights.safetensors").is_file()


# What goes wrong.


def failed(words: list[str], capsys: pytest.CaptureFixture[str], code: int = 1) -> Said:
    """A run that failed after a finished step: one sentence, and what was good is still there."""
    result = said(words, capsys)
    assert result.code == code, result
    assert result.err.count("\n") == 1
    assert "Traceback" not in result.err
    assert str(RUN / "metrics.jsonl") in result.err
    assert metrics(RUN)
    assert not list(Path("runs").rglob(".saving-*"))
    return result


def test_a_reward_that_fails_in_a_later_step(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = failed(train_words(reward="./rewards.py:late", steps="9"), capsys)
    assert "reward 'late' raised RuntimeError: the server is gone, after" in result.err
    assert str(max((RUN / "checkpoints").iterdir())) in result.err
    assert (RUN / "adapter" / "pytorch_lora_weights.safetensors").is_file()
    assert (RUN / "curve.png").is_file()
    assert "RuntimeError: the server is gone" in (RUN / "error.txt").read_text()
    assert "The run ended early: " in (RUN / "report.html").read_text()


def test_a_loss_that_is_not_finite(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, real = [], DDPO.loss

    def spoilt(method: DDPO, cells: Any) -> Any:
        calls.append(1)
        loss = real(method, cells)
        return loss if len(calls) <= 2 else loss._replace(total=loss.total * math.nan)

    monkeypatch.setattr(DDPO, "loss", spoilt)
    result = failed(train_words(save_every="1"), capsys)
    assert "the loss is nan at step 2" in result.err
    assert str(RUN / "checkpoints" / "step-000001") in result.err


def test_a_full_disk(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = tropism.checkpoint.save_file

    def full(tensors: Any, file: Path) -> None:
        if len(metrics(RUN)) > 2:
            file.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, file)

    monkeypatch.setattr(tropism.checkpoint, "save_file", full)
    result = failed(train_words(steps="3"), capsys)
    assert "there is no space left on the disk of" in result.err
    assert [path.name for path in (RUN / "checkpoints").iterdir()] == ["step-000001"]


def test_lines_are_whole_or_absent(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "metrics.jsonl")
    lines.append({"step": 1, "reward": math.nan, "x": 0.5})
    assert json.loads(lines.file.read_text()) == {"step": 1, "reward": None, "x": 0.5}
    if Path("/dev/full").exists():
        with pytest.raises(OSError, match="No space left"):
            Lines(Path("/dev/full")).append({"step": 1})


def test_a_step_is_shown_by_its_reward_or_its_loss(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Progress(3)
    shown.step(1, {"loss": 0.25}, 2.0)
    shown.step(2, {"loss": 0.25, "reward_mean": 1.5}, 2.0)  # as of a gradient, which has no spread
    shown.step(3, {"loss": 0.25, "reward_mean": 1.5, "reward_std": 0.5}, 2.0)
    lines = capsys.readouterr().out.splitlines()
    told = [" ".join(line.split()[2:]).partition(" 0:00")[0] for line in lines]
    assert told == [
        "loss 0.25 images/s 2.0",
        "reward 1.500 images/s 2.0",
        "reward 1.500 (std 0.500) images/s 2.0",
    ]


def test_stopping_by_the_keyboard(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: Progress, number: int, *_: float) -> None:
        if number == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "step", stop)
    result = failed(train_words(steps="9", save_every="0"), capsys, code=130)
    assert "stopped by the keyboard, after 2 of 9 steps" in result.err
    assert (RUN / "adapter" / "pytorch_lora_weights.safetensors").is_file()


def test_stopping_before_the_first_step_leaves_nothing(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        assert RUN.is_dir()
        raise KeyboardInterrupt

    monkeypatch.setattr(DDPO, "loss", stop)
    assert "nothing is kept" in refused(train_words(), capsys, code=130)


def test_a_mistake_of_ours_is_shown_and_leaves_nothing(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DDPO, "loss", lambda *_: {}["a bug"])
    with pytest.raises(KeyError, match="a bug"):
        said(train_words(), capsys)
    assert not Path("runs").exists()


def test_a_reward_without_variance(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sentence = refused(train_words(reward="./rewards.py:flat", steps="9"), capsys, code=1)
    assert "reward 'flat' has told no image from another for 3 steps in a row" in sentence


def test_one_step_without_variance_is_only_a_warning(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "calls = 0\ndef once(images):\n    global calls\n    calls += 1\n"
    text += "    return [1.0] * len(images) if calls == 4 else images.mean((1, 2, 3))\n"
    (place / "once.py").write_text(text)  # after the try, the probe and the first evaluation
    result = said(train_words(reward="./once.py:once", steps="3"), capsys)
    assert result.code == 0, result
    assert result.out.count("warning: step 1 has nothing to learn from") == 1
    rows = metrics(RUN)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert rows[1]["skipped"] == 1.0
    assert "loss" in rows[2]


def test_clock() -> None:
    assert [clock(seconds) for seconds in (4, 75, 3725)] == ["0:04", "1:15", "1:02:05"]


def test_the_end_is_a_checkpoint(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(train_words(out="run", steps="3", eval_every="0", save_every="2"), capsys).code == 0
    assert sorted(path.name for path in Path("run/checkpoints").glob("step-*")) == ["step-000002", "step-000003"]
    assert said(["train", "ddpo", "--resume", "run", "--steps", "4"], capsys).code == 0


def test_how_many_checkpoints_are_kept(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(train_words(out="run", steps="5", eval_every="0", save_total_limit="3"), capsys).code == 0
    kept = sorted(path.name for path in Path("run/checkpoints").iterdir())
    assert [name for name in kept if name != "best"] == ["step-000003", "step-000004", "step-000005"]
    assert "save_total_limit is 0; wanted at least 1" in said(train_words(save_total_limit="0"), capsys).err
