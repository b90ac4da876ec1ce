"""What Stable Diffusion 1.5 and SDXL need in memory, from their published shapes: nothing is downloaded or allocated.

    python benchmarks/memory_plan.py

The networks are built on torch's meta device and the calls of a training step are counted there (``footprint``). The
shapes are those of the config.json files of huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5 and
huggingface.co/stabilityai/stable-diffusion-xl-base-1.0; the numbers of parameters that come out are the published ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tropism.footprint import measure, weight_bytes
from tropism.memory import FLOAT, MIB, Needs, plan

CONTEXT = 600 * MIB  # of a CUDA process before its first tensor: an allowance
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
          "projection_dim": 1280, "hidden_act": "gelu"}  # fmt: skip
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
SD15 = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@dataclass
class MetaModel:
    """A pipeline without memory, as ``footprint.measure`` asks for it."""

    parts: Mapping[str, nn.Module]
    cond: Mapping[str, Tensor]  # one row
    latent_shape: tuple[int, ...]
    device = torch.device("meta")

    def net(self, x: Tensor, tau: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """As tropism's pipelines call the UNet."""
        unet = self.parts["unet"]
        rows = {name: value.to(unet.dtype) for name, value in cond.items()}
        added = {"added_cond_kwargs": {name: rows[name] for name in ("text_embeds", "time_ids") if name in rows}}
        output = unet(x.to(unet.dtype), tau, encoder_hidden_states=rows["prompt_embeds"], return_dict=False, **added)
        return torch.as_tensor(output[0]).float()

    def decode(self, latents: Tensor) -> Tensor:
        """As tropism's pipelines decode."""
        vae = self.parts["vae"]
        return torch.as_tensor(vae.decode(latents.to(vae.dtype), return_dict=False)[0]).float()

    def parameters(self) -> list[nn.Parameter]:
        """The LoRA's."""
        return [parameter for parameter in self.parts["unet"].parameters() if parameter.requires_grad]


def build(sdxl: bool, dtype: torch.dtype = torch.bfloat16, rank: int = 8) -> MetaModel:
    """The published shapes with a LoRA on the attention layers, in float32 as always."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**(SDXL if sdxl else SD15))
        parts: dict[str, nn.Module] = {"unet": unet, "vae": AutoencoderKL(**VAE)}
        parts["text_encoder"] = CLIPTextModel(CLIPTextConfig(**CLIP_L))
        if sdxl:
            parts["text_encoder_2"] = CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_G))
        for part in parts.values():
            part.to(dtype).eval().requires_grad_(False)
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS))
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        cond = {"prompt_embeds": torch.empty(1, 77, unet.config.cross_attention_dim, dtype=dtype)}
        if sdxl:
            cond |= {"text_embeds": torch.empty(1, 1280, dtype=dtype), "time_ids": torch.empty(1, 6, dtype=dtype)}
    size = unet.config.sample_size
    return MetaModel(parts, cond, (4, size, size))


def needs_of(model: MetaModel, checkpointing: bool, direct: bool = False, **settings: Any) -> Needs:
    """Of policy-gradient training, or with ``direct`` of reward gradients; the reward itself is left out."""
    unet, vae = model.parts["unet"], model.parts["vae"]
    for part in (unet, vae):
        part.enable_gradient_checkpointing() if checkpointing else part.disable_gradient_checkpointing()
    trained = model.parameters()
    pixels = 8 * model.latent_shape[1]
    return Needs(
        kind="direct gradient" if direct else "policy gradient",
        footprint=measure(model, model.cond, graph_to_noise=direct),
        models=weight_bytes(model.parts, without=trained),
        trained=sum(parameter.numel() for parameter in trained),
        process=CONTEXT,
        latent=FLOAT * 4 * model.latent_shape[1] ** 2,
        prompt=sum(value.nbytes for value in model.cond.values()),
        picture=FLOAT * 3 * pixels**2,
        checkpointing=checkpointing,
        half=True,
        on_gpu=True,
        **settings,
    )


SMALL = {"sample_batch": 1, "minibatch": 1}


def cases() -> Iterator[tuple[str, Needs]]:
    """What docs/memory.md tables."""
    for name, sdxl in (("SD 1.5", False), ("SDXL", True)):
        model = build(sdxl)
        for checkpointing in (False, True):
            needs = needs_of(model, checkpointing, **SMALL)
            said = "checkpointing" if checkpointing else "no checkpointing"
            for rows in (1, 4, 16):
                yield f"{name}, DDPO, {said}, batches of {rows}", replace(needs, sample_batch=rows, minibatch=rows)
        direct = needs_of(model, True, direct=True, images=16, **SMALL)
        yield f"{name}, DRaFT-1, checkpointing, batches of 1", direct
        yield f"{name}, AlignProp over 20 moves, checkpointing, batches of 1", replace(direct, window=20)


def main() -> None:
    """Prints the peak of every case, and the whole plan of the smallest."""
    for name, needs in cases():
        rows = plan(needs)
        print(f"{name:62} {rows[-1].mib:9,.0f} MiB")
        if needs.checkpointing and needs.kind == "policy gradient" and needs.minibatch == 1:
            print("".join(f"    {row.phase:9} {row.mib:9,.0f} MiB  {row.note}\n" for row in rows), end="")


if __name__ == "__main__":
    main()
