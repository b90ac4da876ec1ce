"""Pixel statistics against Pillow, colorsys and arithmetic; JPEG sizes against files; what an import costs."""

from __future__ import annotations

import colorsys
import io
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tropism.base import Reward
from tropism.rewards import (
    PROGRAMMATIC,
    SMOOTH,
    STATISTICS,
    JpegCompressibility,
    JpegIncompressibility,
    PixelReward,
    RewardError,
    pixel_statistics,
)


def noise(batch: int = 4, side: int = 16, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    bytes_ = torch.randint(0, 256, (batch, 3, side, side), generator=generator)
    return bytes_.to(dtype) / 255


def solid(red: float, green: float, blue: float) -> Tensor:
    return torch.tensor([red, green, blue], dtype=torch.float32)[None, :, None, None].expand(1, 3, 32, 32)


def pillow(image: Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def test_luma_statistics_are_those_of_pillow() -> None:
    images = noise()
    grey = np.stack([np.asarray(pillow(image).convert("L"), np.float64) / 255 for image in images])
    found = pixel_statistics(images)
    half_a_byte = 0.5 / 255  # Pillow rounds luma
    np.testing.assert_allclose(found["brightness"], grey.mean((1, 2)), atol=half_a_byte)
    np.testing.assert_allclose(found["contrast"], grey.std((1, 2)), atol=half_a_byte)


def test_saturation_is_that_of_hsv() -> None:
    images = noise(side=5)
    images[0, :, :2] = 0
    wanted = [np.mean([colorsys.rgb_to_hsv(*pixel)[1] for pixel in image.flatten(1).T.tolist()]) for image in images]
    np.testing.assert_allclose(pixel_statistics(images)["saturation"], wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("color", "brightness", "saturation", "redness"),
    [((0, 0, 0), 0, 0, 0), ((1, 1, 1), 1, 0, 0), ((1, 0, 0), 0.299, 1, 1), ((0, 1, 0.5), 0.644, 1, -0.75)],
)
def test_solid_colors(color: tuple[float, ...], brightness: float, saturation: float, redness: float) -> None:
    found = {name: float(value) for name, value in pixel_statistics(solid(*color)).items()}
    assert found["brightness"] == pytest.approx(brightness, abs=1e-6)
    assert found["saturation"] == pytest.approx(saturation)
    assert found["redness"] == pytest.approx(redness)
    flat = [found[name] for name in ("contrast", "high_frequency", "grid_energy", "colour_entropy", "edge_density")]
    assert flat == pytest.approx([0] * 5, abs=1e-6)
    assert found["dark_fraction"] == float(brightness < 0.1)


def test_colour_entropy_counts_bits() -> None:
    images = torch.zeros(3, 3, 8, 8)
    images[1, 0, :, :4] = 1.0  # two colours, half each
    images[2, 1, :2] = 0.99  # a quarter
    quarter = -(0.25 * np.log2(0.25) + 0.75 * np.log2(0.75))
    np.testing.assert_allclose(pixel_statistics(images)["colour_entropy"], [0, 1, quarter], atol=1e-6)


def test_edges_and_darkness_count_pixels() -> None:
    images = torch.zeros(2, 3, 8, 8)
    images[0, :, :, 4:] = 1.0  # one vertical edge: the two columns beside it
    images[1, :, :, 4:] = 0.09  # too faint for an edge, too dark for light
    found = pixel_statistics(images)
    assert found["edge_density"].tolist() == [0.25, 0.0]
    assert found["dark_fraction"].tolist() == [0.5, 1.0]


def test_high_frequency_is_the_variance_that_lies_above_half_nyquist() -> None:
    x = torch.arange(16.0)
    slow, fast = torch.sin(2 * torch.pi * x * 2 / 16), torch.sin(2 * torch.pi * x * 6 / 16)
    rows = torch.stack([slow, fast, 0.5 * slow + 0.5 * fast, (-1.0) ** x]) * 0.5 + 0.5
    images = rows[:, None, None, :].expand(4, 3, 16, 16)
    np.testing.assert_allclose(pixel_statistics(images)["high_frequency"], [0, 0.125, 0.03125, 0.25], atol=1e-6)


def test_grid_energy_is_what_repeats_every_eight_pixels() -> None:
    x = torch.arange(16.0)
    waves = [torch.sin(2 * torch.pi * x * cycles / 16) for cycles in (6, 5, 2)]  # 6 / 16 is on the grid, 5 / 16 is not
    rows = torch.stack([*waves, (-1.0) ** x, 1 - x / 8]) * 0.5 + 0.5
    images = rows[:, None, None, :].expand(5, 3, 16, 16).clone()
    images[3] = images[3] * (images[3].transpose(-1, -2) > 0.5)  # white dots, two pixels apart
    found = pixel_statistics(images)
    # Dots have the mean 1/4 and the powers 1/16 at each of (0, 1/2), (1/2, 0) and (1/2, 1/2).
    np.testing.assert_allclose(found["grid_energy"][:4], [0.125, 0, 0, 3 / 16], atol=1e-6)
    assert 0 < found["grid_energy"][4] < 0.01
    assert (found["grid_energy"] <= found["high_frequency"] + 1e-7).all()
    odd = torch.nn.functional.pad(images, (0, 3, 0, 5), value=1.0)  # beyond the last whole cell
    np.testing.assert_allclose(pixel_statistics(odd)["grid_energy"], found["grid_energy"], atol=1e-6)
    assert pixel_statistics(images[:, :, :4])["grid_energy"].tolist() == [0] * 5


def test_a_chequerboard_and_a_ramp_have_known_statistics() -> None:
    index = torch.arange(32)
    board = ((index[:, None] + index) % 2).float().expand(3, 32, 32)
    ramp = ((index + 0.5) / 32).expand(3, 32, 32)
    found = pixel_statistics(torch.stack([board, ramp]))
    wanted = {
        "brightness": (0.5, 0.5),
        "contrast": (0.5, math.sqrt((1 - 1 / 32**2) / 12)),
        "saturation": (0, 0),
        "high_frequency": (0.25, None),
        "grid_energy": (0.25, None),
        "colour_entropy": (1, 3),  # two greys; eight
        "edge_density": (4 / 1024, 0),  # Sobel's filter sees no single pixels but in the corners; a ramp is too flat
        "dark_fraction": (0.5, 3 / 32),
    }
    for name, pair in wanted.items():
        for value, exact in zip(found[name].tolist(), pair, strict=True):
            assert exact is None or value == pytest.approx(exact, abs=1e-6), name


@pytest.mark.parametrize("name", sorted(SMOOTH))
def test_smooth_statistics_have_the_right_gradient(name: str) -> None:
    images = (0.1 + 0.8 * noise(2, 4, torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(STATISTICS[name], (images,))


@pytest.mark.parametrize("name", sorted(STATISTICS))
@pytest.mark.parametrize("level", [0.0, 0.5])
def test_gradients_are_finite_on_flat_images_and_absent_where_promised(name: str, level: float) -> None:
    reward = PixelReward(name)
    images = torch.full((2, 3, 8, 8), level, requires_grad=True)
    values = reward(images, ["a", "b"])
    assert values.requires_grad == reward.differentiable == (name in SMOOTH)
    if reward.differentiable:
        (gradient,) = torch.autograd.grad(values.sum(), images)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", sorted(PROGRAMMATIC))
def test_every_builder_makes_a_reward_that_treats_images_alone(name: str) -> None:
    reward = PROGRAMMATIC[name]()
    images, prompts = noise(3, 16), ["a", "b", "c"]
    values = reward(images, prompts)
    assert isinstance(reward, Reward)
    assert reward.name == name
    assert values.shape == (3,)
    assert values.dtype == torch.float32
    assert values.isfinite().all()
    alone = torch.cat([reward(image[None], ["p"]) for image in images])
    torch.testing.assert_close(values, alone)
    half = reward(images.half(), prompts)
    torch.testing.assert_close(half, reward(images.half().float(), prompts))


def test_jpeg_is_the_size_of_the_file() -> None:
    images = torch.cat([noise(2, 32), solid(0.2, 0.4, 0.6)])
    wanted = []
    for image in images:
        file = io.BytesIO()
        pillow(image).save(file, "JPEG", quality=95)
        wanted.append(len(file.getvalue()) / 1000)
    prompts = ["", "", ""]
    large, small = JpegIncompressibility()(images, prompts), JpegCompressibility()(images, prompts)
    np.testing.assert_allclose(large, wanted, rtol=1e-6)
    assert torch.equal(small, -large)
    assert large[0] > 2 * large[2]
    assert torch.equal(JpegIncompressibility()(images - 0.4 / 255, prompts), large), "rounded, not cut"
    white = JpegIncompressibility()(torch.ones_like(images), prompts)
    assert torch.equal(JpegIncompressibility()(images + 5, prompts), white)


def test_mistakes() -> None:
    with pytest.raises(RewardError, match="no pixel statistic 'prettiness'; choose from brightness, "):
        PixelReward("prettiness")
    for samples, prompts, message in [
        ([1, 2], ["a", "b"], "got samples list; wanted images"),
        (torch.zeros(2, 4, 8, 8), ["a", "b"], r"got samples \(2, 4, 8, 8\)"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), ["a", "b"], "divide bytes by 255"),
        (torch.zeros(2, 3, 8, 8), ["a"], "2 images and 1 prompts"),
    ]:
        with pytest.raises(RewardError, match=message):
            PixelReward("brightness")(samples, prompts)


def test_importing_rewards_needs_neither_transformers_nor_diffusers() -> None:
    code = """
import sys, tropism.rewards
loaded = {name.split(".")[0] for name in sys.modules}
print(sorted(loaded & {"transformers", "diffusers", "tropism"}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['tropism']"
