"""Train the autoencoder of the scenes pipelines: an ``AutoencoderTiny``, 64x64x3 -> 8x8x8.

The latents are pushed towards zero mean and unit deviation a channel, and noise is added to them before decoding, so
that the decoder forgives the small errors of a generator.

    python recipes/scenes/vae.py --out ~/scenes-weights/vae
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from common import Average, Log, cosine, draw, load_state, save_state, to_tensor
from diffusers import AutoencoderTiny
from torch import Tensor

CHANNELS = 32  # a multiple of 32 is what bf16 convolutions on a CPU run fast with


def build() -> AutoencoderTiny:
    return AutoencoderTiny(
        latent_channels=8,
        encoder_block_out_channels=(CHANNELS,) * 4,
        decoder_block_out_channels=(CHANNELS,) * 4,
        num_encoder_blocks=(1, 1, 3, 4),
        num_decoder_blocks=(4, 3, 1, 1),
    )


def loss(vae: AutoencoderTiny, pictures: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """Pictures in [-1, 1] -> (what is minimised, the mean squared error in [0, 1] units)."""
    latents = vae.encoder(pictures).float()
    deviation, mean = torch.std_mean(latents, dim=(0, 2, 3))
    decoded = vae.decoder(latents + noise * torch.randn_like(latents)).float()
    error = decoded - pictures
    mse = error.square().mean()
    tame = mean.square().mean() + (deviation - 1).square().mean()
    return mse + 0.05 * error.abs().mean() + 0.01 * tame, mse.detach() / 4


@torch.no_grad()
def psnr(vae: AutoencoderTiny, pictures: Tensor) -> float:
    """Decibels on held-out pictures, without latent noise."""
    decoded = vae.decoder(vae.encoder(pictures)).clamp(-1, 1)
    return float(-10 * torch.log10((decoded - pictures).square().mean() / 4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--noise", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    vae = build().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    average = Average(vae, 0.999)
    state = ({"vae": vae}, {"vae": average}, {"adam": optimizer})
    first = load_state(args.out, *state)
    log = Log(args.out)
    held_out = to_tensor(draw(np.random.default_rng(10**6), 256, "held_out")[0])
    for step in range(first, args.steps):
        pictures = to_tensor(draw(np.random.default_rng([args.seed, step]), args.batch)[0])
        pictures = pictures.contiguous(memory_format=torch.channels_last)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * cosine(step, args.steps, 200)
        with torch.autocast("cpu", torch.bfloat16):
            total, mse = loss(vae, pictures, args.noise)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        average.update(vae, step)
        if (step + 1) % 250 == 0 or step + 1 == args.steps:
            save_state(args.out, step + 1, *state)
            log(step=step + 1, mse=float(mse), norm=float(norm), psnr=psnr(vae, held_out))
    average.copy_to(vae)
    log(step=args.steps, psnr_average=psnr(vae, held_out))
    vae.save_pretrained(args.out / "final")


if __name__ == "__main__":
    main()
