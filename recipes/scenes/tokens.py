"""Train the image-token model of scenes: a tokenizer over the shipped autoencoder's latents, then a small causal
transformer over its tokens.

    python recipes/scenes/latents.py --vae tropism/worlds/scenes/weights/flow/vae --out ~/scenes-weights/latents.safetensors
    python recipes/scenes/tokens.py tokenizer --latents ~/scenes-weights/latents.safetensors --out ~/scenes-weights/tokens
    python recipes/scenes/tokens.py network --latents ~/scenes-weights/latents.safetensors --out ~/scenes-weights/tokens

Both go on from what was saved.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from common import Average, Log, cosine, load_state, minibatches, save_state
from safetensors.torch import load_file
from torch import Tensor

from tropism.models.tokenizer import Tokenizer

SAVE_EVERY = 250


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["tokenizer", "network"])
    parser.add_argument("--latents", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--levels", type=int, nargs="+", default=[5, 5, 5, 5])
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def tokenizer_loss(tokenizer: Tokenizer, latents: Tensor) -> Tensor:
    """Mean squared error of latents whose deviation is about 1."""
    codes = tokenizer.encode(latents)
    return (tokenizer.decode(codes).float() - latents).square().mean()


def train_tokenizer(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    tokenizer = Tokenizer(levels=args.levels)
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    average, folder = Average(tokenizer, 0.995), args.out / "training-tokenizer"
    state = ({"tokenizer": tokenizer}, {"tokenizer": average}, {"adam": optimizer})
    first, log = load_state(folder, *state), Log(folder)
    latents = load_file(args.latents)["latents"]
    order = minibatches(len(latents), args.batch, np.random.default_rng(args.seed))
    running = 1.0
    for step in range(first, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * cosine(step, args.steps, 100)
        with torch.autocast("cpu", torch.bfloat16):
            loss = tokenizer_loss(tokenizer, latents[torch.from_numpy(next(order))].float())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tokenizer.parameters(), 1.0)
        optimizer.step()
        average.update(tokenizer, step)
        running += 0.02 * (loss.item() - running)
        if (step + 1) % 100 == 0:
            log(step=step + 1, error=round(running, 5))
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == args.steps:
            save_state(folder, step + 1, *state)
    average.copy_to(tokenizer)
    tokenizer.save(args.out / "tokenizer")


def main() -> None:
    args = arguments()
    {"tokenizer": train_tokenizer}[args.part](args)


if __name__ == "__main__":
    main()
