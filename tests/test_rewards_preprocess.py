"""Preprocessing against transformers' image processor; and the tiny CLIP that the other tests of CLIP rewards use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tropism.rewards import Preprocess, RewardError

SIDE, LENGTH = 32, 12
MERGES = ["f o", "fo x</w>", "r e", "re d</w>", "c u", "cu b", "a b", "l e</w>"]


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    alphabet = sorted(ByteLevel.alphabet())
    pieces = [*alphabet, *(letter + "</w>" for letter in alphabet), *(merge.replace(" ", "") for merge in MERGES)]
    vocab = {piece: index for index, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]))
    tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder)
    return tokenizer


def tiny_config(tokenizer: CLIPTokenizer) -> CLIPConfig:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id, "pad_token_id": 0}
    return CLIPConfig(
        text_config={
            **shape,
            **ends,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": LENGTH,
            "hidden_act": "gelu",
        },
        vision_config={**shape, "image_size": SIDE, "patch_size": 8, "hidden_act": "gelu"},
        projection_dim=16,
    )


def clip_folder(path: Path) -> Path:
    """A CLIP folder as the hub has them: weights, tokenizer, preprocessor_config.json."""
    tokenizer = write_tokenizer(path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(tiny_config(tokenizer))
    for name, value in model.named_parameters():  # large enough that pictures and prompts matter
        if value.ndim >= 2:
            value.data.mul_(3 if "embedding" in name else 1.5)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    size: dict[str, Any] = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    CLIPImageProcessorPil(**size, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]).save_pretrained(path)
    return path


def pictures(batch: int, height: int = 40, width: int = 56, seed: int = 0) -> Tensor:
    """Blobs with some noise, exact bytes."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, 3, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
    noisy = smooth + 0.1 * torch.randn(smooth.shape, generator=generator)
    return (noisy.clamp(0, 1) * 255).round() / 255


def processed(folder: Path, images: Tensor) -> Tensor:
    files = [Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy()) for image in images]
    result: Tensor = CLIPImageProcessorPil.from_pretrained(folder)(files, return_tensors="pt")["pixel_values"]
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.mark.parametrize(("height", "width"), [(40, 56), (57, 33), (64, 64), (128, 96), (20, 24), (SIDE, SIDE)])
def test_preprocessing_is_close_to_the_image_processor(folder: Path, height: int, width: int) -> None:
    images = pictures(2, height, width)
    settings = CLIPImageProcessorPil.from_pretrained(folder).to_dict()
    ours, theirs = Preprocess.of(settings)(images), processed(folder, images)
    gap = ((ours - theirs) * torch.tensor([0.2, 0.3, 0.4])[:, None, None]).abs() * 255  # in bytes
    assert ours.shape == theirs.shape == (2, 3, SIDE, SIDE)
    resized = (height, width) != (SIDE, SIDE)  # Pillow rounds twice, half a byte each
    assert gap.max() <= (1.05 if resized else 1e-3)
    assert gap.mean() <= 0.35


def test_preprocessing_of_old_settings_exact_sizes_and_black_borders() -> None:
    old = Preprocess.of({"size": 32, "crop_size": 32, "image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    assert old.size == 32
    assert old.crop == (32, 32)
    assert old.mean == (0.5, 0.5, 0.5)
    squeezed = Preprocess.of({"size": {"height": 8, "width": 12}, "do_center_crop": False, "do_normalize": False})
    flat = torch.full((1, 3, 20, 20), 0.25)
    torch.testing.assert_close(squeezed(flat), torch.full((1, 3, 8, 12), 0.25))
    whole = Preprocess(size=8, crop=(8, 8), mean=(0.0,) * 3, std=(1.0,) * 3, longest=True)
    bordered = whole(torch.ones(1, 3, 8, 16))[0, 0]
    assert bordered.sum() == 4 * 8
    assert bordered[2:6].min() == 1.0
    assert Preprocess().size == 224


@pytest.mark.parametrize(
    "settings", [{"resample": 1}, {"do_rescale": False}, {"rescale_factor": 1 / 127.5}, {"size": {"longest_edge": 9}},
                 {"size": {"shortest_edge": 9, "longest_edge": 20}}]
)  # fmt: skip
def test_preprocessing_refuses_what_it_cannot_follow(settings: dict[str, Any]) -> None:
    with pytest.raises(RewardError, match="the image processor"):
        Preprocess.of(settings)
