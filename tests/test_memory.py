"""The levers of memory: each of them leaves the results as they are, in every family."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from families import MAIN, ROWS, Row, ours
from safetensors.torch import load_file
from small_run import refused, said, small_place, train_words
from test_families import ALIGNPROP, DDPO, red

from tropism.config import TrainSettings
from tropism.data.prompts import PromptSet
from tropism.methods.ddpo import Settings
from tropism.models.latent_pipeline import LatentPipeline
from tropism.plan import make_plan, set_up
from tropism.rewards import Elsewhere, as_reward
from tropism.train import train

families = pytest.mark.parametrize("name", MAIN)
new_families = pytest.mark.parametrize("name", ["lcm", "sdxl", "flux-dev", "pixart-alpha"])


def prepared(row: Row) -> LatentPipeline:
    """With a LoRA that is no longer a no-op."""
    model = row.model()
    model.add_lora(rank=2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


def gradients(model: LatentPipeline) -> tuple[torch.Tensor, ...]:
    """Of a loss on the decoded pictures, through the network and the decoder."""
    prediction = model.denoiser(tiny.noise(2), torch.tensor([0.4, 0.9]), model.encode(tiny.PROMPTS))
    return torch.autograd.grad(model.decode(prediction.x0).square().mean(), model.parameters(), allow_unused=True)


@new_families
@pytest.mark.parametrize("lever", ["enable_gradient_checkpointing", "enable_vae_slicing"])
def test_checkpointing_and_slicing_change_no_gradient(name: str, lever: str) -> None:
    plain, saving = prepared(ROWS[name]), prepared(ROWS[name])
    getattr(saving, lever)()
    calls: list[int] = []
    saving.pipe.vae.decoder.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    expected, got = gradients(plain), gradients(saving)
    assert calls == ([1, 1] if lever == "enable_vae_slicing" else [2])
    for one, other in zip(expected, got, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-7)


@families
def test_without_text_encoders_the_same_pictures(name: str) -> None:
    row = ROWS[name]
    model = row.model()
    expected, phrases = ours(row, model), model.phrases(tiny.PROMPTS)
    encoders = [part for part in model.pipe.components if part.startswith("text_encoder")]
    model.drop_text_encoders(tiny.PROMPTS)
    assert encoders and all(getattr(model.pipe, part) is None for part in encoders)
    assert all(value.device.type == "cpu" for row in model._all.values() for value in row.values())
    torch.testing.assert_close(ours(row, model), expected, rtol=0, atol=1e-5)  # encoded in other batches
    assert torch.equal(model.phrases(tiny.PROMPTS), phrases)
    assert phrases.unique().tolist() == [-1, 0]
    with pytest.raises(ValueError, match="'a green hill' is none; leave drop_text_encoders out"):
        model.encode([tiny.PROMPTS[0], "a green hill"])


@new_families
def test_bfloat16_answers_in_float32(name: str) -> None:
    exact, low = ROWS[name].model(), ROWS[name].model().to(torch.device("cpu"), torch.bfloat16)
    x, t = tiny.noise(2), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        rough = low.denoiser(x, t, low.encode(tiny.PROMPTS))
        full = exact.denoiser(x, t, exact.encode(tiny.PROMPTS))
        images = low.decode(x)
    assert {value.dtype for value in (*rough, images)} == {torch.float32}
    assert 0 < (rough.eps - full.eps).abs().max() < 0.1


class Recorder(torch.optim.SGD):
    """Steps nowhere, and keeps the gradients that it was given."""

    def step(self, closure: Any = None) -> None:
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self.seen = torch.cat([parameter.grad.flatten().clone() for parameter in parameters])


@pytest.mark.parametrize("settings", [DDPO, ALIGNPROP], ids=["ddpo", "alignprop"])
@pytest.mark.parametrize("name", ["lcm", "sdxl", "flux-dev", "pixart-sigma"])
def test_microbatches_change_no_update(name: str, settings: Any) -> None:
    def gradient(minibatch: int, sample_batch: int) -> torch.Tensor:
        model = prepared(ROWS[name])
        chosen = replace(settings, minibatch=minibatch, sample_batch=sample_batch)
        method = chosen.build(model, as_reward(red, "red", True), torch.Generator().manual_seed(1))
        batch = PromptSet(tiny.PROMPTS).batch([0, 1], settings.images_per_prompt)
        recorder = Recorder(model.parameters(), lr=1.0)
        train(method, [batch], recorder, steps=1, max_norm=0)
        return recorder.seen

    whole, parts = gradient(64, 64), gradient(3, 1)
    assert whole.norm() > 0
    assert (parts - whole).norm() < 1e-3 * whole.norm()


def test_a_reward_elsewhere_gets_the_images_there_and_answers_here() -> None:
    class Bright:
        name, differentiable = "bright", True

        def __call__(self, images: torch.Tensor, prompts: Any, **columns: Any) -> torch.Tensor:
            assert images.device.type == "meta"  # a device that every machine has
            return torch.arange(len(images)).float()

    there = Elsewhere(Bright(), torch.device("meta"))
    assert there(torch.rand(2, 3, 4, 4), tiny.PROMPTS).tolist() == [0.0, 1.0]
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    here = Elsewhere(as_reward(red, "red", True), torch.device("cpu"))
    (gradient,) = torch.autograd.grad(here(images, tiny.PROMPTS).sum(), images)
    assert there.differentiable and here.name == "red"
    assert float(gradient[0, 0, 0, 0]) == pytest.approx(1 / 16)


@pytest.fixture
def place(tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return small_place(tiny_sd, tmp_path)


@pytest.mark.usefixtures("place")
def test_a_run_with_every_lever_is_the_same_run(capsys: pytest.CaptureFixture[str]) -> None:
    levers: dict[str, Any] = {"drop_text_encoders": "", "vae_slicing": "", "reward_device": "cpu"}
    assert said(train_words(out="plain", eval_every="0"), capsys).code == 0
    assert said(train_words(out="levers", eval_every="0", **levers), capsys).code == 0
    plain, saving = (load_file(f"{run}/adapter/pytorch_lora_weights.safetensors") for run in ("plain", "levers"))
    for name, value in plain.items():
        torch.testing.assert_close(saving[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("place")
def test_the_levers_are_pulled_before_the_method_is_built() -> None:
    settings = TrainSettings(model="model", prompts="prompts.txt", reward=["brightness"], drop_text_encoders=True)
    settings = type(settings)(
        **{**vars(settings), "vae_slicing": True, "gradient_checkpointing": True, "device": "cpu"}
    )
    bench = set_up(make_plan("ddpo", settings, Settings(inference_steps=2)))
    assert bench.model.pipe.text_encoder is None and bench.model.pipe.vae.use_slicing
    assert bench.model.pipe.unet.is_gradient_checkpointing
    with pytest.raises(ValueError, match="text encoders were dropped after 4 prompts"):
        bench.model.encode(["something new"])


@pytest.mark.usefixtures("place")
def test_a_device_for_rewards_must_be_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert "reward_device is abacus, which torch cannot use here" in refused(
        train_words(reward_device="abacus"), capsys
    )
