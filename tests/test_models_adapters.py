"""LoRA and full training: gradients arrive, the reference is the old model, and saved files mean what they say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from peft import LoraConfig
from safetensors import safe_open

from tropism.base import Prediction
from tropism.guidance.cfg import Guided
from tropism.models.adapters import LORA_FILE, METADATA
from tropism.models.latent_pipeline import LatentPipeline
from tropism.models.pipelines import wrap_pipeline
from tropism.samplers.chain import walk
from tropism.samplers.ddim import DDIM
from tropism.samplers.flow import EulerODE

BUILDS = [tiny.sd_pipeline, tiny.sd3_pipeline]
families = pytest.mark.parametrize("build", BUILDS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
kinds = pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def prepared(build: Callable[[], Any], full: bool = False, dtype: torch.dtype = torch.float32) -> LatentPipeline:
    model = wrap_pipeline(build().to(dtype=dtype))
    model.train_full() if full else model.add_lora(rank=2, alpha=8, generator=seed())
    return model


def predict(model: LatentPipeline) -> Prediction:
    return model.denoiser(tiny.noise(2), torch.tensor([0.4, 0.9]), model.encode(tiny.PROMPTS))


def train(model: LatentPipeline, steps: int = 2) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        predict(model).x0.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def pictures(pipe: Any) -> torch.Tensor:
    images: torch.Tensor = pipe(tiny.PROMPTS, latents=tiny.noise(2), num_inference_steps=5, output_type="pt").images
    return images


@families
@dtypes
@kinds
def test_reference_is_the_model_before_training_bit_by_bit(build: Any, dtype: torch.dtype, full: bool) -> None:
    model = wrap_pipeline(build().to(dtype=dtype))
    with torch.no_grad():
        before = predict(model)
    model.train_full() if full else model.add_lora(rank=2, generator=seed())
    assert torch.equal(predict(model).eps, before.eps)  # the start is a no-op
    train(model)
    assert (predict(model).eps - before.eps).abs().max() > 1e-2
    with model.reference():
        assert torch.equal(predict(model).eps, before.eps)
        with model.reference():
            assert torch.equal(predict(model).x0, before.x0)
        assert torch.equal(predict(model).x0, before.x0)
    assert (predict(model).eps - before.eps).abs().max() > 1e-2


@kinds
def test_reference_ends_after_an_error_and_training_goes_on(full: bool) -> None:
    model = prepared(tiny.sd_pipeline, full)
    train(model)
    after = predict(model).eps.detach()
    with pytest.raises(RuntimeError, match="midway"), model.reference():
        raise RuntimeError("midway")
    assert torch.equal(predict(model).eps, after)
    predict(model).eps.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@families
@kinds
@dtypes
def test_parameters_are_float32_and_all_that_learns(build: Any, full: bool, dtype: torch.dtype) -> None:
    model = prepared(build, full, dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    learning = {
        id(p)
        for m in model.pipe.components.values()
        if isinstance(m, torch.nn.Module)
        for p in m.parameters()
        if p.requires_grad
    }
    assert learning == {id(parameter) for parameter in model.parameters()}
    assert not any(m.training for m in model.pipe.components.values() if isinstance(m, torch.nn.Module))
    net = getattr(model.pipe, model.part)
    assert not any(module.training for module in net.modules())


def test_nothing_is_trained_at_first() -> None:
    model = wrap_pipeline(tiny.sd_pipeline())
    assert model.parameters() == []
    with model.reference():
        predict(model)
    with pytest.raises(ValueError, match="add_lora"):
        model.save_adapter("nowhere")


@pytest.mark.parametrize(("build", "kernel"), [(tiny.sd_pipeline, DDIM(0.0)), (tiny.sd3_pipeline, EulerODE())])
def test_gradient_through_chain_and_decoder_is_the_slope(build: Any, kernel: Any) -> None:
    """A directional derivative of the pictures' loss in the LoRA's weights, against a central difference."""
    options = {"prediction_type": "v_prediction"} if build is tiny.sd_pipeline else {}
    model = prepared(lambda: build(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=seed(1)))
        model.pipe.vae.decoder.conv_out.weight.mul_(0.3)  # so that no pixel saturates
    rows, start, grid = model.encode(tiny.PROMPTS), tiny.noise(2), model.grid(3)

    def loss() -> torch.Tensor:
        *_, last = walk(kernel, Guided(model.denoiser, model.null(), 2.0), start, grid, rows)
        images = model.decode(last.x_next)
        assert images.min() > 0 and images.max() < 1
        return (images * torch.linspace(0, 1, tiny.IMAGE_SIZE)).sum()

    gradients = torch.autograd.grad(loss(), model.parameters())
    size = torch.stack([g.norm() for g in gradients]).norm()
    names = [name for name, parameter in getattr(model.pipe, model.part).named_parameters() if parameter.requires_grad]
    zero = {name.rsplit(".lora_", 1)[0] for name, g in zip(names, gradients, strict=True) if g.abs().max() == 0}
    assert zero <= {"transformer_blocks.1.attn.add_q_proj"}  # SD3's last block drops what the text asks
    ends = []
    for sign in (1, -2):
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.add_(sign * 0.003 * gradient / size)
            ends.append(loss())
    torch.testing.assert_close((ends[0] - ends[1]) / 0.006, size, rtol=5e-3, atol=0)


@families
@dtypes
def test_saved_lora_means_the_same_to_plain_diffusers(build: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    model = prepared(build, dtype=dtype)
    train(model)
    assert model.save_adapter(tmp_path / "new" / "folder") == tmp_path / "new" / "folder" / LORA_FILE
    plain = build()
    base = pictures(plain)
    plain.load_lora_weights(tmp_path / "new" / "folder")
    trained = pictures(plain)
    assert (trained - base).abs().max() > 1e-2
    same = prepared(build)
    same.load_adapter(tmp_path / "new" / "folder")
    torch.testing.assert_close(trained, pictures(same.pipe), rtol=0, atol=1e-4)
    if dtype == torch.float32:
        torch.testing.assert_close(trained, pictures(model.pipe), rtol=0, atol=1e-4)


@families
def test_saved_lora_keeps_rank_and_alpha_and_leaves_nothing_else(build: Any, tmp_path: Path) -> None:
    model = prepared(build)
    model.save_adapter(tmp_path)
    model.save_adapter(tmp_path)  # over the old one
    assert [file.name for file in tmp_path.iterdir()] == [LORA_FILE]
    with safe_open(str(tmp_path / LORA_FILE), framework="pt") as file:
        metadata = json.loads(file.metadata()[METADATA])
        names = list(file.keys())
    assert metadata[f"{model.part}.r"] == 2 and metadata[f"{model.part}.lora_alpha"] == 8
    assert metadata[f"{model.part}.target_modules"] == sorted(model.attention_targets)
    assert len(names) == len(model.parameters())
    assert all(name.startswith(model.part + ".") and ".lora_" in name for name in names)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared(tiny.sd_pipeline)
    file = model.save_adapter(tmp_path)
    old = file.read_bytes()
    train(model)

    def broken(folder: str, **_: Any) -> None:
        (Path(folder) / LORA_FILE).write_bytes(b"half a fi")
        raise OSError("disk full")

    monkeypatch.setattr(model.pipe, "save_lora_weights", broken)
    with pytest.raises(OSError, match="disk full"):
        model.save_adapter(tmp_path)
    assert file.read_bytes() == old and [entry.name for entry in tmp_path.iterdir()] == [LORA_FILE]


@families
@kinds
def test_load_adapter_continues_where_it_was(build: Any, full: bool, tmp_path: Path) -> None:
    model = prepared(build, full)
    train(model)
    model.save_adapter(tmp_path)
    model.save_adapter(tmp_path)
    again = prepared(build, full)
    identities = [id(parameter) for parameter in again.parameters()]
    again.load_adapter(tmp_path)
    assert [id(parameter) for parameter in again.parameters()] == identities
    for old, new in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(old, new) and new.dtype == torch.float32 and new.requires_grad
    assert torch.equal(predict(model).eps, predict(again).eps)
    with model.reference(), again.reference():
        assert torch.equal(predict(model).eps, predict(again).eps)


def test_load_adapter_alone_adds_the_saved_lora(tmp_path: Path) -> None:
    model = prepared(tiny.sd_pipeline)
    train(model)
    model.save_adapter(tmp_path)
    fresh = wrap_pipeline(tiny.sd_pipeline())
    fresh.load_adapter(tmp_path)
    assert torch.equal(predict(model).eps, predict(fresh).eps) and len(fresh.parameters()) == len(model.parameters())


@families
def test_full_weights_are_a_folder_that_diffusers_reads(build: Any, tmp_path: Path) -> None:
    model = prepared(build, full=True)
    train(model)
    folder = model.save_adapter(tmp_path)
    kind: Any = UNet2DConditionModel if build is tiny.sd_pipeline else SD3Transformer2DModel
    plain = build()
    base = pictures(plain)
    setattr(plain, model.part, kind.from_pretrained(folder))
    assert (pictures(plain) - base).abs().max() > 1e-3
    torch.testing.assert_close(pictures(plain), pictures(model.pipe), rtol=0, atol=1e-5)


@families
@kinds
def test_gradient_checkpointing_changes_no_gradient(build: Any, full: bool) -> None:
    def gradients(checkpointing: bool) -> tuple[list[torch.Tensor], list[str]]:
        model, calls = prepared(build, full), []
        train(model, 1)
        if checkpointing:
            model.enable_gradient_checkpointing()
        net = getattr(model.pipe, model.part)
        block = net.down_blocks[1].resnets[0] if model.part == "unet" else net.transformer_blocks[0]
        block.register_forward_pre_hook(lambda *_: calls.append("net"))  # recomputing stops before the end
        model.pipe.vae.decoder.mid_block.register_forward_pre_hook(lambda *_: calls.append("vae"))
        loss = model.decode(predict(model).x0).square().mean()
        return list(torch.autograd.grad(loss, model.parameters())), calls

    (plain, once), (saving, twice) = gradients(False), gradients(True)
    assert once == ["net", "vae"] and twice == ["net", "vae", "vae", "net"]
    for expected, got in zip(plain, saving, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)


@families
def test_targets_and_feed_forward(build: Any) -> None:
    def count(**options: Any) -> int:
        model = wrap_pipeline(build())
        model.add_lora(rank=1, **options)
        return len(model.parameters())

    assert 0 < count(targets=["to_q"]) < count() < count(feed_forward=True)


def test_lora_starts_from_its_generator_and_leaves_the_global_one() -> None:
    state = torch.get_rng_state()
    first, same, other = prepared(tiny.sd_pipeline), prepared(tiny.sd_pipeline), wrap_pipeline(tiny.sd_pipeline())
    other.add_lora(rank=2, alpha=8, generator=seed(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), same.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    down = [p for name, p in first.pipe.unet.named_parameters() if ".lora_A." in name]
    assert all(0.5 < p.abs().max() * p.shape[1] ** 0.5 <= 1 for p in down)


def test_refusals_of_add_lora() -> None:
    model = wrap_pipeline(tiny.sd_pipeline())
    with pytest.raises(ValueError, match="'to_z'"):
        model.add_lora(targets=["to_q", "to_z"])
    with pytest.raises(ValueError, match="rank must be at least 1; got 0"):
        model.add_lora(rank=0)
    model.add_lora()
    with pytest.raises(ValueError, match="trained already"):
        model.train_full()
    pipe = tiny.sd_pipeline()
    pipe.unet.add_adapter(LoraConfig(r=1, target_modules=["to_q"]), adapter_name="style")
    with pytest.raises(ValueError, match=r"adapters \['style'\].*fuse_lora"):
        wrap_pipeline(pipe).add_lora()


def test_an_earlier_lora_can_be_merged_and_is_then_the_reference(tmp_path: Path) -> None:
    first = prepared(tiny.sd_pipeline)
    train(first)
    first.save_adapter(tmp_path)
    pipe = tiny.sd_pipeline()
    pipe.load_lora_weights(tmp_path)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    model = wrap_pipeline(pipe)
    model.add_lora(rank=3, generator=seed())
    train(model)
    with model.reference():
        torch.testing.assert_close(predict(model).eps, predict(first).eps, rtol=0, atol=1e-4)
    assert (predict(model).eps - predict(first).eps).abs().max() > 1e-2


def test_refusals_of_load_adapter(tmp_path: Path) -> None:
    model = prepared(tiny.sd_pipeline)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=r"no pytorch_lora_weights\.safetensors in"):
        model.load_adapter(tmp_path / "missing")
    other = wrap_pipeline(tiny.sd_pipeline())
    other.add_lora(rank=4, alpha=8)
    other.save_adapter(tmp_path / "rank")
    with pytest.raises(ValueError, match="rank 4, this one 2"):
        model.load_adapter(tmp_path / "rank")
    other = wrap_pipeline(tiny.sd_pipeline())
    other.add_lora(rank=2, alpha=2)
    other.save_adapter(tmp_path / "alpha")
    with pytest.raises(ValueError, match="alpha 2, this one 8"):
        model.load_adapter(tmp_path / "alpha")
    prepared(tiny.sd3_pipeline).save_adapter(tmp_path / "family")
    with pytest.raises(ValueError, match=r"weights for \['transformer'\], wanted only unet"):
        model.load_adapter(tmp_path / "family")
    layers = {"unet_lora_layers": {"mid.to_q.lora_A.weight": torch.zeros(2, 2)}}
    model.pipe.save_lora_weights(tmp_path / "plain", **layers)
    with pytest.raises(ValueError, match="rank and alpha"):
        model.load_adapter(tmp_path / "plain")
    with pytest.raises(ValueError, match="train_full"):
        prepared(tiny.sd_pipeline, full=True).load_adapter(tmp_path / "rank")
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


@families
def test_the_pipeline_is_used_as_it_is(build: Any) -> None:
    pipe = build()
    parts, config = dict(pipe.components), dict(pipe.scheduler.config)
    forwards = {name: type(part).forward for name, part in parts.items() if isinstance(part, torch.nn.Module)}
    model = prepared(lambda: pipe)
    train(model, 1)
    with model.reference():
        predict(model)
    assert all(pipe.components[name] is part for name, part in parts.items())
    assert dict(pipe.scheduler.config) == config and "__call__" not in vars(pipe)
    for name, forward in forwards.items():
        assert "forward" not in vars(parts[name]) and type(parts[name]).forward is forward
