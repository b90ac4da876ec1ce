"""Kohya's names of layers, against diffusers' own converters in the other direction."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from peft import LoraConfig, get_peft_model_state_dict
from torch import nn

from tropism.models.exported import _layers
from tropism.models.lora_names import KOHYA, QKV, Layer, in_kohya, joined

SDXL = {  # the shape of huggingface.co/stabilityai/stable-diffusion-xl-base-1.0, unet/config.json
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (8, 16, 32),  # there 320, 640, 1280
    "transformer_layers_per_block": (1, 2, 3),  # there 1, 2, 10
    "attention_head_dim": (1, 2, 4),
    "cross_attention_dim": 16,
    "norm_num_groups": 4,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
}


def sdxl(seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DConditionModel(sample_size=8, **SDXL).eval()


def kohya_tensors(layers: dict[str, Layer]) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, (down, up, alpha) in layers.items():
        tensors |= {
            f"{name}.lora_down.weight": down,
            f"{name}.lora_up.weight": up,
            f"{name}.alpha": torch.tensor(alpha),
        }
    return tensors


def random_layers(sizes: dict[str, tuple[int, int]], rank: int = 2, alpha: float = 6.0) -> dict[str, Layer]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    return {name: Layer(draw(rank, inside), draw(out, rank), alpha) for name, (out, inside) in sizes.items()}


def product(layer: Layer) -> torch.Tensor:
    return layer.alpha / layer.down.shape[0] * layer.up @ layer.down


def test_every_layer_of_sdxl_is_where_ldm_has_it() -> None:
    """A checkpoint under our names, converted by diffusers, is the network again."""
    net = sdxl()
    layers = {name: layer for name, layer in net.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    places = {name: KOHYA["StableDiffusionXLPipeline"](name, 2) for name in layers}
    assert all(places.values())
    assert len({place.name for place in places.values()}) == len(layers)
    checkpoint = {"out.0.weight": torch.ones(8), "out.0.bias": torch.zeros(8)}  # a norm
    for name, layer in layers.items():
        checkpoint |= {f"{places[name].name}.{end}": value for end, value in layer.named_parameters()}
    found = convert_ldm_unet_checkpoint({f"model.diffusion_model.{n}": v for n, v in checkpoint.items()}, net.config)
    assert not [name for name, layer in layers.items() if found.get(f"{name}.weight") is not layer.weight]


def test_kohya_sdxl_means_the_same_to_diffusers() -> None:
    net, generator = sdxl(), torch.Generator().manual_seed(1)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
    net.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=targets), adapter_name="tropism")
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    inputs = {
        "sample": torch.randn(2, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([100.0, 900.0]),
        "encoder_hidden_states": torch.randn(2, 5, 16, generator=generator),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(2, 16, generator=generator),
            "time_ids": torch.ones(2, 6),
        },
    }
    layers = _layers(get_peft_model_state_dict(net, adapter_name="tropism"), 6.0)
    tensors = kohya_tensors(in_kohya(layers, "StableDiffusionXLPipeline", 2))
    assert any(name.startswith("lora_unet_input_blocks_8_1_transformer_blocks_2_attn2_to_out_0.") for name in tensors)
    other = sdxl()
    with torch.no_grad():
        before = other(**inputs).sample
        state, alphas = StableDiffusionXLPipeline.lora_state_dict(tensors, unet_config=other.config)
        StableDiffusionXLPipeline.load_lora_into_unet(state, alphas, other)
        after, wanted = other(**inputs).sample, net(**inputs).sample
    assert (wanted - before).abs().max() > 1e-2
    torch.testing.assert_close(after, wanted, rtol=0, atol=1e-5)


def flux_layers() -> dict[str, Layer]:
    """Of one block of each kind in FLUX.1's width, which diffusers' converter expects."""
    with torch.device("meta"):
        net = FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    linear = {name: (m.out_features, m.in_features) for name, m in net.named_modules() if isinstance(m, nn.Linear)}
    kinds = ("attn", "ff", "proj_mlp", "proj_out")
    return random_layers({n: s for n, s in linear.items() if "blocks." in n and n.split(".")[2].startswith(kinds)})


def test_kohya_flux_means_the_same_to_diffusers() -> None:
    layers = flux_layers()
    assert {"single_transformer_blocks.0.proj_mlp", "transformer_blocks.0.attn.to_add_out"} <= set(layers)
    converted = in_kohya(layers, "FluxPipeline", 0)
    assert converted["lora_unet_double_blocks_0_img_attn_qkv"].down.shape == (6, 3072)
    found = _convert_kohya_flux_lora_to_diffusers(kohya_tensors(converted))
    assert set(found) == {f"transformer.{name}.lora_{end}.weight" for name in layers for end in "AB"}
    for name, layer in layers.items():
        down, up = (found[f"transformer.{name}.lora_{end}.weight"] for end in "AB")
        probe = torch.randn(down.shape[1], 3, generator=torch.Generator().manual_seed(1)) / down.shape[1] ** 0.5
        torch.testing.assert_close(up @ (down @ probe), 3.0 * layer.up @ (layer.down @ probe), rtol=1e-5, atol=1e-4)


def test_joined_layers_keep_their_products_and_leave_the_rest() -> None:
    query, value = random_layers({"q": (4, 3), "v": (4, 3)}).values()
    both = joined({0: query, 2: value}, QKV)
    assert both.down.shape == (4, 3) and both.up.shape == (12, 4) and both.alpha == 12.0
    expected = torch.cat([product(query), torch.zeros(4, 3), product(value)])
    torch.testing.assert_close(product(both), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("pipeline", "name"),
    [
        ("PixArtSigmaPipeline", "transformer_blocks.0.attn1.to_q"),
        ("StableDiffusion3Pipeline", "transformer_blocks.0.norm1.linear"),
        ("FluxPipeline", "x_embedder"),
        ("StableDiffusionXLPipeline", "down_blocks.0.resnets.0.norm1"),
        ("StableDiffusionXLPipeline", "somewhere.else"),
    ],
)
def test_what_has_no_name_is_refused(pipeline: str, name: str) -> None:
    with pytest.raises(ValueError, match="use diffusers or peft"):
        in_kohya({name: Layer(torch.ones(1, 2), torch.ones(2, 1), 1.0)}, pipeline, 2)
