"""Rewards that need no model: the size of the JPEG file, and statistics of the pixels.

Images are (B, 3, H, W) floats in [0, 1]. The statistics are whole-batch tensor operations on the images' device; those
in ``SMOOTH`` pass gradients to the pixels. Luma is 0.299 R + 0.587 G + 0.114 B (BT.601).
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tropism.base import Reward

from .scores import RewardError, as_images

EDGE = 0.1  # luma change across a pixel's neighbourhood above which it counts as an edge (1 = black beside white)
DARK = 0.1  # luma below which a pixel counts as dark
LEVELS = 8  # per channel, for colour entropy
CELL = 8  # pixels, for grid energy


def _luma(images: Tensor) -> Tensor:
    red, green, blue = images.unbind(1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def brightness(images: Tensor) -> Tensor:
    """(B,) mean luma, [0, 1]."""
    return _luma(images).mean((1, 2))


def contrast(images: Tensor) -> Tensor:
    """(B,) standard deviation of luma over the pixels, [0, 0.5]; gradient 0 where the image is flat."""
    return _luma(images).flatten(1).std(1, correction=0)


def saturation(images: Tensor) -> Tensor:
    """(B,) mean saturation of HSV, (max - min) / max over the channels, [0, 1]; black counts 0.

    The divisor is at least 1/255, which changes nothing for 8-bit images and keeps gradients finite near black.
    """
    high, low = images.amax(1), images.amin(1)
    return ((high - low) / high.clamp(min=1 / 255)).mean((1, 2))


def redness(images: Tensor) -> Tensor:
    """(B,) mean of red minus the mean of green and blue, [-1, 1]."""
    red, green, blue = images.mean((2, 3)).unbind(1)
    return red - (green + blue) / 2


def _spectrum(luma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(power (B, H, W), rows (H,), columns (W,)): luma by frequency, in cycles a pixel; it sums to the mean square."""
    rows, columns = (torch.fft.fftfreq(size, device=luma.device, dtype=luma.dtype) for size in luma.shape[1:])
    return torch.view_as_real(torch.fft.fft2(luma, norm="forward")).square().sum(-1), rows, columns


def high_frequency(images: Tensor) -> Tensor:
    """(B,) energy of luma above half the Nyquist frequency (radius > 1/4 cycle a pixel), mean square, [0, 0.25].

    By Parseval it is the part of the variance of luma that lies there.
    """
    power, rows, columns = _spectrum(_luma(images))
    return torch.sum(power * (torch.hypot(rows[:, None], columns[None, :]) > 0.25), (1, 2))


def grid_energy(images: Tensor) -> Tensor:
    """(B,) the part of ``high_frequency`` that repeats every 8 pixels, down and across, [0, 0.25].

    Eight pixels are a latent's cell: chequerboards and tiles of a decoder or of patches lie on these frequencies,
    pictures hardly do. Rows and columns beyond a multiple of 8 are left out; an image smaller than that has none.
    """
    height, width = (size // CELL * CELL for size in images.shape[2:])
    if not height or not width:
        return images.sum((1, 2, 3)) * 0
    power, rows, columns = _spectrum(_luma(images[:, :, :height, :width]))
    on_grid = [(each * CELL).frac().abs() < 1e-4 for each in (rows, columns)]
    kept = (torch.hypot(rows[:, None], columns[None, :]) > 0.25) & on_grid[0][:, None] & on_grid[1][None, :]
    return torch.sum(power * kept, (1, 2))


def colour_entropy(images: Tensor) -> Tensor:
    """(B,) entropy in bits of the colours, each channel in 8 equal bins: 0 for one colour, at most 9. No gradient."""
    bins = (images.detach() * LEVELS).long().clamp(0, LEVELS - 1)
    red, green, blue = bins.unbind(1)
    codes = (red * LEVELS + green) * LEVELS + blue
    batch, size = codes.shape[0], LEVELS**3
    offset = torch.arange(batch, device=codes.device)[:, None] * size
    counts = torch.bincount((codes.flatten(1) + offset).flatten(), minlength=batch * size).reshape(batch, size)
    share = counts.to(images.dtype) / codes[0].numel()
    nats: Tensor = -torch.special.xlogy(share, share).sum(1)
    return nats / math.log(2)


def edge_density(images: Tensor) -> Tensor:
    """(B,) share of pixels whose Sobel magnitude of luma exceeds 0.1, [0, 1]; a black-white step has 1. No gradient."""
    luma = torch.nn.functional.pad(_luma(images.detach())[:, None], (1, 1, 1, 1), mode="replicate")
    step = luma.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 4
    slopes = torch.nn.functional.conv2d(luma, torch.stack([step, step.T])[:, None])
    return (slopes.square().sum(1).sqrt() > EDGE).to(luma.dtype).mean((1, 2))


def dark_fraction(images: Tensor) -> Tensor:
    """(B,) share of pixels with luma below 0.1, [0, 1]. No gradient."""
    return (_luma(images.detach()) < DARK).to(images.dtype).mean((1, 2))


STATISTICS: Mapping[str, Callable[[Tensor], Tensor]] = {
    f.__name__: f
    for f in (
        brightness, contrast, saturation, redness, high_frequency, grid_energy, colour_entropy, edge_density,
        dark_fraction,
    )
}  # fmt: skip
SMOOTH = frozenset({"brightness", "contrast", "saturation", "redness", "high_frequency", "grid_energy"})


def pixel_statistics(images: Tensor) -> dict[str, Tensor]:
    """Every statistic of images (B, 3, H, W) in [0, 1], by name, each (B,); the smooth ones keep the graph."""
    images = as_images(images, [""] * len(images), "pixel_statistics")
    return {name: statistic(images) for name, statistic in STATISTICS.items()}


class PixelReward:
    """One of ``STATISTICS`` as a reward, named after it. Raises RewardError for a name that is not there."""

    def __init__(self, statistic: str) -> None:
        if statistic not in STATISTICS:
            raise RewardError(f"there is no pixel statistic '{statistic}'; choose from {', '.join(sorted(STATISTICS))}")
        self.name = statistic
        self.differentiable = statistic in SMOOTH

    def __call__(self, samples: Any, prompts: Sequence[str], **columns: Any) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> (B,) float32; prompts are only counted."""
        return STATISTICS[self.name](as_images(samples, prompts, self.name)).float()


def jpeg_kilobytes(images: Tensor) -> Tensor:
    """(B,) size of each image as a JPEG file of quality 95 (Pillow), in units of 1000 bytes."""
    pixels = (images.detach() * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return torch.tensor([_encoded(array) / 1000 for array in pixels], dtype=torch.float32, device=images.device)


def _encoded(pixels: np.ndarray[Any, Any]) -> int:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=95)
    return buffer.tell()


class JpegIncompressibility:
    """Kilobytes of the JPEG file: rich texture wins (DDPO, 2305.13301, section 4.1, and its code for the quality)."""

    name = "jpeg_incompressibility"
    differentiable = False

    def __call__(self, samples: Any, prompts: Sequence[str], **columns: Any) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> (B,) float32, positive."""
        return jpeg_kilobytes(as_images(samples, prompts, self.name))


class JpegCompressibility:
    """Minus the kilobytes of the JPEG file: smooth images win (DDPO, 2305.13301)."""

    name = "jpeg_compressibility"
    differentiable = False

    def __call__(self, samples: Any, prompts: Sequence[str], **columns: Any) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> (B,) float32, negative."""
        return -jpeg_kilobytes(as_images(samples, prompts, self.name))


PROGRAMMATIC: Mapping[str, Callable[[], Reward]] = {
    **{name: partial(PixelReward, name) for name in STATISTICS},
    JpegCompressibility.name: JpegCompressibility,
    JpegIncompressibility.name: JpegIncompressibility,
}
"""Builders by name: ``PROGRAMMATIC["saturation"]()`` is a reward."""
