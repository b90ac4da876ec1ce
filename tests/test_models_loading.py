"""Loading by folder: what is read, and the one sentence for everything that can be wrong with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline

from tropism.models.pipelines import load_pipeline, read_defaults, wrap_pipeline
from tropism.models.stable_diffusion import StableDiffusion
from tropism.models.stable_diffusion_3 import StableDiffusion3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.sd_folder(tmp_path_factory.mktemp("tiny") / "sd")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A folder of one's own to break."""
    return Path(shutil.copytree(folder, tmp_path / "sd"))


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading weights fails the test."""

    def reached(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were about to load")

    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", reached)


def test_a_folder_is_the_pipeline_that_was_saved(folder: Path) -> None:
    model = load_pipeline(folder)
    assert isinstance(model, StableDiffusion) and type(model.pipe) is StableDiffusionPipeline
    saved, loaded = tiny.sd_pipeline().unet.state_dict(), getattr(model.pipe, model.part).state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in loaded.items())
    assert (model.guidance_scale, model.steps) == (7.5, 50)
    assert not any(p.requires_grad for p in getattr(model.pipe, model.part).parameters())


@pytest.mark.parametrize("t5", [False, True])
def test_sd3_with_and_without_its_third_text_encoder(t5: bool, tmp_path: Path) -> None:
    model = load_pipeline(str(tiny.sd3_folder(tmp_path, t5=t5)), dtype=torch.bfloat16)
    assert isinstance(model, StableDiffusion3) and (model.pipe.text_encoder_3 is not None) == t5
    rows = model.encode(tiny.PROMPTS)
    assert rows["prompt_embeds"].shape == (2, tiny.TOKENS + 256, 32) and rows["pooled"].shape == (2, 24)
    assert rows["prompt_embeds"].dtype == torch.bfloat16
    assert (rows["prompt_embeds"][:, tiny.TOKENS :] == 0).all() != t5


def test_a_part_can_be_left_out(tmp_path: Path) -> None:
    folder = tiny.sd3_folder(tmp_path, t5=True)
    shutil.rmtree(folder / "text_encoder_3")
    shutil.rmtree(folder / "tokenizer_3")
    assert load_pipeline(folder, text_encoder_3=None, tokenizer_3=None).pipe.text_encoder_3 is None


def test_a_part_can_be_given(copy: Path) -> None:
    shutil.rmtree(copy / "vae")
    vae = tiny.sd_pipeline(seed=1).vae
    assert load_pipeline(copy, vae=vae).pipe.vae is vae


def test_defaults_travel_with_the_folder(copy: Path) -> None:
    (copy / "tropism.json").write_text(json.dumps({"guidance_scale": 3.5, "steps": 20}))
    model = load_pipeline(copy)
    assert (model.guidance_scale, model.steps) == (3.5, 20)
    assert load_pipeline(copy, guidance_scale=2.0, steps=9).guidance_scale == 2.0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"guidance": 3}', r"\['guidance'\]; wanted guidance_scale, steps, hops, told and base"),
        ('{"steps": 2.5}', "wanted a whole number"),
        ('{"guidance_scale": "3"}', "wanted a positive number"),
        ('{"guidance_scale": NaN}', "wanted a positive number"),
        ("[3]", "wanted a JSON object"),
        ("{", "is not JSON"),
    ],
)
def test_wrong_defaults(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "tropism.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        read_defaults(tmp_path)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("missing", ["/no/such/folder", "./no-such", "a/b/c", "some folder"])
def test_missing_folder(missing: str) -> None:
    with pytest.raises(ValueError, match=f"there is no folder {missing.removeprefix('./')}|{missing}"):
        load_pipeline(missing)


@pytest.mark.usefixtures("no_weights")
def test_unknown_hub_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str) -> None:
        raise OSError("offline")

    monkeypatch.setattr("tropism.models.pipelines.DiffusionPipeline.load_config", offline)
    with pytest.raises(ValueError, match="no folder owner/model and no such model on the hub"):
        load_pipeline("owner/model")


@pytest.mark.usefixtures("no_weights")
def test_wrong_folders(copy: Path) -> None:
    with pytest.raises(ValueError, match="is a file; wanted a folder"):
        load_pipeline(copy / "model_index.json")
    with pytest.raises(ValueError, match=r"unet has no model_index\.json"):
        load_pipeline(copy / "unet")
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "_class_name": "FluxKontextPipeline"}))
    with pytest.raises(ValueError, match="is a FluxKontextPipeline; wanted one of StableDiffusionPipeline, Latent"):
        load_pipeline(copy)


@pytest.mark.usefixtures("no_weights")
def test_wrong_parts(copy: Path) -> None:
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    sound = weights.read_bytes()
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123456\n")
    with pytest.raises(ValueError, match=r"not a sound safetensors file.*git-lfs"):
        load_pipeline(copy)
    weights.write_bytes(sound[:-100])
    with pytest.raises(ValueError, match="not a sound safetensors file"):
        load_pipeline(copy)
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match=r"no \.safetensors file, only config\.json, diffusion_pytorch_model\.bin"):
        load_pipeline(copy)
    shutil.rmtree(copy / "unet")
    with pytest.raises(ValueError, match=r"has no unet although its model_index\.json names one"):
        load_pipeline(copy)


def test_pipelines_that_work_differently() -> None:
    pipe = tiny.sd_pipeline()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler has no betas"):
        wrap_pipeline(pipe)
    pipe.scheduler = EulerDiscreteScheduler(prediction_type="v_prediction")
    assert wrap_pipeline(pipe).grid(20).shape == (21,)
    pipe.scheduler = type(tiny.sd_pipeline().scheduler)(clip_sample=True)
    with pytest.raises(ValueError, match="clips latents"):
        wrap_pipeline(pipe)
    pipe = tiny.sd3_pipeline(use_karras_sigmas=True)
    with pytest.raises(ValueError, match=r"sets \['use_karras_sigmas'\]"):
        wrap_pipeline(pipe)
    pipe.scheduler = EulerDiscreteScheduler()
    with pytest.raises(ValueError, match="wanted FlowMatchEulerDiscreteScheduler"):
        wrap_pipeline(pipe)


@pytest.mark.parametrize("image_size", [(16, 15), (0, 16), (18, 16)])
def test_wrong_image_size(image_size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="two positive multiples of 4 pixels"):
        wrap_pipeline(tiny.sd3_pipeline(), image_size=image_size)
