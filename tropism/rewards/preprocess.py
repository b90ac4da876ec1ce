"""What an image processor does to pictures, as differentiable tensor operations.

Resize with antialiasing (bicubic as Pillow's, a = -0.5), centre crop, normalise. Pillow rounds to bytes after each of
its two passes; this does not, so that gradients flow, and so differs from it by at most about one byte step, 0.3 on
average (``tests/test_rewards_clip.py``). Where an overshoot is clamped, as Pillow does, the gradient is 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .scores import RewardError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_FILTERS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


@dataclass(frozen=True)
class Preprocess:
    """Images (B, 3, H, W) in [0, 1] -> (B, 3, *crop), normalised. The defaults are CLIP's.

    ``size``: the shortest edge, or (height, width) exactly, or None to leave the size. ``longest`` applies ``size`` to
    the longest edge instead. Where a picture is smaller than ``crop`` it is surrounded by black.
    """

    size: int | tuple[int, int] | None = 224
    crop: tuple[int, int] | None = (224, 224)
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    filter: str = "bicubic"
    longest: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Preprocess:
        """From an image processor's settings: ``preprocessor_config.json``, or ``image_processor.to_dict()``.

        Missing entries have CLIPImageProcessor's defaults. Raises RewardError for what cannot be followed.
        """
        resample = config.get("resample", 3)
        if resample not in _FILTERS:
            raise RewardError(f"the image processor resamples with Pillow filter {resample}; wanted 2 or 3")
        if not config.get("do_rescale", True) or abs(config.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-3:
            raise RewardError("the image processor does not bring pixels to [0, 1] (rescale_factor 1/255)")
        normalise = config.get("do_normalize", True)
        return cls(
            size=_size(config.get("size", 224)) if config.get("do_resize", True) else None,
            crop=_pair(config.get("crop_size", 224)) if config.get("do_center_crop", True) else None,
            mean=tuple(config.get("image_mean", CLIP_MEAN)) if normalise else (0.0,) * 3,
            std=tuple(config.get("image_std", CLIP_STD)) if normalise else (1.0,) * 3,
            filter=_FILTERS[resample],
        )

    def __call__(self, images: Tensor) -> Tensor:
        height, width = self._target(images.shape[-2], images.shape[-1])
        for target in ((images.shape[-2], width), (height, width)):  # columns, then rows, as Pillow does
            if target != tuple(images.shape[-2:]):
                images = torch.nn.functional.interpolate(images, target, mode=self.filter, antialias=True)
                images = images.clamp(0, 1)  # bicubic overshoots; a byte image cannot
        if self.crop is not None:
            top, left = -((height - self.crop[0]) // 2), -((width - self.crop[1]) // 2)
            bottom, right = self.crop[0] - height - top, self.crop[1] - width - left
            images = torch.nn.functional.pad(images, (left, right, top, bottom))  # negative padding crops
        mean, std = (images.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (images - mean) / std

    def _target(self, height: int, width: int) -> tuple[int, int]:
        if self.size is None:
            return height, width
        if not isinstance(self.size, int):
            return self.size
        if self.longest:
            longest = max(height, width)
            return max(1, round(height * self.size / longest)), max(1, round(width * self.size / longest))
        if height <= width:
            return self.size, int(self.size * width / height)
        return int(self.size * height / width), self.size


def _size(value: Any) -> int | tuple[int, int]:
    """``size`` as old and new configurations write it."""
    if isinstance(value, Mapping) and value.get("shortest_edge"):
        if value.get("longest_edge"):
            raise RewardError(f"the image processor resizes to {dict(value)}; a bound on both edges is not supported")
        return int(value["shortest_edge"])
    return int(value) if isinstance(value, int) else _pair(value)


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, Mapping):
        if not (value.get("height") and value.get("width")):
            raise RewardError(f"the image processor has the size {dict(value)}; wanted height and width")
        return int(value["height"]), int(value["width"])
    height, width = (value, value) if isinstance(value, int) else value
    return int(height), int(width)
