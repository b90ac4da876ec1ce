"""Train the tiny CLIP of scenes: the differentiable reward that ships with the pipelines.

Contrastive (2103.00020) with hard negatives: beside the captions of the batch, every picture is compared with a caption
of its own that differs in one attribute. Pictures get noise and blur, so that the score does not hang on fine texture.
With --shapes a linear head must also read from a picture's embedding which shapes are in it, for an adapter that has
nothing but a linear map.

    python recipes/scenes/clip.py --out ~/scenes-weights/clip
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Log
from fit import Master, Stepper
from text import build_tokenizer, text_config, tokenize
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, interpolate
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionConfig

from tropism.worlds.scenes.grammar import SHAPES, alter, caption, parse, sample_scene
from tropism.worlds.scenes.render import render_batch

WIDTH = 128
MEAN, STD = 0.5, 0.5


def build(tokenizer: object) -> CLIPModel:
    text = text_config(tokenizer, WIDTH, 3)  # type: ignore[arg-type]
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=64,
        patch_size=8,
        projection_dim=WIDTH,
    )
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH))


def draw(rng: np.random.Generator, count: int, split: str) -> tuple[Tensor, list[str], list[str]]:
    """Pictures (N, 3, 64, 64) in [0, 1], their captions, and captions that differ in one attribute."""
    scenes = [sample_scene(rng, split) for _ in range(count)]  # type: ignore[arg-type]
    pictures = render_batch(scenes, rng.integers(0, 2**31, size=count).tolist())
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    return images, [caption(s) for s in scenes], [caption(alter(s, rng)) for s in scenes]


def roughen(images: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the pictures blurred by a down- and up-sampling, all with noise of up to 0.1."""
    blurred = interpolate(interpolate(images, scale_factor=0.5, mode="area"), scale_factor=2.0, mode="bilinear")
    pick = (torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5).float()
    level = 0.1 * torch.rand(len(images), 1, 1, 1, generator=generator)
    mixed = pick * blurred + (1 - pick) * images
    return mixed + level * torch.randn(images.shape, generator=generator)


def embed(model: CLIPModel, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Unit embeddings (N, D) and (M, D), float32."""
    vision = model.visual_projection(model.vision_model(pixel_values=images).pooler_output).float()
    text = model.text_projection(model.text_model(input_ids=ids).pooler_output).float()
    return vision / vision.norm(dim=-1, keepdim=True), text / text.norm(dim=-1, keepdim=True)


def contrastive(vision: Tensor, text: Tensor, scale: Tensor, same: Tensor) -> Tensor:
    """vision (N, D), text (2N, D): captions, then hard negatives; ``same`` (N, N) marks equal captions off the
    diagonal, which are no negatives."""
    count = len(vision)
    logits = scale * vision @ text.T
    hard = torch.zeros(count, count, dtype=torch.bool)
    logits = logits.masked_fill(torch.cat([same, hard], dim=1), float("-inf"))
    target = torch.arange(count)
    back = (scale * text[:count] @ vision.T).masked_fill(same, float("-inf"))
    return (cross_entropy(logits, target) + cross_entropy(back, target)) / 2


class Read(nn.Module):
    """The CLIP, and a linear head over its pictures; they are stepped together."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip, self.shapes = clip, nn.Linear(WIDTH, len(SHAPES))

    def missed(self, vision: Tensor, texts: list[str]) -> Tensor:
        """Cross-entropy of which shapes are in pictures of unit embeddings (N, D), in nats a picture."""
        wanted = [[any(group.shape == shape for group in parse(text).groups) for shape in SHAPES] for text in texts]
        said = self.shapes((vision * WIDTH**0.5).to(self.shapes.weight)).float()
        return binary_cross_entropy_with_logits(said, torch.tensor(wanted).float(), reduction="sum") / len(texts)


@torch.no_grad()
def accuracy(model: CLIPModel, tokenizer: object, count: int = 512) -> float:
    """How often a held-out picture is closer to its caption than to one that differs in one attribute."""
    images, right, wrong = draw(np.random.default_rng(10**6), count, "held_out")
    vision, text = embed(model, (images - MEAN) / STD, tokenize(tokenizer, right + wrong))  # type: ignore[arg-type]
    return float(((vision * text[:count]).sum(1) > (vision * text[count:]).sum(1)).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="folder of such a CLIP to start from; none: random weights")
    parser.add_argument("--shapes", type=float, default=0.0, help="weight of a linear head that reads shapes")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    model = (CLIPModel.from_pretrained(args.start, dtype=torch.float32) if args.start else build(tokenizer)).eval()
    read = Read(model)
    stepper = Stepper(read, args.lr, args.steps, decay=0.998)
    first = stepper.load(args.out)
    master, log = Master(read), Log(args.out)
    network: Any = master.network.clip
    network.set_attn_implementation("eager")  # the fused kernel's backward is slow on a CPU
    for step in range(first, args.steps):
        images, right, wrong = draw(np.random.default_rng([args.seed, step]), args.batch, "train")
        generator = torch.Generator().manual_seed(args.seed * 10**7 + step)
        pixels = ((roughen(images, generator) - MEAN) / STD).bfloat16()
        vision, text = embed(network, pixels, tokenize(tokenizer, right + wrong))
        same = torch.tensor([[a == b for b in right] for a in right]).fill_diagonal_(False)
        scale = network.logit_scale.float().exp().clamp(max=100)
        value = contrastive(vision, text, scale, same) + args.shapes * master.network.missed(vision, right)
        value.backward()
        stepper.step(master, step)
        if (step + 1) % 100 == 0:
            log(step=step + 1, loss=round(value.item(), 4), accuracy=accuracy(model, tokenizer))
            stepper.save(args.out, step + 1)
    stepper.average.copy_to(read)
    log(step=args.steps, accuracy=accuracy(model, tokenizer, 4000))
    final = args.out / "final"
    model.half().save_pretrained(final)
    tokenizer.save_pretrained(final)
    CLIPImageProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, image_mean=[MEAN] * 3, image_std=[STD] * 3
    ).save_pretrained(final)


if __name__ == "__main__":
    main()
