"""Train the IP-Adapter of the Stable-Diffusion-shaped pipeline of scenes, in diffusers' own classes and file format.

Ye et al. 2023, IP-Adapter (2308.06721): a projection of CLIP's embedding of a picture to four tokens, and a key and a
value layer of their own for these in every cross-attention; all else is frozen. References show the scene itself, drawn
again, or one of its objects alone, on a background and in a size of its own. So that there is something to learn from
them, most captions say no colour, or nothing at all.

Departures: the projection does not start at random but as the least-squares map from the embedding to what the text
encoder says at four words of the reference's caption (colour, shape, background, end), which saves most of the training
where keys and values start as those of the text. Matrices are stepped by Muon, as in ``sd.py``.

    python recipes/scenes/clip.py --start CLIP --out longer --steps 1600 --seed 5
    python recipes/scenes/clip.py --start longer/final --out shapes --steps 900 --seed 6 --shapes 0.3
    python recipes/scenes/ip_adapter.py --clip shapes/final --out ip

The pipeline is the installed one; the adapter has a CLIP of its own, which tells shapes better than the reward does.
"""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import KINDS, SHARES, Log, to_tensor
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, IPAdapterAttnProcessor
from fit import Master, Stepper, learn
from safetensors.torch import load_file, save_file
from sd import v_loss
from text import LENGTH, tokenize
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection

from tropism.catalog import WEIGHTS
from tropism.models.image_prompts import Relevant, by_relevance, read_adapter
from tropism.worlds.scenes import BACKGROUNDS, SHAPES, SIZES, Group, Scene, caption, render_batch, sample_scene
from tropism.worlds.scenes.grammar import split_of

FORMS = {"all": 0.15, "shapes": 0.25, "colors": 0.4, "nothing": 0.2}  # shares of captions, by what they say of objects
SAID = {"style": "up_blocks.0.attentions.1"}  # what a probe found
DROPPED = 0.1  # share of references that are left out, for guidance
File = dict[str, dict[str, Tensor]]


def less(text: str, groups: Sequence[Group], form: str) -> str:
    """The caption without the colours of these objects, or without their shapes, or as it is, or nothing."""
    if form == "nothing":
        return ""
    for group in groups if form != "all" else ():
        kept = group.shape if form == "shapes" else group.color
        text = re.sub(rf"{group.color} {group.shape}(es|s)?", kept + (r"\1" if form == "shapes" else ""), text, count=1)
    return re.sub(rf"\ban (?={'|'.join(SHAPES)})", "a ", text)


def named(group: Group) -> str:
    """What a reference is called: its own caption, the one form in which the text encoder has seen objects alone."""
    return caption(Scene((Group(group.shape, group.color),), None, "white"))


@dataclass(frozen=True)
class Drawn:
    """N pictures with two references each, which are equal where there is one."""

    pictures: np.ndarray  # (N, 64, 64, 3) uint8
    references: np.ndarray  # (2 N, 64, 64, 3) uint8, those of a picture together
    said: list[str]  # N
    names: list[str]  # 2 N
    shown: list[Scene]  # 2 N


def draw(rng: np.random.Generator, count: int) -> Drawn:
    """No held-out combination is shown, in references neither."""
    scenes: list[Scene] = []
    shown: list[Scene] = []
    said, names = [], []
    for kind in rng.choice(len(KINDS), size=count, p=SHARES):
        scene = sample_scene(rng, "train", KINDS[kind])
        first, second = scene.groups[0], scene.groups[-1]
        alone = [
            Scene((Group(each.shape, each.color, rng.choice([None, *SIZES])),), None, str(rng.choice(BACKGROUNDS)))
            for each in (first, second)
        ]
        whole = rng.random() < (0.3 if KINDS[kind] == "pair" else 0.5) or any(
            split_of(each) != "train" for each in alone
        )
        pair = [scene, scene] if whole else alone if first is not second else [alone[0], alone[0]]
        scenes.append(scene)
        shown += pair
        names += [named(each.groups[0]) for each in pair]
        said.append(less(caption(scene), scene.groups, str(rng.choice(list(FORMS), p=list(FORMS.values())))))
    seeds = rng.integers(0, 2**31, size=(2, count))
    equal = [a is b for a, b in zip(shown[::2], shown[1::2], strict=True)]
    others = np.where(equal, seeds[1], rng.integers(0, 2**31, size=count))
    references = render_batch(shown, np.stack([seeds[1], others], axis=1).flatten().tolist())
    return Drawn(render_batch(scenes, seeds[0].tolist()), references, said, names, shown)


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
    parts: dict[str, list[Tensor]] = {"latents": [], "images": [], "ids": [], "names": [], "words": []}
    for start in range(0, count, 500):
        drawn = draw(np.random.default_rng([seed, start]), 500)
        with torch.autocast("cpu", torch.bfloat16):
            parts["latents"].append(pipe.vae.encoder(to_tensor(drawn.pictures)).half())
            parts["images"].append(clip(to_tensor(drawn.references)).image_embeds.float().unflatten(0, (-1, 2)))
        parts["ids"].append(tokenize(pipe.tokenizer, drawn.said).short())
        parts["names"].append(tokenize(pipe.tokenizer, drawn.names).short().unflatten(0, (-1, 2)))
        parts["words"].append(hidden_words(pipe, drawn.shown[::2]))
    return {name: torch.cat(values).contiguous() for name, values in parts.items()}


def initial(pipe: Any, images: Tensor, words: Tensor) -> File:
    """Keys and values as those of the text, in the names and order of diffusers' files; the projection is the
    least-squares map from the first of ``images`` (N, 2, D) to ``words`` (N, 4, width)."""
    norm, layers = pipe.text_encoder.final_layer_norm, {}
    wanted = ((words - norm.bias) / norm.weight).flatten(1)  # before the norm's own scale, which the projection has too
    known = torch.cat([images[:, 0], torch.ones(len(images), 1)], dim=1)
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
        if isinstance(processor, Relevant):
            processor = processor.inner
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


@torch.no_grad()
def told_text(encoder: Any, ids: Tensor, names: Tensor) -> Tensor:
    """(N, 3 LENGTH, width): what is said of prompts (N, LENGTH), and at the words of names (N, 2, LENGTH), as
    ``ImagePrompted`` tells it."""
    count = len(ids)
    hidden = encoder(torch.cat([ids, names.flatten(0, 1)])).last_hidden_state
    words = (names != names[..., :1]) & (
        names != names[..., -1:]
    )  # neither the start mark nor the end mark and padding
    return torch.cat(
        [hidden[:count], (hidden[count:] * words.flatten(0, 1)[..., None]).unflatten(0, (-1, 2)).flatten(1, 2)], 1
    )


def plain_attention(unet: UNet2DConditionModel) -> None:
    """diffusers' attention without the fused kernel, whose backward is slow on a CPU; the weights stay the same."""
    processors: dict[str, Any] = {}
    for name, old in unet.attn_processors.items():
        processors[name] = AttnProcessor()
        if isinstance(old, nn.Module):
            processors[name] = IPAdapterAttnProcessor(old.hidden_size, old.cross_attention_dim, old.num_tokens)
            processors[name].to_k_ip, processors[name].to_v_ip = old.to_k_ip, old.to_v_ip
            processors[name] = Relevant(processors[name], LENGTH, by_relevance)
    unet.set_attn_processor(processors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--count", type=int, default=20_000, help="pictures that are drawn and encoded once")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="an adapter to start from; none: see above")
    parser.add_argument("--clip", type=Path, default=WEIGHTS / "clip", help="folder of the CLIP that sees references")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    pipe = StableDiffusionPipeline.from_pretrained(WEIGHTS / "sd", dtype=torch.float32)
    clip = CLIPVisionModelWithProjection.from_pretrained(args.clip, dtype=torch.float32)
    log, cached = Log(args.out), args.out / "encoded.safetensors"
    if not cached.exists():
        save_file(encoded(pipe, clip, args.count, args.seed), cached)
    data = load_file(cached)
    log(encoded=len(data["latents"]))
    unet = pipe.unet.requires_grad_(False).eval()
    with torch.no_grad():
        begin = read_adapter(args.start)[0] if args.start else initial(pipe, data["images"], data["words"])
        unet._load_ip_adapter_weights(
            {part: {k: v.float() for k, v in values.items()} for part, values in begin.items()}
        )
    plain_attention(unet)
    adapter = Adapter(unet)
    stepper = Stepper(adapter, args.lr, args.steps, decay=0.97, warmup=20)
    first = stepper.load(args.out)
    master = Master(adapter)
    fast = master.network.__dict__["unet"].bfloat16().to(memory_format=torch.channels_last)
    assert next(fast.encoder_hid_proj.parameters()) is next(master.network.parameters())
    text = pipe.text_encoder.bfloat16()

    def loss(rows: Tensor, generator: torch.Generator) -> Tensor:
        images = data["images"][rows].clone()
        images[torch.rand(len(rows), generator=generator) < DROPPED] = 0.0
        told: Any = (told_text(text, data["ids"][rows].long(), data["names"][rows].long()), images.bfloat16())
        return v_loss(master.network, data["latents"][rows].float(), told, generator, pipe.scheduler.alphas_cumprod)

    learn(args, stepper, master, log, first, len(data["latents"]), loss, said=50, saved=200)
    stepper.average.copy_to(adapter)
    shutil.copytree(args.clip, args.out / "final" / "image_encoder", dirs_exist_ok=True)
    save_file(written(unet), args.out / "final" / "ip_adapter.safetensors", SAID)


if __name__ == "__main__":
    main()
