"""Every family: the same pictures as its own pipeline, and updates that plain diffusers (or PEFT) sees too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from families import MAIN, ROWS, Row, ours, theirs
from peft import PeftModel
from small_run import OWN_NETWORK, refused, said, train_words

from tropism import catalog
from tropism.data.prompts import PromptSet
from tropism.evaluate import deterministic, draw_images
from tropism.methods import alignprop, ddpo
from tropism.models.latent_pipeline import LatentPipeline
from tropism.plan import _try_one_move
from tropism.rewards import as_reward
from tropism.train import train


@pytest.mark.parametrize("name", ROWS)
def test_the_chain_is_that_of_the_pipeline(name: str) -> None:
    row = ROWS[name]
    model = row.model()
    expected = theirs(row, model.pipe)
    assert expected.std() > 0.02
    torch.testing.assert_close(ours(row, model), expected, rtol=0, atol=1e-4)


def updated(row: Row, settings: Any, full: bool = False) -> LatentPipeline:
    """A model after one batch of two prompts, with a reward that prefers red; its parameters have moved."""
    model = row.model()
    if full:
        model.train_full()
    else:
        model.add_lora(rank=2, alpha=4, generator=torch.Generator().manual_seed(0))
    settings.check()
    method = settings.build(model, as_reward(red, "red", True), torch.Generator().manual_seed(1))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    batch = PromptSet(tiny.PROMPTS).batch([0, 1], settings.images_per_prompt)
    train(method, [batch], torch.optim.AdamW(model.parameters(), lr=settings.learning_rate), steps=1)
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    return model


def red(images: torch.Tensor) -> torch.Tensor:
    """The mean of the first channel less that of the others; differentiable."""
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


SMALL: dict[str, Any] = dict(inference_steps=3, prompts_per_step=2, images_per_prompt=2, learning_rate=2e-2)
DDPO = ddpo.Settings(**SMALL, group_relative=True, updates=1)
ALIGNPROP = alignprop.Settings(**SMALL)


UPDATES = [(name, "ddpo") for name in (*MAIN, "sdxl-lcm")] + [(name, "alignprop") for name in (*MAIN, "pixart-sigma")]


@pytest.mark.parametrize(("name", "method"), UPDATES)
def test_an_update_is_saved_and_means_the_same_elsewhere(name: str, method: str, tmp_path: Path) -> None:
    row = ROWS[name]
    model = updated(row, DDPO if method == "ddpo" else ALIGNPROP)
    model.save_adapter(tmp_path)
    plain = row.build()
    base = theirs(row, plain)
    if row.peft:
        assert not hasattr(plain, "load_lora_weights")
        plain.transformer = PeftModel.from_pretrained(plain.transformer, tmp_path)
    else:
        plain.load_lora_weights(tmp_path)
    trained = theirs(row, plain)
    assert (trained - base).abs().max() > 1e-3
    torch.testing.assert_close(trained, ours(row, model), rtol=0, atol=1e-4)
    again = row.model()
    again.load_adapter(tmp_path)
    assert torch.equal(ours(row, again), ours(row, model))
    with model.reference():
        torch.testing.assert_close(ours(row, model), base, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["lcm", "sdxl", "flux-dev", "pixart-alpha"])
def test_all_the_weights_mean_the_same_elsewhere(name: str, tmp_path: Path) -> None:
    row = ROWS[name]
    model = updated(row, ALIGNPROP, full=True)
    folder, plain = model.save_adapter(tmp_path), row.build()
    base = theirs(row, plain)
    setattr(plain, model.part, type(getattr(plain, model.part)).from_pretrained(folder))
    assert (theirs(row, plain) - base).abs().max() > 1e-3
    torch.testing.assert_close(theirs(row, plain), ours(row, model), rtol=0, atol=1e-4)
    with model.reference():
        torch.testing.assert_close(ours(row, model), base, rtol=0, atol=1e-4)


def test_evaluation_of_a_consistency_model_does_not_depend_on_its_batches() -> None:
    model = ROWS["lcm"].model()
    text = [*tiny.PROMPTS, "a green hill"]
    drawn = [torch.cat(list(draw_images(deterministic(model, 3, None, size), text, 5))) for size in (1, 3)]
    torch.testing.assert_close(drawn[0], drawn[1], rtol=0, atol=1e-5)
    other = torch.cat(list(draw_images(deterministic(model, 3), text, 6)))
    assert (other - drawn[0]).abs().flatten(1).amax(1).min() > 1e-2


def test_a_decoder_that_overflows_in_float16_decodes_in_float32() -> None:
    exact, half = ROWS["sdxl"].model(), ROWS["sdxl"].model().to(torch.device("cpu"), torch.float16)
    assert half.pipe.vae.dtype == torch.float16 and half.pipe.vae.config.force_upcast
    with torch.no_grad():
        torch.testing.assert_close(half.decode(tiny.noise(2)), exact.decode(tiny.noise(2)), rtol=0, atol=2e-3)
    assert half.pipe.vae.dtype == torch.float32 and half.pipe.unet.dtype == torch.float16


def none_yet(prompts: Any, generator: torch.Generator) -> torch.Tensor:
    """Pictures of a method that is only built."""
    raise AssertionError("no picture was asked for")


@pytest.mark.parametrize("name", ["sd", "lcm", "flux-dev", "pixart-alpha"])
def test_methods_suit_as_the_table_says(name: str) -> None:
    row, model = ROWS[name], ROWS[name].model()
    model.add_lora(2)
    said = model.about.methods
    for method in set(catalog.method_names()) - OWN_NETWORK:
        settings = catalog.method_settings(method)(inference_steps=3)
        kind = "distillation" if method in catalog.distilling() and method not in row.without else method
        data = {"pictures": none_yet} if getattr(settings, "needs_pictures", False) else {}
        assert (kind in row.without) == (kind in said)
        if kind not in row.without:
            built = settings.build(model, as_reward(red, "red", True), torch.Generator(), **data)
            _try_one_move(built, tiny.PROMPTS[0])
            continue
        with pytest.raises((TypeError, ValueError)):
            built = settings.build(model, as_reward(red, "red", True), torch.Generator(), **data)
            _try_one_move(built, tiny.PROMPTS[0])


@pytest.mark.parametrize("name", ["lcm", "flux-dev", "pixart-sigma"])
def test_the_command_trains_and_draws(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ROWS[name].build().save_pretrained("model")
    Path("model/tropism.json").write_text(json.dumps({"steps": 2}))
    Path("prompts.txt").write_text("\n".join(tiny.PROMPTS))
    size = {"image_size": ["16", "16"], "drop_text_encoders": ""}
    result = said(train_words(out="run", eval_every="0", learning_rate="2e-2", steps="1", **size), capsys)
    assert result.code == 0, result.err
    drawn = []
    for adapter in ([], ["--adapter", "run"]):
        words = ["sample", "--model", "model", "--prompt", tiny.PROMPTS[0], "--image-size", "16", "16", *adapter]
        assert said([*words, "--out", f"{len(adapter)}.png"], capsys).code == 0
        drawn.append(Path(f"{len(adapter)}.png").read_bytes())
    assert drawn[0] != drawn[1]
    card = Path("run/README.md").read_text()
    assert "height=16, width=16" in card and ("PeftModel.from_pretrained" in card) == ROWS[name].peft


def test_a_size_that_is_no_whole_patch_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.flux_pipeline().save_pretrained(tmp_path / "model")
    words = train_words(model=str(tmp_path / "model"), prompts="scenes:4", image_size=["18", "16"])
    assert "image_size (18, 16) must be two positive multiples of 4 pixels" in refused(words, capsys)
    assert "image_size is (0, 16); wanted" in refused(train_words(image_size=["0", "16"]), capsys)
