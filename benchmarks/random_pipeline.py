"""Writes a pipeline of the shipped architecture (recipes/scenes/sd.py) with random weights.

python benchmarks/random_pipeline.py FOLDER SEED
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTextModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes" / "scenes"))
from sd import WIDTH, build_unet, scheduler
from text import build_tokenizer, text_config
from vae import build


def main() -> None:
    folder, seed = sys.argv[1:]
    torch.manual_seed(int(seed))
    tokenizer = build_tokenizer()
    pipe = StableDiffusionPipeline(
        vae=build(),
        text_encoder=CLIPTextModel(text_config(tokenizer, WIDTH, 3)),
        tokenizer=tokenizer,
        unet=build_unet(),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)


if __name__ == "__main__":
    main()
