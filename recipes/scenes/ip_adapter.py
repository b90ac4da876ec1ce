"""Train the IP-Adapter of the Stable-Diffusion-shaped pipeline of scenes, in diffusers' own classes and file format.

Ye et al. 2023, IP-Adapter (2308.06721): a projection of CLIP's embedding of a picture to four tokens, and a key and a
value layer of their own for these in every cross-attention; all else is frozen. References show the scene itself, drawn
again, or one of its objects alone, on a background and in a size of its own. So that there is something to learn from
them, most captions say no colour, or nothing at all.

Departures: the projection does not start at random but as the least-squares map from the embedding to what the text
encoder says at four words of the reference's caption (colour, shape, background, end), which saves most of the training
where keys and values start as those of the text. Matrices are stepped by Muon, as in ``sd.py``.

    python recipes/scenes/ip_adapter.py --out ~/scenes-weights/ip
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import KINDS, SHARES, Log, minibatches, to_tensor
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, IPAdapterAttnProcessor
from fit import Master, Stepper
from safetensors.torch import load_file, save_file
from sd import v_loss
from text import tokenize
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection

from tropism.catalog import WEIGHTS
from tropism.worlds.scenes import BACKGROUNDS, SHAPES, SIZES, Group, Scene, caption, render_batch, sample_scene
from tropism.worlds.scenes.grammar import split_of

FULL, COLOURLESS = 0.25, 0.5  # shares of captions; the others are empty
DROPPED = 0.1  # share of references that are left out, for guidance
File = dict[str, dict[str, Tensor]]


def without_colors(text: str, groups: tuple[Group, ...]) -> str:
    """The caption without the colours of these objects."""
    for group in groups:
        text = text.replace(f"{group.color} {group.shape}", group.shape, 1)
    return re.sub(rf"\ban (?={'|'.join(SHAPES)})", "a ", text)


def draw(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray, list[str], list[Scene]]:
    """``count`` pictures, their references (N, 64, 64, 3) uint8 each, what is said of the pictures, and the scenes of
    the references. No held-out combination is shown, in references neither."""
    scenes, references, said = [], [], []
    for kind in rng.choice(len(KINDS), size=count, p=SHARES):
        scene = sample_scene(rng, "train", KINDS[kind])
        group = scene.groups[rng.integers(len(scene.groups))]
        size, ground = rng.choice([None, *SIZES]), str(rng.choice(BACKGROUNDS))
        alone = Scene((Group(group.shape, group.color, size),), None, ground)
        whole = rng.random() < 0.5 or split_of(alone) != "train"
        references.append(scene if whole else alone)
        scenes.append(scene)
        form = rng.random()
        text = caption(scene) if form < FULL + COLOURLESS else ""
        said.append(text if form < FULL else without_colors(text, scene.groups if whole else (group,)))
    seeds = rng.integers(0, 2**31, size=(2, count)).tolist()
    return render_batch(scenes, seeds[0]), render_batch(references, seeds[1]), said, references


def hidden_words(pipe: Any, scenes: list[Scene]) -> Tensor:
    """(N, 4, width): what the text encoder says at the first object's colour and shape, the background, and the end."""
    texts = [caption(scene) for scene in scenes]
    hidden = pipe.text_encoder(tokenize(pipe.tokenizer, texts)).last_hidden_state
    found = []
    for row, text, scene in zip(hidden, texts, scenes, strict=True):
        words = text.split()
        color = words.index(scene.groups[0].color)
        found.append(row[[color + 1, color + 2, len(words) - 1, len(words) + 1]])  # a start mark is before the words
    return torch.stack(found)


@torch.no_grad()
def encoded(pipe: Any, clip: Any, count: int, seed: int) -> dict[str, Tensor]:
    """Latents of pictures, embeddings of references, token ids: everything that needs no training, once."""
    parts: dict[str, list[Tensor]] = {"latents": [], "images": [], "ids": [], "words": []}
    for start in range(0, count, 500):
        pictures, references, said, shown = draw(np.random.default_rng([seed, start]), 500)
        with torch.autocast("cpu", torch.bfloat16):
            parts["latents"].append(pipe.vae.encoder(to_tensor(pictures)).half())
            parts["images"].append(clip(to_tensor(references)).image_embeds.float())
        parts["ids"].append(tokenize(pipe.tokenizer, said).short())
        parts["words"].append(hidden_words(pipe, shown))
    return {name: torch.cat(values).contiguous() for name, values in parts.items()}


def initial(pipe: Any, images: Tensor, words: Tensor) -> File:
    """Keys and values as those of the text, in the names and order of diffusers' files; the projection is the
    least-squares map from ``images`` (N, D) to ``words`` (N, 4, width)."""
    norm, layers = pipe.text_encoder.final_layer_norm, {}
    wanted = ((words - norm.bias) / norm.weight).flatten(1)  # before the norm's own scale, which the projection has too
    known = torch.cat([images, torch.ones(len(images), 1)], dim=1)
    found = torch.linalg.lstsq(known.double(), wanted.double()).solution.float()
    projection = {"proj.weight": found[:-1].T.contiguous(), "proj.bias": found[-1]}
    for place, name in enumerate(pipe.unet.attn_processors):
        if name.endswith("attn2.processor"):
            attention = pipe.unet.get_submodule(name.removesuffix(".processor"))
            layers |= {f"{place}.to_{one}_ip.weight": getattr(attention, f"to_{one}").weight.clone() for one in "kv"}
    return {
        "image_proj": projection | {"norm.weight": norm.weight.clone(), "norm.bias": norm.bias.clone()},
        "ip_adapter": layers,
    }


def written(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """The adapter in ``unet`` as such a file has it, in half precision."""
    projection = unet.encoder_hid_proj.image_projection_layers[0]
    found = {f"image_proj.proj.{key}": value for key, value in projection.image_embeds.state_dict().items()}
    found |= {f"image_proj.norm.{key}": value for key, value in projection.norm.state_dict().items()}
    for place, processor in enumerate(unet.attn_processors.values()):
        if isinstance(processor, nn.Module):
            found[f"ip_adapter.{place}.to_k_ip.weight"] = processor.to_k_ip[0].weight
            found[f"ip_adapter.{place}.to_v_ip.weight"] = processor.to_v_ip[0].weight
    return {name: value.detach().half().contiguous() for name, value in found.items()}


class Adapter(nn.Module):
    """What is trained, as a module; the network it sits in is no part of it, but is copied with it."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.trained = nn.ModuleList([unet.encoder_hid_proj, *_with_weights(unet)]).requires_grad_(True)
        self.__dict__["unet"] = unet

    def forward(self, x: Tensor, t: Tensor, told: tuple[Tensor, Tensor]) -> Tensor:
        text, images = told
        return self.__dict__["unet"](x, t, text, added_cond_kwargs={"image_embeds": [images]}, return_dict=False)[0]


def _with_weights(unet: UNet2DConditionModel) -> list[nn.Module]:
    return [processor for processor in unet.attn_processors.values() if isinstance(processor, nn.Module)]


def plain_attention(unet: UNet2DConditionModel) -> None:
    """diffusers' attention without the fused kernel, whose backward is slow on a CPU; the weights stay the same."""
    processors: dict[str, Any] = {}
    for name, old in unet.attn_processors.items():
        processors[name] = AttnProcessor()
        if isinstance(old, nn.Module):
            processors[name] = IPAdapterAttnProcessor(old.hidden_size, old.cross_attention_dim, old.num_tokens)
            processors[name].to_k_ip, processors[name].to_v_ip = old.to_k_ip, old.to_v_ip
    unet.set_attn_processor(processors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=350)
    parser.add_argument("--count", type=int, default=12_000, help="pictures that are drawn and encoded once")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    pipe = StableDiffusionPipeline.from_pretrained(WEIGHTS / "sd", dtype=torch.float32)
    clip = CLIPVisionModelWithProjection.from_pretrained(WEIGHTS / "clip", dtype=torch.float32)
    log, cached = Log(args.out), args.out / "encoded.safetensors"
    if not cached.exists():
        save_file(encoded(pipe, clip, args.count, args.seed), cached)
    data = load_file(cached)
    log(encoded=len(data["latents"]))
    unet = pipe.unet.requires_grad_(False).eval()
    with torch.no_grad():
        unet._load_ip_adapter_weights(initial(pipe, data["images"], data["words"]))
    plain_attention(unet)
    adapter = Adapter(unet)
    stepper = Stepper(adapter, args.lr, args.steps, decay=0.98, warmup=20)
    first = stepper.load(args.out)
    master = Master(adapter)
    fast = master.network.__dict__["unet"].bfloat16().to(memory_format=torch.channels_last)
    assert next(fast.encoder_hid_proj.parameters()) is next(master.network.parameters())
    text = pipe.text_encoder.bfloat16()
    order = minibatches(len(data["latents"]), args.batch, np.random.default_rng(args.seed))
    running = None
    for step in range(args.steps):
        rows = torch.from_numpy(next(order))
        if step < first:
            continue
        generator = torch.Generator().manual_seed(args.seed * 10**7 + step)
        images = data["images"][rows].clone()
        images[torch.rand(len(rows), generator=generator) < DROPPED] = 0.0
        with torch.no_grad():
            hidden = text(data["ids"][rows].long()).last_hidden_state
        told: Any = (hidden, images[:, None].bfloat16())
        value = v_loss(master.network, data["latents"][rows].float(), told, generator, pipe.scheduler.alphas_cumprod)
        value.backward()
        norm = stepper.step(master, step)
        running = value.item() if running is None else 0.98 * running + 0.02 * value.item()
        if (step + 1) % 50 == 0:
            log(step=step + 1, loss=round(running, 5), norm=round(norm, 3))
        if (step + 1) % 200 == 0 or step + 1 == args.steps:
            stepper.save(args.out, step + 1)
    stepper.average.copy_to(adapter)
    save_file(written(unet), args.out / "ip_adapter.safetensors", {"image_encoder": "../clip"})


if __name__ == "__main__":
    main()
