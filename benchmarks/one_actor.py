"""One character in many scenes: OneActor against plain sampling, on prompts that leave the colour open.

A prompt such as "a star on a white background" says no colour, and scenes-sd then draws red, purple or several at once.
For each seed a character (shape and colour) is chosen by chance. The target is drawn with a caption that says its
colour, ten auxiliary pictures with the open one; a projector is tuned on them, and pictures of all sizes and
backgrounds are drawn from the same noises with and without the offset. ``same`` is the share whose (largest) object has
the target's shape and colour; ``match`` the share with what the prompt itself says: one object, its shape, its size if
any, the background.

    python benchmarks/one_actor.py --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from guiding import head, load, row, said, told
from torch import Tensor

from tropism import one_actor, pictures
from tropism.base import Prompts
from tropism.evaluate import deterministic
from tropism.rewards import as_reward
from tropism.steering import image_seeds, steer_policy
from tropism.steering.one_actor import Settings
from tropism.worlds.scenes import BACKGROUNDS, COLORS, SHAPES
from tropism.worlds.scenes.verify import look

EACH = ("same", "match")
WAYS = ("plain", "likeness:0.8", "likeness:1", "likeness:1,exclude:0.5", "likeness:1,from:0.33")


def prompts(word: str, sizes: tuple[str, ...] = ("", "small ", "large ")) -> list[str]:
    """Every size on every background."""
    return [
        f"a {size}{word} on {'an' if background[0] in 'aeiou' else 'a'} {background} background"
        for background in BACKGROUNDS
        for size in sizes
    ]


@dataclass(frozen=True)
class Judged:
    """(N,) each."""

    same: Tensor
    shape: Tensor
    color: Tensor
    match: Tensor


def judge(images: Tensor, text: list[str], shape: str, color: str) -> Judged:
    """Of pictures (N, 3, 64, 64): against the target's look, and against their own prompts."""
    rows = []
    for image, prompt in zip(images, text, strict=True):
        seen, words = look(image.numpy()), prompt.split()
        first = seen.objects[0] if seen.objects else None
        size = next((word for word in words if word in ("small", "large")), None)
        looks = (first is not None and first.shape == shape, first is not None and first.color == color)
        fits = len(seen.objects) == 1 and seen.background == words[-2] and looks[0]
        fits = fits and first is not None and (size is None or first.size == size)
        rows.append([all(looks), *looks, fits])
    return Judged(*torch.tensor(rows, dtype=torch.float32).T)


def character_of(seed: int) -> tuple[str, str]:
    """Shape and colour."""
    rng = np.random.default_rng(seed)
    return str(rng.choice(SHAPES)), str(rng.choice(COLORS))


def drawn(policy: Any, text: list[str], way: str, file: Path, seed: int) -> tuple[Tensor, float]:
    """Images and network calls an image."""
    steerers = []
    if way != "plain":
        values = {name: float(value) for name, value in (each.split(":") for each in way.split(","))}
        steerers = [Settings(str(file), times=(values.pop("from", 0.0), 1.0), **values)]
    asked = Prompts(text, torch.arange(len(text)), {})
    reward = as_reward(lambda images: [0.0] * len(images), "none")
    found, trace = steer_policy(policy, reward, asked, steerers, image_seeds(len(text), seed))
    return policy.decode(found.latents).float(), trace.calls


def main() -> None:
    """Draws, tunes, draws again, prints."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    flags.add_argument("--each", type=int, default=2, help="pictures a prompt and seed")
    flags.add_argument("--moves", type=int, default=10)
    flags.add_argument("--tune-steps", type=int, default=200)
    flags.add_argument("--learning-rate", type=float, default=3e-3)
    flags.add_argument("--ways", nargs="+", default=list(WAYS))
    flags.add_argument("--pictures-file", type=Path, help="where pictures of the first seed go, as a grid")
    options = flags.parse_args()
    model = load("scenes-sd")
    policy = deterministic(model, options.moves, microbatch=32)
    found: dict[str, list[Judged]] = {way: [] for way in options.ways}
    calls, sheet = dict[str, float](), list[Tensor]()
    for seed in options.seeds:
        (shape, color), started = character_of(seed), time.process_time()
        own = prompts(shape)
        closed = f"{'an' if color[0] in 'aeiou' else 'a'} {color} {shape} on a {BACKGROUNDS[0]} background"
        made = one_actor.cast(policy, [closed] + own[:1] * 10, seed)
        actor = one_actor.tune(
            model, made, shape, own[:1], steps=options.tune_steps, learning_rate=options.learning_rate, seed=seed
        )
        print(f"seed {seed}: a {color} {shape}, in {time.process_time() - started:.0f} CPU s", flush=True)
        rows = [torch.cat([policy.decode(made.latents[:1]).float(), torch.ones(11, 3, 64, 64)])]
        for way in options.ways:
            with tempfile.TemporaryDirectory() as folder:
                file = actor.save(Path(folder) / "actor.safetensors")
                images, calls[way] = drawn(policy, own * options.each, way, file, seed + 100)
            found[way].append(judge(images, own * options.each, shape, color))
            rows.append(images[:12])
        sheet += rows
    head("way", "calls", "same", "paired", "shape", "colour", "match", "paired", "same, each seed", "match, each seed")
    whole = {
        way: {name: torch.cat([getattr(part, name) for part in parts]) for name in ("same", "shape", "color", "match")}
        for way, parts in found.items()
    }
    base = whole[options.ways[0]]
    for way, values in whole.items():
        row(
            way, f"{calls[way]:.1f}", said(values["same"]), told(base["same"], values["same"]),
            f"{float(values['shape'].mean()):.3f}", f"{float(values['color'].mean()):.3f}",
            said(values["match"]), told(base["match"], values["match"]),
            *(", ".join(f"{float(getattr(part, name).mean()):.3f}" for part in found[way]) for name in EACH),
        )  # fmt: skip
    if options.pictures_file:
        tiles = torch.cat(sheet)
        pictures.save(pictures.grid(tiles, [""] * len(tiles), columns=12), options.pictures_file)


if __name__ == "__main__":
    main()
