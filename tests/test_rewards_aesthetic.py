"""The aesthetic predictor: a chain of linear layers, sizes from its file, on the normalised embedding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_rewards_preprocess import clip_folder, pictures
from torch import nn

from tropism.base import Reward
from tropism.models.clip_rewards import LaionAesthetic
from tropism.rewards import RewardError, linear_head


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_aesthetic_is_the_chain_on_the_normalised_embedding(folder: Path, tmp_path: Path, suffix: str) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes, indices = [16, 12, 8, 4, 1], [0, 2, 4, 6]
    head = {}
    for index, wide, narrow in zip(indices, sizes, sizes[1:], strict=False):
        head[f"layers.{index}.weight"] = torch.randn(narrow, wide, generator=generator)
        head[f"layers.{index}.bias"] = torch.randn(narrow, generator=generator)
    file = tmp_path / f"head{suffix}"

    save_file(head, file) if suffix == ".safetensors" else torch.save(head, file)
    reward = LaionAesthetic.from_pretrained(folder, file)
    images = pictures(3).requires_grad_()
    with torch.no_grad():
        x = reward.model.get_image_features(pixel_values=reward.preprocess(images)).pooler_output
        x = x / x.norm(dim=-1, keepdim=True)
        for index in indices:
            x = x @ head[f"layers.{index}.weight"].T + head[f"layers.{index}.bias"]
    values = reward(images, ["", "", ""])
    torch.testing.assert_close(values.detach(), x[:, 0], atol=1e-4, rtol=1e-5)
    assert torch.equal(values, reward(images, ["", "", ""])), "dropouts are off"
    assert isinstance(reward, Reward)
    assert values.detach().std() > 0.01
    values.sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    left_training = LaionAesthetic(reward.model, reward.head.train(), reward.preprocess)
    torch.testing.assert_close(left_training(images, ["", "", ""]), values)
    assert not any(parameter.requires_grad for parameter in reward.head.parameters())
    with pytest.raises(RewardError, match="takes 5 numbers; this CLIP embeds into 16"):
        LaionAesthetic(reward.model, nn.Linear(5, 1))


def test_a_linear_head_must_chain() -> None:
    for shapes in ([(4, 3), (1, 5)], [(4, 3), (2, 4)], []):
        with pytest.raises(RewardError, match="not a chain of linear layers"):
            linear_head({f"layers.{i}.weight": torch.zeros(shape) for i, shape in enumerate(shapes)})
    with pytest.raises(RewardError, match="do not fit"):
        linear_head({"0.weight": torch.zeros(1, 3), "0.scale": torch.zeros(1)})
    dropped = linear_head({"layers.0.weight": torch.ones(4, 3), "layers.2.weight": torch.ones(1, 4)})
    assert len(dropped) == 3
    assert not dropped.training
    single = linear_head({"weight": torch.ones(1, 3), "bias": torch.ones(1)})
    assert single(torch.ones(2, 3)).tolist() == [[4.0], [4.0]]
    assert linear_head({"layers.0.weight": torch.ones(1, 3)})(torch.ones(2, 3)).tolist() == [[3.0], [3.0]]
