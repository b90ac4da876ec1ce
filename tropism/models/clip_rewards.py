"""Rewards that look through a CLIP: agreement with the prompt, human preference, aesthetics.

All are differentiable; what they share (preprocessing, micro-batches, kept text embeddings, a frozen model) is in
``rewards.clip``. Nothing is unpickled: weights are safetensors, or torch files read with ``weights_only``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, CLIPModel
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils.hub import cached_file

from tropism.rewards.clip import ClipImages, ClipText, own_precision
from tropism.rewards.preprocess import Preprocess
from tropism.rewards.scores import RewardError, as_images
from tropism.rewards.weights import linear_head, open_clip_to_transformers, read_tensors

CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
CLIP_L = "openai/clip-vit-large-patch14"
AESTHETIC_HEAD = "trl-lib/ddpo-aesthetic-predictor"
AESTHETIC_FILE = "aesthetic-model.pth"


class ClipScore(ClipText):
    """100 times the cosine of picture and prompt (15 to 35 is usual), not clipped at 0 so that gradients flow.

    ``multiplier=1`` is the plain cosine. CLIPScore (2104.08718) multiplies by 2.5 and clips, torchmetrics by 100.
    """

    name = "clip_score"

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        preprocess: Preprocess | None = None,
        *,
        multiplier: float = 100.0,
        **options: Any,
    ) -> None:
        """``options``: batch_size, device and dtype, as for ``ClipImages``."""
        super().__init__(model, tokenizer, preprocess, **options)
        self.multiplier = multiplier

    @classmethod
    def from_pretrained(cls, name: str | Path = CLIP_L, *, processor: str | Path | None = None, **options: Any) -> Self:
        """From a local folder or hub name; tokenizer and preprocessing from ``processor``, the same by default.

        ``options`` are the constructor's; dtype is float32 by default. Raises RewardError for what cannot be loaded.
        """
        return cls(*_load_clip(name, processor), **options)


class PickScore(ClipText):
    """PickScore (2305.01569): exp(logit scale) times the cosine, by a CLIP-H trained on Pick-a-Pic; about 16 to 25."""

    name = "pick_score"

    def __init__(self, model: Any, tokenizer: Any, preprocess: Preprocess | None = None, **options: Any) -> None:
        """``options``: batch_size, device and dtype, as for ``ClipImages``."""
        super().__init__(model, tokenizer, preprocess, **options)
        self.multiplier = self.logit_scale

    @classmethod
    def from_pretrained(
        cls, name: str | Path = "yuvalkirstain/PickScore_v1", *, processor: str | Path | None = None, **options: Any
    ) -> Self:
        """As ``ClipScore.from_pretrained``, but without a processor of its own it has that of the CLIP-H it came from.

        So says the model card; the published weights come without one.
        """
        own = any((Path(name) / file).is_file() for file in ("processor_config.json", "preprocessor_config.json"))
        return cls(*_load_clip(name, processor or (name if own else CLIP_H)), **options)


class HPSv2(ClipText):
    """HPSv2 (2306.09341): the cosine, with a CLIP-H trained on human preferences; about 0.2 to 0.35.

    As in its code, a picture that is not square is fitted whole and surrounded by black, not cropped.
    """

    name = "hps_v2"

    def __init__(self, model: Any, tokenizer: Any, preprocess: Preprocess | None = None, **options: Any) -> None:
        """``options``: batch_size, device and dtype, as for ``ClipImages``."""
        super().__init__(model, tokenizer, preprocess, **options)
        self.preprocess = replace(self.preprocess, longest=True)

    @classmethod
    def from_pretrained(cls, name: str | Path, *, processor: str | Path | None = None, **options: Any) -> Self:
        """From a folder with the HPSv2 weights as a transformers CLIP; otherwise as ``ClipScore.from_pretrained``.

        The published files (``HPS_v2_compressed.pt``, ``HPS_v2.1_compressed.pt`` of xswu/HPSv2) are open_clip's: use
        ``from_open_clip``, and ``.model.save_pretrained`` to convert once.
        """
        return cls(*_load_clip(name, processor), **options)

    @classmethod
    def from_open_clip(cls, checkpoint: str | Path, base: str | Path = CLIP_H, **options: Any) -> Self:
        """From an open_clip checkpoint file; ``base`` gives all but the weights. Raises RewardError on a misfit."""
        weights = open_clip_to_transformers(read_tensors(checkpoint))
        model = CLIPModel(_load(AutoConfig.from_pretrained, base, "CLIP configuration"))
        try:
            model.load_state_dict(weights)
        except RuntimeError as cause:
            raise RewardError(f"the weights in {checkpoint} are not those of a CLIP like {base}") from cause
        return cls(model, *_load_processor(base), **options)


class LaionAesthetic(ClipImages):
    """The LAION aesthetic predictor: a chain of linear layers on the CLIP ViT-L/14 embedding; about 1 to 10.

    Source: christophschuhmann/improved-aesthetic-predictor (768-1024-128-64-16-1, dropouts off), the reward of DDPO
    (2305.13301). The sizes come from the head's weights, and must fit the CLIP. Prompts are only counted.
    """

    name = "aesthetic"

    def __init__(self, model: Any, head: nn.Module, preprocess: Preprocess | None = None, **options: Any) -> None:
        """``head``: (B, D) -> (B, 1), as ``linear_head`` makes it; ``options`` as for ``ClipImages``."""
        super().__init__(model, preprocess, **options)
        self.head = head.to(self.model.device, torch.promote_types(self.model.dtype, torch.float32))
        self.head.requires_grad_(False).eval()
        first = next((layer for layer in head.modules() if isinstance(layer, nn.Linear)), None)
        width = self.model.config.projection_dim
        if first is not None and first.in_features != width:
            raise RewardError(f"the aesthetic head takes {first.in_features} numbers; this CLIP embeds into {width}")

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path = CLIP_L,
        head: str | Path = AESTHETIC_HEAD,
        *,
        processor: str | Path | None = None,
        **options: Any,
    ) -> Self:
        """As ``ClipScore.from_pretrained``; ``head`` is a file (.safetensors, .pth), or a hub name with a .pth."""
        file = head if Path(head).is_file() else _load(cached_file, head, "aesthetic head", AESTHETIC_FILE)
        layers = linear_head(read_tensors(file))
        model, _, preprocess = _load_clip(name, processor)
        return cls(model, layers, preprocess, **options)

    def __call__(self, samples: Any, prompts: Sequence[str], **columns: Any) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> (B,) float32 on the images' device."""
        images = as_images(samples, prompts, self.name)
        embeddings = self.embed_images(images)
        with own_precision(self.model):
            return self.head(embeddings).squeeze(-1).float().to(images.device)  # type: ignore[no-any-return]


def _load_clip(name: str | Path, processor: str | Path | None) -> tuple[Any, Any, Preprocess]:
    """In float32, so that the logit scale is exact; the constructor casts."""
    model = _load(AutoModel.from_pretrained, name, "CLIP", dtype=torch.float32)
    return model, *_load_processor(processor or name)


def _load_processor(name: str | Path) -> tuple[Any, Preprocess]:
    """Tokenizer and preprocessing; only the processor's settings are read, so that torchvision is not needed."""
    settings, _ = _load(ImageProcessingMixin.get_image_processor_dict, name, "image processor")
    return _load(AutoTokenizer.from_pretrained, name, "tokenizer"), Preprocess.of(settings)


def _load(loader: Any, name: str | Path, what: str, *args: Any, **options: Any) -> Any:
    """``loader(name, ...)``; what goes wrong is one sentence that says which part of which source is missing."""
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise RewardError(f"there is no folder {name}; wanted a folder or hub name with a {what}")
    try:
        return loader(str(name), *args, **options)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as cause:
        said = str(cause).strip().split("\n")[0].rstrip(".")
        where = f"the folder {name}" if Path(name).is_dir() else f"'{name}', which is no local folder,"
        raise RewardError(f"could not load the {what} from {where} ({said})") from cause
