"""The house's chains against diffusers' own pipelines: same latents in, same latents and pictures out."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import tiny
import torch
from diffusers import DDIMScheduler, PNDMScheduler

from tropism.base import Kernel, TextToImage, take
from tropism.guidance.cfg import Guided
from tropism.models.latent_pipeline import LatentPipeline
from tropism.models.pipelines import wrap_pipeline
from tropism.samplers.chain import walk
from tropism.samplers.ddim import DDIM
from tropism.samplers.flow import EulerODE

TOLERANCE = 1e-5  # of the largest latent: random networks reach 50 where a trained one stays near 4
ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def theirs(pipe: Any, steps: int, output_type: str, **options: Any) -> torch.Tensor:
    """What ``pipe(...)`` itself makes of ``tiny.noise(2)``."""
    options = {"num_inference_steps": steps, "latents": tiny.noise(2), "output_type": output_type, **options}
    images: torch.Tensor = pipe(tiny.PROMPTS, **options).images
    return images


def ours(model: LatentPipeline, kernel: Kernel, steps: int, scale: float | None = None) -> torch.Tensor:
    """The last latents of the house's chain from the same start."""
    denoiser = Guided(model.denoiser, model.null(), model.guidance_scale if scale is None else scale)
    with torch.no_grad():
        moves = list(walk(kernel, denoiser, tiny.noise(2), model.grid(steps), model.encode(tiny.PROMPTS)))
    assert len(moves) == steps
    return moves[-1].x_next


def check_equal(pipe: Any, kernel: Kernel, steps: int, **options: Any) -> None:
    model = wrap_pipeline(pipe)
    latents, expected = ours(model, kernel, steps), theirs(pipe, steps, "latent", **options)
    assert expected.std() > 0.3
    torch.testing.assert_close(latents, expected, rtol=0, atol=TOLERANCE * expected.abs().max().item())
    with torch.no_grad():
        images = model.decode(latents)
    torch.testing.assert_close(images, theirs(pipe, steps, "pt", **options), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "scheduler",
    [
        {},
        {"prediction_type": "v_prediction"},
        ZERO_SNR,
        {"prediction_type": "sample"},
        {"set_alpha_to_one": True},
        {"timestep_spacing": "trailing"},
        {"beta_schedule": "linear"},
        {"trained_betas": [0.02 + 0.0002 * i for i in range(100)], "num_train_timesteps": 100},
    ],
)
def test_sd_equals_its_pipeline_with_ddim(scheduler: dict[str, Any]) -> None:
    check_equal(tiny.sd_pipeline(**scheduler), DDIM(0.0), 20, eta=0.0)


def test_sd_with_few_steps_and_other_guidance() -> None:
    pipe = tiny.sd_pipeline(prediction_type="v_prediction")
    latents = ours(wrap_pipeline(pipe), DDIM(0.0), 7, scale=1.5)
    torch.testing.assert_close(latents, theirs(pipe, 7, "latent", guidance_scale=1.5), rtol=0, atol=1e-4)
    assert (latents - theirs(pipe, 7, "latent")).abs().max() > 0.1  # 7.5 is something else


def test_another_scheduler_means_ddim_from_its_config() -> None:
    pipe = tiny.sd_pipeline(prediction_type="v_prediction")
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config)
    latents = ours(wrap_pipeline(pipe), DDIM(0.0), 20)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    torch.testing.assert_close(latents, theirs(pipe, 20, "latent"), rtol=0, atol=1e-4)


def test_unguided_equals_the_pipeline_without_guidance() -> None:
    pipe = tiny.sd_pipeline(prediction_type="v_prediction")
    latents = ours(wrap_pipeline(pipe, guidance_scale=1.0), DDIM(0.0), 5)
    torch.testing.assert_close(latents, theirs(pipe, 5, "latent", guidance_scale=1.0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("t5", [False, True])
@pytest.mark.parametrize("scheduler", [{}, {"shift": 1.0}, {"use_dynamic_shifting": True}])
def test_sd3_equals_its_pipeline(t5: bool, scheduler: dict[str, Any]) -> None:
    check_equal(tiny.sd3_pipeline(t5=t5, **scheduler), EulerODE(), 20)


def test_negative_prompt() -> None:
    pipe = tiny.sd3_pipeline()
    latents = ours(wrap_pipeline(pipe, negative_prompt="blurred"), EulerODE(), 5)
    torch.testing.assert_close(latents, theirs(pipe, 5, "latent", negative_prompt=["blurred"] * 2), rtol=0, atol=1e-4)
    assert (latents - theirs(pipe, 5, "latent")).abs().max() > 0.01


def test_other_image_size() -> None:
    pipe = tiny.sd_pipeline(prediction_type="v_prediction")
    model = wrap_pipeline(pipe, image_size=(16, 24))
    assert model.latent_shape == (4, 8, 12)
    x = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        rows = model.encode(tiny.PROMPTS)
        *_, last = walk(DDIM(0.0), Guided(model.denoiser, model.null(), 7.5), x, model.grid(5), rows)
    expected = theirs(pipe, 5, "latent", latents=x, height=16, width=24)
    torch.testing.assert_close(last.x_next, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("build", [tiny.sd_pipeline, tiny.sd3_pipeline])
def test_rows_with_different_times_equal_row_by_row(build: Any) -> None:
    model: TextToImage = wrap_pipeline(build())
    x, rows = tiny.noise(4), model.encode(tiny.PROMPTS * 2)
    t = torch.tensor([0.2, 0.9, 0.9, 0.6])
    denoiser = Guided(model.denoiser, model.null(), 3.0)
    with torch.no_grad():
        together = denoiser(x, t, rows)
        for i in range(4):
            index = torch.tensor([i])
            alone = denoiser(x[index], t[index], take(rows, index))
            torch.testing.assert_close(together.eps[index], alone.eps, rtol=1e-4, atol=1e-5)
        moved = denoiser(x, 1 - t, rows)
    assert (moved.eps - together.eps).abs().flatten(1).amax(1).min() > 1e-3


@pytest.mark.parametrize("build", [tiny.sd_pipeline, tiny.sd3_pipeline])
def test_defaults_are_those_of_the_pipeline_class(build: Any) -> None:
    pipe = build()
    model, signature = wrap_pipeline(pipe), inspect.signature(type(pipe).__call__).parameters
    assert model.guidance_scale == signature["guidance_scale"].default
    assert model.steps == signature["num_inference_steps"].default
    assert model.latent_shape == tiny.LATENT_SHAPE
    assert model.pipe is pipe


@pytest.mark.parametrize("build", [tiny.sd_pipeline, tiny.sd3_pipeline])
def test_grid_is_a_grid(build: Any) -> None:
    grid = wrap_pipeline(build()).grid(12)
    assert grid.shape == (13,) and grid.dtype == torch.float32
    assert (grid.diff() < 0).all() and grid[0] <= 1 and grid[-1] == 0


def test_encode_asks_the_text_encoder_once_a_prompt() -> None:
    pipe = tiny.sd3_pipeline()
    model, calls = wrap_pipeline(pipe), []
    pipe.text_encoder.register_forward_hook(lambda _, args, __: calls.append(args[0].shape[0]))
    rows = model.encode(["a fox", "a cat", "a fox"])
    assert calls == [2] and not rows["prompt_embeds"].requires_grad
    again = model.encode(["a cat", "a dog"])
    assert calls == [2, 1]
    assert torch.equal(again["pooled"][0], rows["pooled"][1]) and torch.equal(rows["pooled"][0], rows["pooled"][2])
    assert not torch.equal(rows["pooled"][0], rows["pooled"][1])


def test_encode_forgets_beyond_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrap_pipeline(tiny.sd_pipeline())
    row = model.encode(["a"])["prompt_embeds"].nbytes
    monkeypatch.setattr("tropism.models.trainable.CACHE_BYTES", 3 * row)
    rows = model.encode([f"number {i}" for i in range(10)])
    assert rows["prompt_embeds"].shape[0] == 10 and list(model._rows) == ["number 7", "number 8", "number 9"]


def test_encode_refuses_a_bare_string_and_nothing() -> None:
    model = wrap_pipeline(tiny.sd_pipeline())
    with pytest.raises(TypeError, match="sequence of prompts"):
        model.encode("a red fox")
    with pytest.raises(ValueError, match="at least one"):
        model.encode([])


def test_decode_stays_in_range_and_passes_the_gradient_of_saturated_pixels() -> None:
    model = wrap_pipeline(tiny.sd_pipeline())
    latents = (40 * tiny.noise(2)).requires_grad_()
    with torch.no_grad():
        raw = model.pipe.vae.decode(latents / 0.18215).sample * 3  # the same pictures, with more contrast
    model.pipe.vae.decoder.conv_out.weight.data.mul_(3)
    model.pipe.vae.decoder.conv_out.bias.data.mul_(3)
    images = model.decode(latents)
    assert images.min() == 0 and images.max() == 1 and images.dtype == torch.float32
    torch.testing.assert_close(images, (raw * 0.5 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-4)
    saturated = ((images == 0) | (images == 1)).float()
    assert 0 < saturated.mean() < 1
    (gradient,) = torch.autograd.grad((images * saturated).sum(), latents)
    assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("build", [tiny.sd_pipeline, tiny.sd3_pipeline])
def test_low_precision_answers_in_float32(build: Any, dtype: torch.dtype) -> None:
    exact, model = wrap_pipeline(build()), wrap_pipeline(build().to(dtype=dtype))
    x, t = tiny.noise(2), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        low = model.denoiser(x, t, model.encode(tiny.PROMPTS))
        full = exact.denoiser(x, t, exact.encode(tiny.PROMPTS))
        images = model.decode(x)
        raw = model.net(x, torch.tensor([299, 799]), model.encode(tiny.PROMPTS))
    assert raw.dtype == low.x0.dtype == low.eps.dtype == images.dtype == torch.float32
    assert 0 < (low.eps - full.eps).abs().max() < 0.1
