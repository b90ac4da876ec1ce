"""Train the Stable-Diffusion-shaped pipeline of scenes: UNet and CLIP text encoder together, on cached latents.

v-prediction on Stable Diffusion's scaled-linear table, captions dropped one time in ten for classifier-free guidance.
Matrices are stepped by Muon, everything else by AdamW; the network runs in bf16 over float32 master weights.

    python recipes/scenes/sd.py --latents ~/scenes-weights/latents.safetensors --vae ~/scenes-weights/vae/final \
        --out ~/scenes-weights/sd
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import numpy as np
import torch
from common import Average, Log, cosine, load_state, minibatches, save_state
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file
from text import build_tokenizer, text_config, tokenize
from torch import Tensor, nn
from transformers import CLIPTextModel

WIDTH = 128  # of the text encoder


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
    )


def build_unet() -> UNet2DConditionModel:
    """One resolution (8x8) and wide transformer blocks: matrix products are what a CPU does well."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type="UNetMidBlock2DCrossAttn",
        block_out_channels=(192,),
        layers_per_block=1,
        transformer_layers_per_block=2,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        use_linear_projection=True,
    )


class Network(nn.Module):
    """The two trained parts as one module."""

    def __init__(self, unet: nn.Module, text: nn.Module) -> None:
        super().__init__()
        self.unet, self.text = unet, text

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        hidden = self.text(ids).last_hidden_state
        return self.unet(x, t, hidden, return_dict=False)[0]


def split_parameters(network: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices of the hidden layers, for Muon; everything else, for AdamW)."""
    hidden, rest = [], []
    for name, parameter in network.named_parameters():
        (hidden if parameter.ndim == 2 and "embed" not in name else rest).append(parameter)
    return hidden, rest


class Master:
    """float32 weights that are stepped, behind a bf16 network that is run."""

    def __init__(self, network: nn.Module) -> None:
        self.weights = network
        self.network = copy.deepcopy(network).to(torch.bfloat16).to(memory_format=torch.channels_last)
        self.pairs = list(zip(self.weights.parameters(), self.network.parameters(), strict=True))

    @torch.no_grad()
    def pull_gradients(self) -> None:
        for weight, parameter in self.pairs:
            weight.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None

    @torch.no_grad()
    def push_weights(self) -> None:
        for weight, parameter in self.pairs:
            parameter.copy_(weight)


def v_loss(network: nn.Module, latents: Tensor, ids: Tensor, alphas: Tensor, generator: torch.Generator) -> Tensor:
    """Mean squared error of v = alpha eps - sigma x0 at uniform times."""
    count = latents.shape[0]
    t = torch.randint(0, len(alphas), (count,), generator=generator)
    eps = torch.randn(latents.shape, generator=generator)
    alpha = alphas[t].sqrt()[:, None, None, None]
    sigma = (1 - alphas[t]).sqrt()[:, None, None, None]
    noisy = (alpha * latents + sigma * eps).bfloat16().contiguous(memory_format=torch.channels_last)
    predicted = network(noisy, t, ids).float()
    return (predicted - (alpha * eps - sigma * latents)).square().mean()


def export(network: Network, vae_folder: Path, folder: Path) -> None:
    vae = AutoencoderTiny.from_pretrained(vae_folder)
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=network.text,
        tokenizer=build_tokenizer(),
        unet=network.unet,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(dtype=torch.float16).save_pretrained(folder, safe_serialization=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latents", type=Path, required=True)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="torch.compile the network (a C++ compiler is needed)")
    parser.add_argument("--export", action="store_true", help="only write the pipeline of the saved state")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    network = Network(build_unet(), CLIPTextModel(text_config(tokenizer, WIDTH, 3)))
    hidden, rest = split_parameters(network)
    muon = torch.optim.Muon(hidden, lr=args.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    average = Average(network, 0.999)
    state = ({"network": network}, {"network": average}, {"muon": muon, "adam": adam})
    first = load_state(args.out, *state)
    log = Log(args.out)
    if not args.export:
        fit(args, network, (muon, adam), average, state, first, log, tokenize(tokenizer, [""])[0])
    average.copy_to(network)
    export(network, args.vae, args.out / "pipeline")


def fit(args, network, optimizers, average, state, first, log, empty) -> None:  # type: ignore[no-untyped-def]
    data = load_file(args.latents)
    latents, ids = data["latents"], data["ids"]
    alphas = scheduler().alphas_cumprod
    network.text.eval()
    master = Master(network)
    master.network.unet.set_attn_processor(AttnProcessor())  # the fused kernel's backward is slow on a CPU
    module = torch.compile(master.network) if args.compile else master.network
    order = minibatches(len(latents), args.batch, np.random.default_rng(args.seed))
    for _ in range(first):
        next(order)
    running = None
    for step in range(first, args.steps):
        rows = torch.from_numpy(next(order))
        generator = torch.Generator().manual_seed(args.seed * 10**7 + step)
        tokens = ids[rows].long()
        tokens[torch.rand(len(rows), generator=generator) < 0.1] = empty
        value = v_loss(module, latents[rows].float(), tokens, alphas, generator)
        value.backward()
        master.pull_gradients()
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * cosine(step, args.steps, 200)
            optimizer.step()
        master.push_weights()
        average.update(network, step)
        running = value.item() if running is None else 0.98 * running + 0.02 * value.item()
        if (step + 1) % 100 == 0:
            log(step=step + 1, loss=round(running, 5), norm=round(float(norm), 3))
        if (step + 1) % 500 == 0 or step + 1 == args.steps:
            save_state(args.out, step + 1, *state)


if __name__ == "__main__":
    main()
