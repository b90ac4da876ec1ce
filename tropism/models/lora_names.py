"""What a layer is called in kohya's LoRA files, and how layers that are one there are put together.

sd-scripts (github.com/kohya-ss/sd-scripts, networks/) names a LoRA after the layer of the network that it trains:
diffusers' own UNet for Stable Diffusion 1 and 2, the original implementations' networks for SDXL, SD3 and FLUX.1.
ComfyUI (github.com/comfyanonymous/ComfyUI, comfy/lora.py) reads the same names. In the originals of the transformers
query, key and value are one layer: three LoRAs of rank r become one of rank 3 r whose ``up`` is block diagonal. alpha
grows likewise, so that the product does not change.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Layer(NamedTuple):
    """One LoRA: weight + alpha / r * up @ down."""

    down: Tensor  # (r, in), or (r, in, k, k) of a convolution
    up: Tensor  # (out, r), or (out, r, 1, 1)
    alpha: float


class Place(NamedTuple):
    """Where a layer of diffusers is in the original network: a layer, or its rows from ``part`` of ``shares``."""

    name: str
    part: int = 0
    shares: tuple[int, ...] = (1,)  # relative numbers of rows


QKV = (1, 1, 1)
QKV_MLP = (1, 1, 1, 4)  # of a single block of FLUX.1, whose first layer also begins the feed-forward


def _qkv(name: str, layers: str, shares: tuple[int, ...] = QKV) -> dict[str, Place]:
    return {layer: Place(name, part, shares) for part, layer in enumerate(layers.split())}


SD3 = {
    **_qkv("x_block.attn.qkv", "attn.to_q attn.to_k attn.to_v"),
    **_qkv("x_block.attn2.qkv", "attn2.to_q attn2.to_k attn2.to_v"),
    **_qkv("context_block.attn.qkv", "attn.add_q_proj attn.add_k_proj attn.add_v_proj"),
    "attn.to_out.0": Place("x_block.attn.proj"),
    "attn2.to_out.0": Place("x_block.attn2.proj"),
    "attn.to_add_out": Place("context_block.attn.proj"),
    "ff.net.0.proj": Place("x_block.mlp.fc1"),
    "ff.net.2": Place("x_block.mlp.fc2"),
    "ff_context.net.0.proj": Place("context_block.mlp.fc1"),
    "ff_context.net.2": Place("context_block.mlp.fc2"),
}
FLUX = {
    **_qkv("img_attn.qkv", "attn.to_q attn.to_k attn.to_v"),
    **_qkv("txt_attn.qkv", "attn.add_q_proj attn.add_k_proj attn.add_v_proj"),
    "attn.to_out.0": Place("img_attn.proj"),
    "attn.to_add_out": Place("txt_attn.proj"),
    "ff.net.0.proj": Place("img_mlp.0"),
    "ff.net.2": Place("img_mlp.2"),
    "ff_context.net.0.proj": Place("txt_mlp.0"),
    "ff_context.net.2": Place("txt_mlp.2"),
}
FLUX_SINGLE = {
    **_qkv("linear1", "attn.to_q attn.to_k attn.to_v proj_mlp", QKV_MLP),
    "proj_out": Place("linear2"),
}
RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
SDXL_ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def _same(name: str, layers: int) -> Place | None:
    return Place(name)


def _sdxl(name: str, layers: int) -> Place | None:
    """Blocks of LDM's UNet: ``layers`` resnets (one more going up), each with its transformer, then a sampler."""
    if name in SDXL_ENDS:
        return Place(SDXL_ENDS[name])
    match = re.fullmatch(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(resnets|attentions|\w+samplers)\.(\d+)\.(.+)", name)
    if match is None:
        return None
    side, block, kind, number, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    rest = RESNET.get(rest, "") if kind == "resnets" else "op" if kind == "downsamplers" else rest
    slot = {"resnets": 0, "attentions": 1, "downsamplers": 0, "upsamplers": 2}[kind]
    if side is None:
        return Place(f"middle_block.{1 if kind == 'attentions' else 2 * number}.{rest}") if rest else None
    place = (layers + 1) * block + (layers if kind.endswith("samplers") else number) + (side == "down")
    return Place(f"{'input' if side == 'down' else 'output'}_blocks.{place}.{slot}.{rest}") if rest else None


def _sd3(name: str, layers: int) -> Place | None:
    return _block(name, {"transformer_blocks": ("joint_blocks", SD3)})


def _flux(name: str, layers: int) -> Place | None:
    single = ("single_blocks", FLUX_SINGLE)
    return _block(name, {"transformer_blocks": ("double_blocks", FLUX), "single_transformer_blocks": single})


def _block(name: str, blocks: Mapping[str, tuple[str, Mapping[str, Place]]]) -> Place | None:
    kind, _, rest = name.partition(".")
    number, _, layer = rest.partition(".")
    if kind not in blocks or layer not in blocks[kind][1]:
        return None
    place = blocks[kind][1][layer]
    return place._replace(name=f"{blocks[kind][0]}.{number}.{place.name}")


KOHYA: Mapping[str, Callable[[str, int], Place | None]] = {
    "StableDiffusionPipeline": _same,
    "LatentConsistencyModelPipeline": _same,
    "StableDiffusionXLPipeline": _sdxl,
    "StableDiffusion3Pipeline": _sd3,
    "FluxPipeline": _flux,
}
"""By pipeline class: name of a layer, resnets a block -> its place in the network that sd-scripts trains."""


def in_kohya(layers: Mapping[str, Layer], pipeline: str, resnets: int) -> dict[str, Layer]:
    """LoRAs by diffusers' names -> by kohya's (``lora_unet_...``, dots as underscores).

    Raises ValueError, in one sentence, for a kind of pipeline or a layer that has no name there.
    """
    if pipeline not in KOHYA:
        raise ValueError(f"kohya's files have no names for the layers of a {pipeline}; use diffusers or peft")
    found: dict[str, dict[int, Layer]] = {}
    shares: dict[str, tuple[int, ...]] = {}
    for name, layer in layers.items():
        place = KOHYA[pipeline](name, resnets)
        if place is None:
            raise ValueError(f"kohya's files have no name for the layer {name} of a {pipeline}; use diffusers or peft")
        found.setdefault(place.name, {})[place.part] = layer
        shares[place.name] = place.shares
    return {f"lora_unet_{name.replace('.', '_')}": joined(parts, shares[name]) for name, parts in found.items()}


def joined(parts: Mapping[int, Layer], shares: tuple[int, ...]) -> Layer:
    """LoRAs of parts of a layer's rows as one of the whole layer; parts without a LoRA stay as they are."""
    if shares == (1,):
        return parts[0]
    first, some = next(iter(parts.items()))
    unit = some.up.shape[0] // shares[first]
    ranks = [layer.down.shape[0] for layer in parts.values()]
    up = some.up.new_zeros(sum(shares) * unit, sum(ranks))
    column = 0
    for part, layer in parts.items():
        row, rank = sum(shares[:part]) * unit, layer.down.shape[0]
        up[row : row + shares[part] * unit, column : column + rank] = layer.up
        column += rank
    return Layer(torch.cat([layer.down for layer in parts.values()]), up, some.alpha * sum(ranks) / ranks[0])
