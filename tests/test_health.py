"""What counts as trouble, and what a run does about it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_run import refused, said, small_place, train_words
from test_resume import metrics, weights

from tropism.config import HealthSettings
from tropism.health import HealthCheck, Unhealthy, Watched, blank
from tropism.models.latent_pipeline import LatentPipeline
from tropism.rewards import as_reward


@pytest.fixture
def place(tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(small_place(tiny_sd, tmp_path))
    return tmp_path


def test_a_blank_picture_is_of_one_colour_or_black() -> None:
    noise = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    red = torch.zeros(3, 8, 8)
    red[0] = 1
    dot = red.clone()
    dot[1, 0, 0] = 0.1
    images = torch.stack([noise, red, dot, torch.zeros(3, 8, 8), noise * 0.04, noise * 0.1, torch.ones(3, 8, 8)])
    assert blank(images).tolist() == [False, True, False, True, True, False, True]


def test_a_watched_reward_is_the_reward_and_counts_what_passed() -> None:
    watched = Watched(as_reward(lambda images: images.mean((1, 2, 3)), "bright", True))
    images = torch.rand(4, 3, 8, 8, requires_grad=True)
    values = watched(images, ["a"] * 4)
    assert torch.equal(values, images.mean((1, 2, 3))) and values.requires_grad
    assert (watched.name, watched.differentiable) == ("bright", True)
    assert watched(torch.zeros(2, 3, 8, 8), ["a"] * 2).tolist() == [0, 0]
    assert watched.taken() == {"images_blank": 2 / 6} and watched.taken() == {}
    with pytest.raises(Unhealthy, match=r"1 of 2 pictures hold values that are not finite.* lower learning_rate"):
        watched(torch.tensor([0.5, math.nan])[:, None, None, None].expand(2, 3, 8, 8), ["a"] * 2)


@pytest.mark.parametrize(
    ("measured", "sentence"),
    [
        ({"images_blank": 0.6}, r"60% of the step's pictures are black or of one colour, above max_blank \(50%\)"),
        ({"ratio_max": 1.7}, r"the ratio to the acting policy is 1.7, above max_ratio \(1.5\).*lower learning_rate"),
        ({"eval_kl": 31.0}, r"the KL to the model before training is 31 nats, above max_kl \(30\)"),
    ],
)
def test_trouble_says_what_was_measured_and_what_to_change(measured: dict[str, float], sentence: str) -> None:
    check = HealthCheck(HealthSettings(max_kl=30.0))
    check.check({name: value * 0.8 for name, value in measured.items()})
    with pytest.raises(Unhealthy, match=sentence):
        check.check(measured)


def test_flat_groups_are_trouble_three_steps_in_a_row() -> None:
    check = HealthCheck(HealthSettings(max_flat=0.8))
    for share in (0.9, 0.9, 0.8, 0.9, 0.9):
        check.check({"zero_std_ratio": share})
    check.check({"eval_reward": 1.0})  # an evaluation says nothing of groups
    with pytest.raises(Unhealthy, match=r"90% of the prompts had images that all score the same.*3 steps in a row"):
        check.check({"zero_std_ratio": 0.9})


def steps(run: str) -> list[int]:
    return [json.loads(line)["step"] for line in Path(run, "metrics.jsonl").read_text().splitlines()]


def test_a_run_stops_and_keeps_its_last_good_checkpoint(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = train_words(out="run", steps="4", max_ratio="1.000001", save_every="1")
    result = said(words, capsys)
    assert result.code == 1 and "above max_ratio" in result.err and "after 1 of 4 steps" in result.err
    assert steps("run") == [0, 1] and not list(Path("run/checkpoints").glob("step-*"))  # step 1 was in trouble
    assert said([*words, "--on-trouble", "warn", "--out", "warned"], capsys).code == 0
    assert steps("warned") == [0, 1, 2, 3, 4]


def test_pictures_that_are_not_finite_begin_no_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vae = place / "model" / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: torch.full_like(value, math.nan) for name, value in load_file(vae).items()}, vae)
    assert "3 of 3 pictures hold values that are not finite" in refused(train_words(out="run"), capsys)
    assert not Path("run").exists()


@pytest.mark.parametrize("on_trouble", ["stop", "warn", "rollback"])
def test_a_picture_that_breaks_in_training(
    on_trouble: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = 0

    def decode(model: LatentPipeline, latents: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += torch.is_grad_enabled() is False and len(latents) == 4  # of training: evaluations draw three
        images = plain(model, latents)
        return images * math.nan if calls == 3 else images

    plain = LatentPipeline.decode
    monkeypatch.setattr(LatentPipeline, "decode", decode)
    result = said(train_words(out="run", steps="4", on_trouble=on_trouble), capsys)
    if on_trouble == "rollback":
        assert result.code == 0 and "going back to step 2, with a learning rate of 0.0005" in result.out
        assert sorted(set(steps("run"))) == [0, 1, 2, 3, 4]
    else:  # without pictures there is nothing to go on with
        assert result.code == 1 and "4 of 4 pictures hold values that are not finite" in result.err
        assert "the weights are in run/checkpoints/step-000002" in result.err


def test_rolling_back_learns_more_slowly_and_goes_on(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes: dict[str, Any] = dict(clip="1e-3", max_ratio="1.0003", on_trouble="rollback")
    result = said(train_words(out="whole", steps="4", **changes), capsys)
    assert result.code == 0, result
    assert (
        "above max_ratio (1.0003)" in result.out
        and "going back to step 0, with a learning rate of 0.0005" in result.out
    )
    back = [row for row in metrics(Path("whole")) if "rollbacks" in row]
    assert [row["learning_rate"] for row in back] == [5e-4 * 0.5**number for number in range(len(back))]
    assert sorted(set(steps("whole"))) == [0, 1, 2, 3, 4]

    assert said(train_words(out="parts", steps="2", **changes), capsys).code == 0
    result = said(["train", "ddpo", "--resume", "parts", "--steps", "4"], capsys)
    assert result.code == 0, result
    assert weights(Path("parts")) == weights(Path("whole"))
    assert metrics(Path("parts")) == metrics(Path("whole"))


def test_rolling_back_gives_up(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = said(train_words(out="run", max_ratio="1.0000001", on_trouble="rollback"), capsys)
    assert result.code == 1
    assert "3 times it went back and learnt more slowly" in result.err


def test_limits_that_make_no_sense(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "max_blank is 1.5; wanted a share from 0 to 1" in refused(train_words(max_blank="1.5"), capsys)
    assert "max_ratio is 1.0; wanted above 1" in refused(train_words(max_ratio="1"), capsys)
    assert "on_trouble is 'panic'; wanted one of stop, rollback, warn" in refused(
        train_words(on_trouble="panic"), capsys
    )
