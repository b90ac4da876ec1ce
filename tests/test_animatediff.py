"""Clip models: film strips, the LoRA of the image model inside, motion modules trained alone, and what is saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import MotionAdapter
from families import ROWS, ours, start_of, theirs, v_clips, v_sd
from safetensors.torch import load_file
from small_run import REWARDS, refused, said, train_words

from tropism.catalog import describe_model
from tropism.methods import animate_lcm
from tropism.models.motion import MODULES
from tropism.models.pipelines import load_pipeline, wrap_pipeline
from tropism.models.toy import ToyNet, ToyTextToImage
from tropism.models.toy_clips import Mixer, ToyClips, clips, motion_error
from tropism.policy import Policy
from tropism.samplers import solver

SIZE = (tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)


def clip_model() -> Any:
    return wrap_pipeline(v_clips(), image_size=SIZE)


@pytest.fixture(scope="module")
def spatial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of the image model with something in it, as stage 1 leaves one."""
    folder = tmp_path_factory.mktemp("stage-1")
    model = wrap_pipeline(v_sd())
    model.add_lora(2, generator=torch.Generator().manual_seed(0))
    disturb(model.parameters())
    model.save_adapter(folder)
    return folder


@torch.no_grad()
def disturb(parameters: Any, seed: int = 5) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def test_a_strip_is_made_of_the_frames_and_read_back() -> None:
    model = clip_model()
    latents = start_of(model.pipe)
    assert model.latent_shape == (4, tiny.FRAMES, 8, 8)
    with torch.no_grad():
        strips = model.decode(latents)
        frames = [super(type(model), model).decode(latents[:, :, f]) for f in range(tiny.FRAMES)]
    assert strips.shape == (2, 3, 16, 16 * tiny.FRAMES)
    torch.testing.assert_close(strips, torch.cat(frames, dim=3), rtol=0, atol=1e-5)
    found = model.latents(strips)
    assert found.shape == latents.shape
    image = wrap_pipeline(v_sd(), image_size=SIZE)
    torch.testing.assert_close(found[:, :, 1], image.latents(strips[..., 16:32]), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"do not hold this model's 3 frames of 16 x 16; wanted \(16, 48\)"):
        model.latents(strips[..., :32])


def test_a_lora_fits_the_image_model_and_the_clip_model(spatial: Path, tmp_path: Path) -> None:
    model, plain = clip_model(), v_clips()
    model.load_adapter(spatial)
    assert not [name for name, _ in model.pipe.unet.named_parameters() if MODULES in name and ".lora_" in name]
    plain.load_lora_weights(spatial)
    torch.testing.assert_close(ours(ROWS["animatediff"], model), theirs(ROWS["animatediff"], plain), rtol=0, atol=1e-4)
    model.save_adapter(tmp_path)
    image = wrap_pipeline(v_sd())
    image.load_adapter(tmp_path)
    for mine, saved in zip(image.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, saved)


def test_only_motion_modules_are_trained_and_the_reference_is_as_it_was(spatial: Path) -> None:
    model = clip_model()
    before = ours(ROWS["animatediff"], model)
    others = {n: v.clone() for n, v in model.pipe.unet.state_dict().items() if MODULES not in n}
    model.train_motion(spatial)
    names = {name for name, value in model.pipe.unet.named_parameters() if value.requires_grad}
    assert names and all(MODULES in name for name in names) and len(names) == len(model.parameters())
    with_lora = ours(ROWS["animatediff"], model)
    assert (with_lora - before).abs().max() > 1e-3
    with model.spatial(0.0):
        torch.testing.assert_close(ours(ROWS["animatediff"], model), before, rtol=0, atol=1e-6)
    assert torch.equal(ours(ROWS["animatediff"], model), with_lora)
    disturb(model.parameters())
    assert (ours(ROWS["animatediff"], model) - with_lora).abs().max() > 1e-3
    with model.reference():
        assert torch.equal(ours(ROWS["animatediff"], model), before)
    now = model.pipe.unet.state_dict()
    assert all(torch.equal(value, now[n if n in now else based(n)]) for n, value in others.items())


def based(name: str) -> str:
    """What PEFT calls the weight of a layer that it adapts."""
    layer, _, weight = name.rpartition(".")
    return f"{layer}.base_layer.{weight}"


def test_what_is_saved_draws_the_same_in_plain_diffusers(spatial: Path, tmp_path: Path) -> None:
    row, model = ROWS["animatediff-lcm"], clip_model()
    model.train_motion(spatial)
    disturb(model.parameters())
    student = model.few_step("consistency", 4)
    student.save_adapter(tmp_path)
    assert json.loads((tmp_path / "tropism.json").read_text())["hops"] == "consistency"
    plain = row.build()
    assert type(plain.scheduler).__name__ == "LCMScheduler"
    plain.load_lora_weights(tmp_path)
    plain.unet.load_motion_modules(MotionAdapter.from_pretrained(tmp_path / "motion_adapter"))
    torch.testing.assert_close(theirs(row, plain), ours(row, student), rtol=0, atol=1e-4)
    again = clip_model()
    again.load_adapter(tmp_path)
    assert torch.equal(ours(row, again.few_step("consistency", 4)), ours(row, student))
    lines = "\n".join(student.use("'base'", str(tmp_path), False, "a red fox"))
    compile(lines, "use", "exec")
    assert "load_motion_modules" in lines and "LCMScheduler" in lines and "num_frames=3" in lines


def test_in_bfloat16_the_start_is_the_reference(spatial: Path) -> None:
    model = wrap_pipeline(v_clips().to(torch.bfloat16), image_size=SIZE)
    model.train_motion()
    with model.reference():
        before = ours(ROWS["animatediff"], model)
    assert torch.equal(ours(ROWS["animatediff"], model), before)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_the_lora_enters_the_target_as_if_it_were_averaged() -> None:
    """An average that starts at W, of weights that are W + B A all along, in float64."""
    generator = torch.Generator().manual_seed(0)
    image = ToyTextToImage(ToyNet(generator).double(), torch.randn(8, 16, generator=generator))
    model = ToyClips(image, torch.nn.ModuleList(Mixer(generator) for _ in range(3)).double())
    model.train_motion(ToyNet(generator).double())
    average = animate_lcm.LateSpatial(model, 0.9)
    name = "layers.1.weight"
    start, student = model._weight(name, before=True), model._weight(name, before=False)
    wanted = start.clone()
    for updates in range(5):
        assert average.share == pytest.approx(1 - 0.9**updates)
        with average.swapped():
            torch.testing.assert_close(model._weight(name, before=False), wanted, rtol=0, atol=1e-14)
        assert torch.equal(model._weight(name, before=False), student)
        average.update()
        wanted = 0.9 * wanted + 0.1 * student
    fresh = animate_lcm.LateSpatial(model, 0.9)
    fresh.load_state_dict(average.state_dict())
    assert fresh.share == average.share


def test_drawn_clips_of_the_toy_have_no_motion_error() -> None:
    prompts = torch.arange(8).repeat(256)
    drawn = clips(prompts, torch.Generator().manual_seed(0))
    assert motion_error(drawn, prompts).max() < 1e-4
    mixed = torch.stack([drawn[:, f].roll(8 * f, 0) for f in range(4)], dim=1)  # frames of different clips
    assert float(motion_error(mixed, prompts).square().mean().sqrt()) == pytest.approx(4.64, rel=0.05)


@pytest.fixture
def place(spatial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clip model that borrows what it can from an image model, prompts, and a run of stage 1."""
    monkeypatch.chdir(tmp_path)
    v_sd().save_pretrained("image")
    v_clips().save_pretrained("model")
    for part in ("unet", "vae", "text_encoder", "tokenizer"):
        shutil.rmtree(f"model/{part}")
    index = json.loads(Path("model/model_index.json").read_text())
    index["unet"] = ["diffusers", "UNet2DConditionModel"]
    index |= {"feature_extractor": [None, None], "image_encoder": [None, None]}
    Path("model/model_index.json").write_text(json.dumps(index))
    Path("model/tropism.json").write_text(json.dumps({"steps": 3, "guidance_scale": 2.0, "base": "../image"}))
    Path("prompts.txt").write_text("a red fox\ntwo blue cubes\na green hill\n")
    Path("rewards.py").write_text(REWARDS)
    shutil.copytree(spatial, "stage-1/adapter")
    return tmp_path


def test_a_folder_takes_what_it_lacks_from_its_base(place: Path) -> None:
    model = load_pipeline("model", image_size=SIZE, guidance_scale=7.5)
    torch.testing.assert_close(ours(ROWS["animatediff"], model), theirs(ROWS["animatediff"], v_clips()))
    lines = [line for line in model.use("'model'", "none", False, "a red fox") if line.startswith(("from", "pipe ="))]
    known: dict[str, Any] = {}
    exec("\n".join(lines), known)
    assert type(known["pipe"]) is type(model.pipe)
    facts = describe_model("model")
    assert facts["family"].startswith("AnimateDiff") and facts["defaults"] == "3 steps, guidance 2"
    shutil.move("image", "elsewhere")
    with pytest.raises(ValueError, match=r"gives base as '\.\./image', which is no pipeline; wanted its folder"):
        load_pipeline("model")


SMALL: dict[str, Any] = dict(image_size=["16", "16"], student_steps="1", updates="2", lr_schedule="constant")


def test_the_command_distils_goes_on_and_draws(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for out, steps in (("whole", "2"), ("parts", "1")):
        words = train_words("animate-lcm", spatial="stage-1", out=out, steps=steps, **SMALL)
        result = said(words, capsys)
        assert result.code == 0, result.err
    assert said(["train", "animate-lcm", "--resume", "parts", "--steps", "2"], capsys).code == 0
    files = ("motion_adapter/diffusion_pytorch_model.safetensors", "pytorch_lora_weights.safetensors")
    for file in files:
        whole, parts = (load_file(Path(run) / "adapter" / file) for run in ("whole", "parts"))
        assert whole and all(torch.equal(value, parts[name]) for name, value in whole.items())
    first = load_file(Path("stage-1/adapter") / files[1])
    assert all(torch.equal(value, first[name]) for name, value in load_file(Path("whole/adapter") / files[1]).items())
    was = load_file("model/motion_adapter/diffusion_pytorch_model.safetensors")
    now = load_file(Path("whole/adapter") / files[0])
    assert now.keys() == was.keys() and any(not torch.equal(value, was[name]) for name, value in now.items())
    words = ["sample", "--model", "model", "--adapter", "whole", "--prompt", "a red fox", "--image-size", "16", "16"]
    assert said([*words, "--out", "clip.png"], capsys).code == 0
    assert "load_motion_modules" in Path("whole/README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"spatial": None}, "spatial is not given; wanted the run of stage 1"),
        ({"spatial": "nowhere"}, "there is no pytorch_lora_weights.safetensors in nowhere"),
        ({"full": ""}, "full is given, and animate-lcm says itself which weights are trained"),
        ({"model": "image"}, "StableDiffusion draws single images, and animate-lcm trains motion modules"),
        ({"skip": "9"}, "skip is 9 and target_decay 0.95; wanted 1 to inference_steps"),
    ],
)
def test_bad_input_is_one_sentence(
    changes: dict[str, Any], sentence: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = train_words("animate-lcm", **{"spatial": "stage-1", **SMALL, **changes})
    assert sentence in refused(words, capsys)


def test_wrong_adapters_are_refused(spatial: Path, tmp_path: Path) -> None:
    model = clip_model()
    settings = animate_lcm.Settings(inference_steps=3, student_steps=1, spatial="here")
    with pytest.raises(ValueError, match="no motion modules are trained beside a LoRA of the image model"):
        settings.build(model, None, torch.Generator())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no motion modules are trained here"):
        model.spatial(0.5)
    model.add_lora(2, targets=["motion_modules.0.transformer_blocks.0.attn1.to_q"])
    model.save_adapter(tmp_path)
    with pytest.raises(ValueError, match="adapts motion modules; wanted one that was trained on the image model"):
        clip_model().train_motion(tmp_path)
    saved = clip_model()
    saved.train_motion(spatial)
    saved.save_adapter(tmp_path / "with")
    without = clip_model()
    without.train_motion()
    with pytest.raises(ValueError, match="has a LoRA of the image model beside its motion modules"):
        without.load_adapter(tmp_path / "with")
    pipe = v_clips()
    pipe.motion_adapter = None
    with pytest.raises(ValueError, match="the pipeline has no motion_adapter"):
        wrap_pipeline(pipe)


def test_the_student_answers_in_the_moves_that_it_was_made_for(spatial: Path) -> None:
    model = clip_model()
    model.train_motion(spatial)
    settings = animate_lcm.Settings(inference_steps=4, student_steps=2, spatial="here", prompts_per_step=2)
    method = settings.build(model, None, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    assert isinstance(method.policy, Policy) and method.policy.steps == 2
    assert method.policy.kernel == solver(method.policy.model.denoiser)
    with method.judging():  # before the first update the target is the teacher, with a consistency model's answer
        judged = ours(ROWS["animatediff-lcm"], method.policy.model)
    with model.reference():
        assert (ours(ROWS["animatediff-lcm"], method.policy.model) - judged).abs().max() < 1e-5
