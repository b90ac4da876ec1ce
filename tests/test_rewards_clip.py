"""CLIP rewards on a tiny CLIP with a real BPE tokenizer: equal to transformers' own logits, gradients to the pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_rewards_preprocess import LENGTH, clip_folder, pictures, processed
from torch import Tensor, nn
from transformers import CLIPModel, SiglipConfig, SiglipModel

from tropism.base import Reward
from tropism.models.clip_rewards import ClipScore, HPSv2, LaionAesthetic, PickScore
from tropism.rewards import Preprocess, RewardError
from tropism.rewards.clip import ClipText

PROMPTS = ["a red fox", "two blue cubes on a table", "a red fox", "a very long story of a fox " * 9]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def clip(folder: Path) -> ClipScore:
    return ClipScore.from_pretrained(folder)


def logits(reward: ClipText, pixels: Tensor, prompts: list[str]) -> Tensor:
    """transformers' own forward pass, the diagonal."""
    tokens = reward.tokenizer(prompts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
    with torch.no_grad():
        result: Tensor = reward.model(pixel_values=pixels, **tokens).logits_per_image.diagonal()
    return result


# Scores.


def test_scores_are_transformers_logits_for_the_same_pixels(clip: ClipScore, folder: Path) -> None:
    images = pictures(4)
    wanted = logits(clip, clip.preprocess(images), PROMPTS)
    pick, hps = PickScore.from_pretrained(folder), HPSv2.from_pretrained(folder)
    hps.preprocess = clip.preprocess
    scale = float(clip.model.logit_scale.exp())
    found = {
        "clip": clip(images, PROMPTS) / 100 * scale,
        "pick": pick(images, PROMPTS),
        "hps": hps(images, PROMPTS) * scale,
    }
    assert wanted.std() > 0.5, "a constant would prove nothing"
    for name, values in found.items():
        assert values.shape == (4,) and values.dtype == torch.float32, name
        torch.testing.assert_close(values, wanted, atol=1e-5, rtol=1e-5)
    plain = ClipScore(clip.model, clip.tokenizer, clip.preprocess, multiplier=1.0)
    torch.testing.assert_close(plain(images, PROMPTS), clip(images, PROMPTS) / 100)
    assert ClipScore(clip.model, clip.tokenizer).preprocess == Preprocess(size=32, crop=(32, 32))
    assert all(isinstance(reward, Reward) and reward.differentiable for reward in (clip, pick, hps, plain))


def test_scores_are_close_to_the_whole_transformers_pipeline(clip: ClipScore, folder: Path) -> None:
    images = pictures(4)
    wanted = logits(clip, processed(folder, images), PROMPTS) / clip.model.logit_scale.exp() * 100
    assert (clip(images, PROMPTS) - wanted).abs().max() < 0.02 * wanted.std()


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_micro_batches_change_nothing(clip: ClipScore, batch_size: int) -> None:
    images = pictures(4).requires_grad_()
    small = ClipScore(clip.model, clip.tokenizer, clip.preprocess, batch_size=batch_size)
    values, wanted = small(images, PROMPTS), clip(images, PROMPTS)
    torch.testing.assert_close(values, wanted, atol=1e-4, rtol=1e-5)
    gradients = [torch.autograd.grad(v.sum(), images)[0] for v in (values, wanted)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def test_long_prompts_are_cut_where_the_tokenizer_cuts(clip: ClipScore) -> None:
    tokens = clip._tokens([PROMPTS[3]])["input_ids"]
    assert tokens.shape == (1, LENGTH)
    assert tokens[0, -1] == clip.tokenizer.eos_token_id
    images = pictures(2)
    values = clip(images, [PROMPTS[3], PROMPTS[3] + " and a cube"])
    torch.testing.assert_close(values[:1], clip(images[:1], [PROMPTS[3]]))
    torch.testing.assert_close(clip.embed_text([PROMPTS[3]]), clip.embed_text([PROMPTS[3] + " and a cube"]))


def test_prompts_are_embedded_once(clip: ClipScore, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = ClipScore(clip.model, clip.tokenizer, clip.preprocess)
    seen: list[int] = []
    original = clip.model.get_text_features

    def counted(input_ids: Tensor, **rest: Tensor) -> Any:
        seen.append(len(input_ids))
        return original(input_ids, **rest)

    monkeypatch.setattr(clip.model, "get_text_features", counted)
    images = pictures(4)
    with torch.inference_mode():
        first = reward(images, PROMPTS)
    assert seen == [3]
    assert torch.equal(reward(images, PROMPTS), first)
    assert seen == [3]
    reward(images.requires_grad_(), PROMPTS).sum().backward()  # embeddings kept from inference mode still serve
    monkeypatch.setattr("tropism.rewards.clip.CACHED_PROMPTS", 4)
    torch.testing.assert_close(reward(images, ["x", "y", *PROMPTS[:2]])[2:], reward(images[2:], PROMPTS[:2]))
    assert len(reward._texts) <= 4


# Gradients.


def test_the_gradient_to_the_pixels_is_right(folder: Path) -> None:
    reward = ClipScore.from_pretrained(folder, dtype=torch.float64)
    images = (0.3 + 0.4 * pictures(2).double()).requires_grad_()  # resizing overshoots nowhere: no kink
    (gradient,) = torch.autograd.grad(reward.cosine(images, PROMPTS[:2]).sum(), images)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        direction = torch.randn(images.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            ends = [float(reward.cosine(images + step * direction, PROMPTS[:2]).sum()) for step in (1e-5, -1e-5)]
        assert float((gradient * direction).sum()) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)
    assert gradient.flatten(1).norm(dim=1).min() > 1e-3


def test_a_gradient_step_raises_the_score(clip: ClipScore) -> None:
    images = pictures(2).requires_grad_()
    before = clip(images, PROMPTS[:2])
    (gradient,) = torch.autograd.grad(before.sum(), images)
    after = clip((images + 0.01 * gradient.sign()).clamp(0, 1), PROMPTS[:2])
    assert (after > before).all()


def test_only_the_pixels_get_gradients(clip: ClipScore) -> None:
    assert not any(parameter.requires_grad for parameter in clip.model.parameters())
    assert not clip.model.training
    assert not clip(pictures(2), PROMPTS[:2]).requires_grad
    images = pictures(2).requires_grad_()
    clip(images, PROMPTS[:2]).sum().backward()
    assert images.grad is not None
    assert all(parameter.grad is None for parameter in clip.model.parameters())
    with torch.no_grad():
        assert not clip(images, PROMPTS[:2]).requires_grad


def test_lower_precision_and_autocast(folder: Path, clip: ClipScore) -> None:
    images = pictures(4)
    wanted = clip(images, PROMPTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(clip(images, PROMPTS), wanted, atol=0, rtol=0)
    half = PickScore.from_pretrained(folder, dtype=torch.bfloat16)
    values = half(images.bfloat16(), PROMPTS)
    assert half.model.dtype == torch.bfloat16
    assert values.dtype == torch.float32
    assert half.multiplier == pytest.approx(float(clip.model.logit_scale.exp()), rel=1e-6)
    assert (values / half.multiplier * 100 - wanted).abs().max() < 2.0  # bfloat16 has 8 bits


# Mistakes.


def test_missing_folders_and_parts_are_one_sentence(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    CLIPModel.from_pretrained(folder).save_pretrained(bare)
    cases: list[tuple[Any, str]] = [
        (
            lambda: ClipScore.from_pretrained(tmp_path / "none"),
            "there is no folder .*none; wanted a folder or hub name",
        ),
        (lambda: ClipScore.from_pretrained(bare), "could not load the image processor from the folder"),
        (lambda: ClipScore.from_pretrained("./nowhere at all"), "'./nowhere at all', which is no local folder"),
        (lambda: HPSv2.from_open_clip(tmp_path / "none.pt", folder), "there is no file"),
        (lambda: LaionAesthetic.from_pretrained(folder, tmp_path / "none.pth"), "there is no folder .*none.pth"),
        (lambda: ClipScore(nn.Linear(1, 1), None), "Linear is not a CLIP"),
        (lambda: ClipScore.from_pretrained(folder, batch_size=0), "batch size is 0"),
    ]
    for build, message in cases:
        with pytest.raises(RewardError, match=message) as caught:
            build()
        assert "\n" not in str(caught.value)
    assert PickScore.from_pretrained(bare, processor=folder)(pictures(1), ["a fox"]).isfinite().all()


def test_siglip_is_refused() -> None:
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = SiglipModel(SiglipConfig(text_config={**small, "vocab_size": 8}, vision_config={**small, "image_size": 16}))
    with pytest.raises(RewardError, match="SiglipModel reads padded text another way"):
        ClipScore(model, None)


def test_wrong_pictures_are_refused(clip: ClipScore) -> None:
    with pytest.raises(RewardError, match="clip_score got 2 images and 1 prompts"):
        clip(pictures(2), ["a"])
    with pytest.raises(RewardError, match="divide bytes by 255"):
        clip((pictures(2) * 255).byte(), PROMPTS[:2])
