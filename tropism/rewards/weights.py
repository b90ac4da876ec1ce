"""Reward weights from files: read without unpickling objects, renamed, or turned into the module they belong to."""

from __future__ import annotations

import itertools
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .scores import RewardError

_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_OUTSIDE = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # spelt so in transformers
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
_PROJECTIONS = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}  # transposed
_NAME = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file, or of a ``.pt``, ``.pth`` or ``.bin`` file read with ``weights_only``.

    A checkpoint that nests them under ``state_dict`` is opened, a ``module.`` prefix of data parallelism dropped.
    Raises RewardError when there is no such file or it holds anything that would have to be unpickled.
    """
    path = Path(path)
    if not path.is_file():
        raise RewardError(f"there is no file {path}; wanted reward weights (.safetensors, .pt, .pth or .bin)")
    try:
        found: Any = load_file(path) if path.suffix == ".safetensors" else _read_torch(path)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, OSError, ValueError) as cause:
        raise RewardError(f"{path} could not be read as plain tensors ({type(cause).__name__})") from cause
    found = found.get("state_dict", found) if isinstance(found, Mapping) else {}
    tensors = {name.removeprefix("module."): value for name, value in found.items() if isinstance(value, Tensor)}
    if not tensors:
        raise RewardError(f"{path} holds no named tensors; wanted a state dict")
    return tensors


def _read_torch(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def open_clip_to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An open_clip CLIP state dict (ViT image tower, built-in text tower) under transformers' CLIPModel names.

    Fused attention projections are split in the order query, key, value; output projections are transposed. Raises
    RewardError for a tensor that has no place there.
    """
    converted: dict[str, Tensor] = {}
    for name, tensor in state.items():
        name = name.removeprefix("text.")  # custom text towers keep the same names behind this prefix
        if name in _OUTSIDE:
            converted[_OUTSIDE[name]] = tensor
        elif name in _PROJECTIONS:
            converted[_PROJECTIONS[name]] = tensor.T.contiguous()
        elif match := _NAME.fullmatch(name):
            converted.update(_block(match, tensor))
        elif name not in ("attn_mask", "logit_bias"):
            raise RewardError(f"the open_clip weights hold '{name}', which a transformers CLIPModel has no place for")
    return converted


def _block(name: re.Match[str], tensor: Tensor) -> dict[str, Tensor]:
    """One tensor of a transformer block."""
    visual, layer, rest = name.groups()
    prefix = f"{'vision_model' if visual else 'text_model'}.encoder.layers.{layer}."
    if rest in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = rest.rpartition("_")[2]
        parts = zip("qkv", tensor.chunk(3), strict=True)
        return {f"{prefix}self_attn.{part}_proj.{kind}": value.contiguous() for part, value in parts}
    module, _, kind = rest.rpartition(".")
    if module not in _BLOCK:
        raise RewardError(f"the open_clip weights hold '{rest}' in a block, which transformers has no place for")
    return {f"{prefix}{_BLOCK[module]}.{kind}": tensor}


def linear_head(state: Mapping[str, Tensor]) -> nn.Sequential:
    """A chain of linear layers named ``layers.<index>.weight`` and ``.bias``, sizes taken from the weights.

    An index without weights is a dropout of the training script; in evaluation mode, the only mode here, it does
    nothing. A plain ``weight`` and ``bias`` is a chain of one. Raises RewardError when the sizes do not chain to 1.
    """
    named = {re.sub(r"^layers\.|^model\.", "", name): value for name, value in state.items()}
    if "weight" in named:
        named = {f"0.{name}": value for name, value in named.items()}
    found = {int(name.split(".")[0]): value for name, value in named.items() if _is_weight(name, value)}
    weights = sorted(found.items(), key=lambda item: item[0])
    shapes = [tuple(value.shape) for _, value in weights]
    if not weights or shapes[-1][0] != 1 or any(after[1] != before[0] for before, after in itertools.pairwise(shapes)):
        raise RewardError(f"the head's weights {shapes} are not a chain of linear layers that ends in one number")
    layers: list[nn.Module] = [nn.Dropout() for _ in range(weights[-1][0] + 1)]
    for index, value in weights:
        layers[index] = nn.Linear(value.shape[1], value.shape[0], bias=f"{index}.bias" in named)
    head = nn.Sequential(*layers)
    try:
        head.load_state_dict(named)
    except RuntimeError as cause:
        raise RewardError(f"the head's weights do not fit linear layers of shapes {shapes}") from cause
    return head.eval()


def _is_weight(name: str, value: Tensor) -> bool:
    return re.fullmatch(r"\d+\.weight", name) is not None and value.ndim == 2
