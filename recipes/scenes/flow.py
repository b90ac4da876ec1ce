"""Train the Stable-Diffusion-3-shaped pipeline of scenes by flow matching: a small MM-DiT and two CLIP text encoders.

Times are logit-normal (Esser et al. 2024, 2403.03206). A plain ``from_pretrained`` needs a third text encoder; this one
is a T5 whose last norm is zero, so that it says nothing. Its 256 equal tokens have no positions, hence stay equal
through every layer and act as one token with log(256) added to its attention logit: that is how they are trained.

    python recipes/scenes/flow.py --latents ~/scenes-weights/latents.safetensors --vae ~/scenes-weights/vae/final \
        --out ~/scenes-weights/flow
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from fit import arguments, begin, fit
from text import build_tokenizer, text_config
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5Tokenizer

WIDTH = 96  # of each text encoder
SILENT = 256  # tokens of the third text encoder, the pipeline's default


def build_transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=8,
        out_channels=8,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=192,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=8,
    )


def silent_t5() -> tuple[T5EncoderModel, T5Tokenizer]:
    """A T5 whose hidden states are zero for every prompt, and a tokenizer of letters for it."""
    letters = ["<pad>", "</s>", "<unk>", "▁", *(chr(code) for code in range(33, 127))]
    tokenizer = T5Tokenizer(vocab=[(letter, -2.0) for letter in letters], extra_ids=0, model_max_length=512)
    model = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=2 * WIDTH, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    )
    nn.init.zeros_(model.encoder.final_layer_norm.weight)
    return model, tokenizer


class OneSilentToken:
    """Joint attention in which the last context token stands for ``SILENT`` equal ones."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any
    ) -> tuple[Tensor, Tensor]:
        count, places = hidden_states.shape[:2]

        def heads(value: Tensor) -> Tensor:
            return value.view(count, -1, attn.heads, value.shape[-1] // attn.heads).transpose(1, 2)

        pairs = [(attn.to_q, attn.add_q_proj), (attn.to_k, attn.add_k_proj), (attn.to_v, attn.add_v_proj)]
        q, k, v = (torch.cat([heads(a(hidden_states)), heads(b(encoder_hidden_states))], 2) for a, b in pairs)
        logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        bias = torch.zeros(k.shape[2], dtype=logits.dtype)
        bias[-1] = math.log(SILENT)
        out = ((logits + bias).softmax(-1) @ v).transpose(1, 2).flatten(2)
        context = out[:, places:]
        if not attn.context_pre_only:
            context = attn.to_add_out(context)
        return attn.to_out[0](out[:, :places]), context


class Network(nn.Module):
    """The three trained parts as one module."""

    def __init__(self, transformer: nn.Module, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.transformer, self.first, self.second = transformer, first, second

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        said = [text(ids, output_hidden_states=True) for text in (self.first, self.second)]
        context = torch.cat([s.hidden_states[-2] for s in said], dim=-1)
        context = torch.cat([context, torch.zeros_like(context[:, :1])], dim=1)
        pooled = torch.cat([s.text_embeds for s in said], dim=-1)
        return self.transformer(x, context, pooled, t * 1000, return_dict=False)[0]


def flow_loss(network: nn.Module, latents: Tensor, ids: Tensor, generator: torch.Generator) -> Tensor:
    """Mean squared error of the velocity eps - x0 at logit-normal times."""
    t = torch.randn(len(latents), generator=generator).sigmoid()
    eps = torch.randn(latents.shape, generator=generator)
    noisy = (1 - t)[:, None, None, None] * latents + t[:, None, None, None] * eps
    predicted = network(noisy.bfloat16(), t, ids).float()
    return (predicted - (eps - latents)).square().mean()


def export(network: Network, vae_folder: Path, folder: Path) -> None:
    t5, letters = silent_t5()
    pipe = StableDiffusion3Pipeline(
        transformer=network.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=AutoencoderTiny.from_pretrained(vae_folder),
        text_encoder=network.first,
        tokenizer=build_tokenizer(),
        text_encoder_2=network.second,
        tokenizer_2=build_tokenizer(),
        text_encoder_3=t5,
        tokenizer_3=letters,
    )
    pipe.to(dtype=torch.float16)
    for encoder in (pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3):
        encoder.float()  # transformers loads what is stored, diffusers float32: a plain load must not mix them
    pipe.save_pretrained(folder, safe_serialization=True)


def prepare(network: Network) -> None:
    network.transformer.set_attn_processor(OneSilentToken())


def main() -> None:
    args = arguments(__doc__, steps=3500)
    torch.manual_seed(args.seed)
    text = text_config(build_tokenizer(), WIDTH, 3, projection=WIDTH)
    network = Network(build_transformer(), CLIPTextModelWithProjection(text), CLIPTextModelWithProjection(text)).eval()
    stepper = begin(args, network)
    if args.export:
        stepper.load(args.out)
    else:
        fit(args, stepper, prepare, flow_loss)
    stepper.average.copy_to(network)
    export(network, args.vae, args.out / "pipeline")


if __name__ == "__main__":
    main()
