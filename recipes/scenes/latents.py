"""Encode the training pictures once: latents (fp16) and token ids, kept in one safetensors file.

python recipes/scenes/latents.py --vae ~/scenes-weights/vae/final --out ~/scenes-weights/latents.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from common import KINDS, draw, to_tensor
from diffusers import AutoencoderTiny
from safetensors.torch import save_file
from text import build_tokenizer, tokenize


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=160_000)
    parser.add_argument("--kind", choices=KINDS, help="of all captions; a mixture without it")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    tokenizer = build_tokenizer()
    vae = AutoencoderTiny.from_pretrained(args.vae).eval().to(memory_format=torch.channels_last)
    latents, ids = [], []
    size = 500
    for start in range(0, args.count, size):
        pictures, captions = draw(np.random.default_rng([args.seed, start]), size, kind=args.kind)
        with torch.autocast("cpu", torch.bfloat16):
            latents.append(vae.encoder(to_tensor(pictures).contiguous(memory_format=torch.channels_last)).half())
        ids.append(tokenize(tokenizer, captions).short())
        if start % 20_000 == 0:
            print(start, "of", args.count, flush=True)
    everything = torch.cat(latents).contiguous()
    deviation, mean = torch.std_mean(everything.float(), dim=(0, 2, 3))
    print("channel mean", mean.tolist(), "deviation", deviation.tolist())
    empty = tokenize(tokenizer, [""])[0].short()
    save_file({"latents": everything, "ids": torch.cat(ids), "empty": empty}, args.out)


if __name__ == "__main__":
    main()
