"""One character in many scenes: OneActor against plain sampling, on prompts that leave shape and colour open.

The word of the prompts means nothing to the pipeline, which then draws this and that. For each seed eleven pictures of
one prompt are drawn; one of them with a shape and a colour that the verifier can name is the target (by chance among
those that are not the commonest), a projector is tuned on it, and pictures of all prompts (sizes and backgrounds) are
drawn from the same noises with and without the offset. ``same`` is the share with the target's shape and colour;
``match`` the share with what the prompt does say: one object, its size, the background.

    python benchmarks/one_actor.py --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from editing import said, told
from guiding import head, load, row
from torch import Tensor

from tropism import one_actor, pictures
from tropism.base import Prompts
from tropism.evaluate import deterministic
from tropism.rewards import as_reward
from tropism.steering import image_seeds, steer_policy
from tropism.steering.one_actor import Settings
from tropism.worlds.scenes import BACKGROUNDS
from tropism.worlds.scenes.verify import look

WORD = "x"
EACH = ("same", "match")
WAYS = ("plain", "likeness:0.8", "likeness:1", "likeness:0.8,exclude:0.5", "likeness:0.4")


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
        fits = len(seen.objects) == 1 and seen.background == words[-2]
        fits = fits and first is not None and (size is None or first.size == size)
        looks = (first is not None and first.shape == shape, first is not None and first.color == color)
        rows.append([all(looks), *looks, fits])
    return Judged(*torch.tensor(rows, dtype=torch.float32).T)


def target_of(images: Tensor, seed: int) -> tuple[int, str, str]:
    """Which picture, and its shape and colour; by chance among those whose looks are not the commonest."""
    seen = [look(image.numpy()).objects for image in images]
    known = {
        place: (each[0].shape, each[0].color)
        for place, each in enumerate(seen)
        if len(each) == 1 and each[0].shape and each[0].color
    }
    if not known:
        raise ValueError("no picture has one object of a known shape and colour; draw more, or take another seed")
    ((usual, _),) = Counter(known.values()).most_common(1)
    rare = [place for place, looks in known.items() if looks != usual] or list(known)
    place = rare[int(torch.randint(len(rare), (), generator=torch.Generator().manual_seed(seed)))]
    return place, *known[place]


def drawn(policy: Any, text: list[str], way: str, file: Path, seed: int) -> tuple[Tensor, float]:
    """Images and network calls an image."""
    steerers = []
    if way != "plain":
        values = {name: float(value) for name, value in (each.split(":") for each in way.split(","))}
        steerers = [Settings(str(file), **values)]
    asked = Prompts(text, torch.arange(len(text)), {})
    reward = as_reward(lambda images: [0.0] * len(images), "none")
    found, trace = steer_policy(policy, reward, asked, steerers, image_seeds(len(text), seed))
    return policy.decode(found.latents).float(), trace.calls


def main() -> None:
    """Draws, tunes, draws again, prints."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    flags.add_argument("--word", default=WORD)
    flags.add_argument("--each", type=int, default=2, help="pictures a prompt and seed")
    flags.add_argument("--moves", type=int, default=10)
    flags.add_argument("--tune-steps", type=int, default=200)
    flags.add_argument("--learning-rate", type=float, default=1e-3)
    flags.add_argument("--ways", nargs="+", default=list(WAYS))
    flags.add_argument("--pictures-file", type=Path, help="where pictures of the first seed go, as a grid")
    options = flags.parse_args()
    model, own = load("scenes-sd"), prompts(options.word)
    policy, text = deterministic(model, options.moves, microbatch=32), own * options.each
    found: dict[str, list[Judged]] = {way: [] for way in options.ways}
    calls, seconds, sheet = dict[str, float](), list[float](), list[Tensor]()
    for seed in options.seeds:
        started = time.process_time()
        made = one_actor.cast(policy, own[0], 11, seed)
        target, shape, color = target_of(policy.decode(made.latents).float(), seed)
        actor = one_actor.tune(
            model, made, options.word, own, target=target, steps=options.tune_steps, seed=seed,
            learning_rate=options.learning_rate,
        )  # fmt: skip
        seconds.append(time.process_time() - started)
        print(f"seed {seed}: the target is a {color} {shape}; drawn and tuned in {seconds[-1]:.0f} CPU s", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            file = actor.save(Path(folder) / "actor.safetensors")
            for way in options.ways:
                images, calls[way] = drawn(policy, text, way, file, seed + 100)
                found[way].append(judge(images, text, shape, color))
                if not sheet or seed == options.seeds[0]:
                    sheet += [images[:12]] if sheet else [policy.decode(made.latents[target : target + 1]), images[:12]]
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
        blank = torch.ones(11, *sheet[0].shape[1:])
        tiles = torch.cat([sheet[0], blank, *sheet[1:]])
        pictures.save(pictures.grid(tiles, [""] * len(tiles), columns=12), options.pictures_file)


if __name__ == "__main__":
    main()
