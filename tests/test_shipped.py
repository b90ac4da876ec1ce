"""The weights in the package: they load with plain diffusers and transformers, and do what their data card says."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import AnimateDiffPipeline, DiffusionPipeline, MotionAdapter, StableDiffusionPipeline
from transformers import CLIPTextModel, CLIPTokenizer

from tropism import catalog
from tropism.distillation.tokens import samples
from tropism.evaluate import deterministic
from tropism.models.pipelines import load_pipeline
from tropism.policy import Policy
from tropism.samplers import solver
from tropism.worlds import moving
from tropism.worlds.scenes import alter, caption, captions, render_batch, sample_scene, verify_batch

SD, FLOW, LCM, DMD, CLIPS = (catalog.WEIGHTS / name for name in ("sd", "flow", "lcm", "dmd", "clips"))
both = pytest.mark.parametrize("folder", [SD, FLOW], ids=["sd", "flow"])
LIMIT = 30 * 2**20  # bytes of one shipped folder


@pytest.mark.parametrize("name", ["sd", "flow", "lcm", "dmd", "clips", "clip", "ip", "tokens"])
def test_a_shipped_folder_is_small_and_has_nothing_pickled(name):
    files = [file for file in (catalog.WEIGHTS / name).rglob("*") if file.is_file()]
    assert 0 < sum(file.stat().st_size for file in files) <= LIMIT
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]


@pytest.mark.parametrize("folder", [SD, FLOW, LCM, DMD], ids=["sd", "flow", "lcm", "dmd"])
def test_plain_diffusers_draws_without_tropism(folder):
    code = f"""
import sys
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({str(folder)!r})
image = pipe("a red circle on a white background", num_inference_steps=2).images[0]
assert image.size == (64, 64) and not [name for name in sys.modules if name.split(".")[0] == "tropism"]
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/", capture_output=True, timeout=120)


@both
def test_our_chain_draws_the_pictures_of_the_pipeline_itself(folder):
    model, texts = load_pipeline(folder), captions(4, 0, "held_out")
    noise = torch.randn(4, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    ours = deterministic(model, 20, None, 4).images(texts, x=noise)
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        texts, latents=noise, guidance_scale=model.guidance_scale, num_inference_steps=20, output_type="pt"
    ).images
    assert (ours - theirs).abs().max() <= 1e-3


@both
def test_single_objects_are_mostly_right(folder):
    """96 % of 500 are, of either; that 20 or fewer of 24 would be is a chance of 1 in 100."""
    texts = captions(24, 1, "held_out", kinds=("single",))
    policy = deterministic(load_pipeline(folder, dtype=torch.float32), 20, None, 24)
    images = policy.images(texts, torch.Generator().manual_seed(0))
    passed = sum(verdict.passed for verdict in verify_batch(images.numpy(), texts))
    assert passed > 20, f"{passed} of 24"


@pytest.mark.parametrize(
    ("name", "made_for", "moves", "least"),
    [("lcm", 4, 2, 62), ("lcm", 4, 4, 70), ("dmd", 2, 1, 56), ("dmd", 2, 2, 72), ("dmd", 2, 4, 76)],
)
def test_few_moves_are_mostly_right(name, made_for, moves, least):
    """70.7 % of 512 captions are, in two moves of scenes-lcm, and 77.9 % in four; of scenes-dmd 65.6 % in one, 79.9 %
    in two and 83.2 % in four. So few of 100 would be in 1 of 30 draws."""
    model = catalog.load_model(f"scenes-{name}", torch.bfloat16, torch.device("cpu"))
    assert (model.steps, model.guidance_scale, model.hops) == (made_for, 1.0, "consistency")
    texts = captions(100, 2, "held_out")
    images = deterministic(model, moves, None, 50).images(texts, torch.Generator().manual_seed(0))
    passed = sum(verdict.passed for verdict in verify_batch(images.float().numpy(), texts))
    assert passed >= least, f"{passed} of 100"


def test_clips_in_plain_diffusers_are_those_of_our_chain():
    model, texts = catalog.load_model("scenes-clips", torch.float32, torch.device("cpu")), moving.captions(2, 0)
    noise = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    ours = deterministic(model, 4, None, 2).images(texts, x=noise)
    still = StableDiffusionPipeline.from_pretrained(SD)
    pipe = AnimateDiffPipeline(
        still.vae,
        CLIPTextModel.from_pretrained(CLIPS / "text_encoder"),
        CLIPTokenizer.from_pretrained(CLIPS / "tokenizer"),
        still.unet,
        MotionAdapter.from_pretrained(CLIPS / "motion_adapter"),
        still.scheduler,
    )
    pipe.set_progress_bar_config(disable=True)
    call = {"num_frames": 4, "num_inference_steps": 4, "guidance_scale": model.guidance_scale, "output_type": "pt"}
    theirs = pipe(texts, latents=noise, **call).frames
    assert (ours - torch.cat([*theirs.unbind(1)], dim=-1)).abs().max() <= 1e-3  # a film strip


def test_clips_are_right_about_half_the_time():
    """Half of 64 are; that 2 or fewer of 12 would be is a chance of 1 in 50."""
    model, texts = (
        catalog.load_model("scenes-clips", torch.bfloat16, torch.device("cpu")),
        moving.captions(12, 1, "held_out"),
    )
    assert (model.steps, model.guidance_scale) == (20, 3.0)
    strips = deterministic(model, 12, None, 12).images(texts, torch.Generator().manual_seed(0))
    passed = sum(verdict.passed for verdict in moving.verify_batch(strips.float().numpy(), texts))
    assert passed >= 3, f"{passed} of 12"


def test_image_tokens_are_right_more_often_than_not():
    """60 % of 336 are; that 16 or fewer of 40 would be is a chance of 1 in 100."""
    model, texts = (
        catalog.load_model("scenes-tokens", torch.float32, torch.device("cpu")),
        captions(40, 1, "held_out", kinds=("single",)),
    )
    assert (model.steps, model.guidance_scale) == (64, 2.0)
    policy = Policy(model, solver(model.denoiser), model.steps)
    with torch.no_grad():
        images = model.decode(samples(policy, texts, torch.Generator().manual_seed(0))).clamp(0, 1)
    passed = sum(verdict.passed for verdict in verify_batch(images.numpy(), texts))
    assert passed > 16, f"{passed} of 40"


def test_the_clip_prefers_the_caption_of_a_picture():
    """94.7 % of 4,000 pairs are right; 178 or fewer of 200 would be in 1 of 1,000 draws."""
    rng = np.random.default_rng(3)
    scenes = [sample_scene(rng, "held_out") for _ in range(200)]
    images = torch.from_numpy(render_batch(scenes, list(range(200)))).permute(0, 3, 1, 2).float() / 255
    clip = catalog.build_reward(catalog.parse_reward("clip"), "scenes", torch.device("cpu"))
    right = clip(images, [caption(scene) for scene in scenes])
    wrong = clip(images, [caption(alter(scene, rng)) for scene in scenes])
    assert int((right > wrong).sum()) > 178
