"""A frozen CLIP that embeds pictures and prompts, whatever library it came from; ``models.clip_rewards`` loads one.

Pictures go from tensor to tensor, so gradients reach the pixels. The model handed in is frozen (no parameter asks for
gradients, evaluation mode) and moved in place: share one between rewards, never one that is being trained. Mixed
precision around a call is switched off; the model runs in its own dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .preprocess import Preprocess
from .scores import RewardError, as_images

CACHED_PROMPTS = 10_000  # text embeddings kept; all are dropped when one more would not fit


class ClipImages:
    """Pictures to embeddings of length 1. ``model`` has the interface of transformers' CLIPModel."""

    name: str

    def __init__(
        self,
        model: Any,
        preprocess: Preprocess | None = None,
        *,
        batch_size: int = 32,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """``preprocess`` is CLIP's own at the model's image size by default; device and dtype stay as they are."""
        if not hasattr(model, "get_image_features") or not hasattr(model, "logit_scale"):
            raise RewardError(f"{type(model).__name__} is not a CLIP with image and text towers; wanted a CLIPModel")
        if batch_size < 1:
            raise RewardError(f"the batch size is {batch_size}; wanted at least 1")
        side = model.config.vision_config.image_size
        self.logit_scale = float(model.logit_scale.detach().exp())  # before it is rounded to dtype
        self.model = model.to(device=device, dtype=dtype).requires_grad_(False).eval()
        self.preprocess = preprocess or Preprocess(size=side, crop=(side, side))
        self.batch_size = batch_size
        self.differentiable = True

    def embed_images(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, D) of length 1, on the model's device; a graph only if the images have one."""
        images = images.to(self.model.device)
        gradients = torch.is_grad_enabled() and images.requires_grad
        with torch.set_grad_enabled(gradients), own_precision(self.model):
            return torch.cat([self._embed(chunk) for chunk in torch.split(images, self.batch_size)])

    def _embed(self, images: Tensor) -> Tensor:
        pixels = self.preprocess(images).to(self.model.dtype)
        return unit(self.model.get_image_features(pixel_values=pixels))


class ClipText(ClipImages):
    """``multiplier`` times the cosine between picture and prompt, as a reward."""

    def __init__(self, model: Any, tokenizer: Any, preprocess: Preprocess | None = None, **options: Any) -> None:
        """``options``: batch_size, device and dtype, as for ``ClipImages``."""
        super().__init__(model, preprocess, **options)
        if str(model.config.model_type).startswith("siglip"):
            raise RewardError(f"{type(model).__name__} reads padded text another way than CLIP; wanted a CLIPModel")
        self.tokenizer = tokenizer
        self.multiplier = 1.0
        self._texts: dict[str, Tensor] = {}

    def embed_text(self, prompts: Sequence[str]) -> Tensor:
        """B prompts -> (B, D) of length 1, no graph; cut at the model's length, computed once a prompt."""
        unknown = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        if len(self._texts) + len(unknown) > CACHED_PROMPTS:
            self._texts.clear()
            unknown = list(dict.fromkeys(prompts))
        with torch.no_grad(), own_precision(self.model):
            for start in range(0, len(unknown), self.batch_size):
                chunk = unknown[start : start + self.batch_size]
                features = self.model.get_text_features(**self._tokens(chunk))
                self._texts.update(zip(chunk, unit(features), strict=True))
        return torch.stack([self._texts[prompt] for prompt in prompts])

    def _tokens(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        longest = min(self.tokenizer.model_max_length, self.model.config.text_config.max_position_embeddings)
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        return {name: tokens[name].to(self.model.device) for name in ("input_ids", "attention_mask")}

    def cosine(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,) cosines in [-1, 1], in the model's precision (at least float32) and on its device."""
        return (self.embed_images(images) * self.embed_text(prompts)).sum(-1)

    def __call__(self, samples: Any, prompts: Sequence[str], **columns: Any) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] and B prompts -> (B,) float32 on the images' device."""
        images = as_images(samples, prompts, self.name)
        return (self.multiplier * self.cosine(images, prompts)).float().to(images.device)


def unit(features: Any) -> Tensor:
    """Features, or the model output that holds them, divided by their length; (B, D), at least float32."""
    found: Tensor = features if isinstance(features, Tensor) else features.pooler_output
    found = found if found.dtype == torch.float64 else found.float()
    length: Tensor = torch.linalg.vector_norm(found, dim=-1, keepdim=True)
    return found / length


@contextmanager
def own_precision(model: Any) -> Iterator[None]:
    """No autocast inside."""
    with torch.autocast(model.device.type, enabled=False):
        yield
