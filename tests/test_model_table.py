"""``tropism models``: the table, its page, and what a folder is without its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import DDIMScheduler, LCMScheduler
from families import schnell, with_scheduler
from small_run import said

from tropism import catalog, families
from tropism.base import Cond
from tropism.data.prompts import PromptSet
from tropism.denoisers import TOLD
from tropism.guidance import Told, step
from tropism.methods import raft
from tropism.models.pipelines import FAMILIES, load_pipeline, wrap_pipeline
from tropism.rewards import PROGRAMMATIC

PAGE = Path(__file__).parents[1] / "docs" / "models.md"


def test_the_page_shows_the_table() -> None:
    assert families.markdown() in PAGE.read_text(encoding="utf-8")


def test_every_pipeline_is_in_the_table_and_every_family_declares_itself() -> None:
    head, *body = catalog.families()
    assert {name for row in body for name in row[1].split(", ")} - {"MODULE:FUNCTION"} == {
        kind.__name__ for kind in FAMILIES
    }
    assert all(len(row) == len(head) and all(row) for row in body)
    methods = set(catalog.method_names())
    for family in FAMILIES.values():
        without = family.about.methods.removeprefix("all").removeprefix(" but ").split(", ")
        assert set(without) - {"", "distillation"} <= methods


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    result = said(["models"], capsys)
    assert result.code == 0 and not result.err
    assert all(row[0] in result.out for row in catalog.families()[1:])
    shipped = said(["models", "scenes"], capsys)
    assert "Stable Diffusion 3, 3.5" in shipped.out and "20 steps, guidance 3" in shipped.out


NO_FLOW = "all but flow-grpo"
lcm_lora = with_scheduler(tiny.sd_pipeline, LCMScheduler)
FOUND = {
    "sd": (tiny.sd_pipeline, "prediction_type epsilon", "classifier-free", "50 steps, guidance 7.5", NO_FLOW),
    "lcm": (tiny.lcm_pipeline, "LCMScheduler", "an input of the network", "4 steps, guidance 8.5", "raft, rwr"),
    "lcm-lora": (lcm_lora, "LCMScheduler", "classifier-free", "4 steps, guidance 1", "raft, rwr"),
    "sdxl": (tiny.sdxl_pipeline, "DDIMScheduler", "classifier-free", "50 steps, guidance 5", NO_FLOW),
    "dev": (tiny.flux_pipeline, "shifting True", "an input of the network", "28 steps, guidance 3.5", "all"),
    "schnell": (schnell, "shift 1.0", "classifier-free", "4 steps, guidance 1", "all"),
    "pixart": (tiny.pixart_pipeline, "DDIMScheduler", "classifier-free", "20 steps, guidance 4.5", NO_FLOW),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_a_folder_is_known_without_its_weights(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build, *facts = FOUND[name]
    pipe = build()
    pipe.save_pretrained(tmp_path / "model")
    model = load_pipeline(tmp_path / "model")
    assert (f"{model.steps:g} steps, guidance {model.guidance_scale:g}") == facts[2]
    for file in (tmp_path / "model").rglob("*.safetensors"):
        file.unlink()
    result = said(["models", str(tmp_path / "model")], capsys)
    assert result.code == 0, result.err
    assert all(fact in result.out for fact in facts)
    (tmp_path / "model" / "tropism.json").write_text(json.dumps({"steps": 3, "guidance_scale": 2}))
    assert "3 steps, guidance 2" in said(["models", str(tmp_path / "model")], capsys).out


def inpainting() -> Any:
    pipe = tiny.sd_pipeline()
    pipe.unet = tiny._unet(in_channels=9)
    return pipe


def told_classes() -> Any:
    pipe = tiny.sd_pipeline()
    pipe.unet = tiny._unet(class_embed_type="timestep")
    return pipe


def refiner() -> Any:
    pipe = tiny.sdxl_pipeline()
    pipe.text_encoder = pipe.tokenizer = None
    return pipe


def other_sizes() -> Any:
    return tiny.sdxl_pipeline(unet={"projection_class_embeddings_input_dim": 5 * 4 + 8})


def plain_lcm() -> Any:
    pipe = tiny.lcm_pipeline()
    pipe.unet = tiny._unet()
    return pipe


def fill() -> Any:
    pipe = tiny.flux_pipeline()
    pipe.transformer.register_to_config(in_channels=24)
    return pipe


def clipped() -> Any:
    pipe = tiny.pixart_pipeline()
    pipe.scheduler = DDIMScheduler(clip_sample=True)
    return pipe


REFUSED = {
    "the unet takes 9 channels; wanted the vae's 4": inpainting,
    "the unet is told timestep besides the prompt; wanted nothing": told_classes,
    "as SDXL's refiner; wanted the base model": refiner,
    "the unet is told 28 numbers besides the prompt; wanted 32": other_sizes,
    "the unet takes no guidance; load it with StableDiffusionPipeline": plain_lcm,
    "the transformer takes 24 channels; wanted 16": fill,
    "the scheduler clips latents": clipped,
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_variants_that_work_differently_are_refused_with_and_without_weights(
    sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = REFUSED[sentence]()
    with pytest.raises(ValueError, match=sentence):
        wrap_pipeline(pipe)
    pipe.save_pretrained(tmp_path / "model")
    result = said(["models", str(tmp_path / "model")], capsys)
    assert result.code == 2 and sentence in result.err and result.err.count("\n") == 1


def test_kontext_is_no_family(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxKontextPipeline"}))
    assert "is a FluxKontextPipeline; wanted one of" in said(["models", str(tmp_path)], capsys).err


def test_guidance_that_is_told_reaches_the_network_by_row() -> None:
    for build in (tiny.lcm_pipeline, tiny.flux_pipeline):
        model = wrap_pipeline(build())
        x, t = tiny.noise(2), torch.tensor([0.9, 0.3])
        rows: Cond = model.encode(tiny.PROMPTS)
        with torch.no_grad():
            usual = model.denoiser(x, t, rows)
            same = Told(model.denoiser, model.guidance_scale)(x, t, rows)
            low = Told(model.denoiser, 1.0)(x, t, rows)
            explored = Told(model.denoiser, step(1.0, model.guidance_scale, 0.5))(x, t, rows)
        assert torch.equal(same.eps, usual.eps)
        assert (low.eps - usual.eps).abs().flatten(1).amax(1).min() > 1e-4
        torch.testing.assert_close(explored.eps[0], low.eps[0])
        torch.testing.assert_close(explored.eps[1], usual.eps[1])


def test_raft_fits_a_network_at_the_guidance_that_it_was_sampled_with() -> None:
    model = wrap_pipeline(tiny.flux_pipeline())
    model.add_lora(rank=1)
    settings = raft.Settings(inference_steps=2, images_per_prompt=4, guidance_scale=1.5, drop=0.5)
    method = settings.build(model, PROGRAMMATIC["brightness"](), torch.Generator().manual_seed(0))
    batch = PromptSet(tiny.PROMPTS).batch([0, 1], 4)
    kept = [part for update in method.experience(batch) for part in update]
    assert all((part.cond[TOLD] == 1.5).all() for part in kept) and method.loss(kept[0]).total.isfinite()
    plain = raft.Settings(inference_steps=2).build(
        wrap_pipeline(tiny.sd_pipeline()), PROGRAMMATIC["brightness"](), torch.Generator()
    )
    assert TOLD not in plain.policy.told(plain.policy.model.null())
