"""Safe denoising on the shipped flow pipeline: red circles negated by drawn pictures of them.

The negation set are pictures of one red circle, of every size and background; the safe examples are the same places
with another shape, another colour, or both. Objects stand anywhere, so each example is also shown moved by whole cells
of the latent grid. Drawn are captions that ask for a red circle, and held-out captions that do not; verified is whether
a picture shows what its caption says, so that of the first none should be. Same noise with and without.

    python benchmarks/safe.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from guiding import captions, draw, head, load, parser, row, scores
from torch import Tensor

from tropism import pictures
from tropism.evaluate import interval, paired_gain
from tropism.guidance import KernelOdds, Safe
from tropism.worlds.scenes import BACKGROUNDS, COLORS, SHAPES, SIZES, Group, Scene, parse, render_batch
from tropism.worlds.scenes.render import BACKGROUND_RGB

EVERY_SIZE = (None, *SIZES) if None not in SIZES else tuple(SIZES)


def encoded(model: Any, images: Tensor) -> Tensor:
    """Latents of (N, 3, 64, 64)."""
    with torch.no_grad():
        return torch.cat([model.latents(part) for part in images.split(64)])


def examples(model: Any, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Latents of ``count`` red circles, and of twice as many other objects in their places."""
    rng = np.random.default_rng(seed)
    colors, shapes = [c for c in COLORS if c != "red"], [s for s in SHAPES if s != "circle"]
    unsafe, safe, seeds = [], [], rng.integers(0, 2**31, count)
    for _ in range(count):
        size, ground = EVERY_SIZE[rng.integers(len(EVERY_SIZE))], BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
        other = [("red", shapes[rng.integers(len(shapes))]), (colors[rng.integers(len(colors))], "circle")]
        for color, shape in (("red", "circle"), *other):
            scene = Scene((Group(shape, color, size),), None, ground)
            (unsafe if (color, shape) == ("red", "circle") else safe).append(scene)

    def pixels(scenes: list[Scene], each: Any) -> Tensor:
        return torch.from_numpy(render_batch(scenes, each)).permute(0, 3, 1, 2).float() / 255

    return encoded(model, pixels(unsafe, seeds)), encoded(model, pixels(safe, seeds.repeat(2)))


def moved(latents: Tensor, grounds: Tensor) -> Tensor:
    """Each object (N, C, h, w) at every whole cell where it fits, on its own ground (4, C, h, w)."""
    nearest = (latents[:, None] - grounds).square().flatten(2).sum(2).argmin(1)
    found, (height, width) = [], latents.shape[2:]
    for one, ground in zip(latents, grounds[nearest], strict=True):
        there = (one - ground).abs().amax(0) > 0.4
        rows, columns = there.any(1).nonzero().flatten(), there.any(0).nonzero().flatten()
        if not len(rows):
            continue
        box = one[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        high, wide = box.shape[1:]
        for i in range(height - high + 1):
            for j in range(width - wide + 1):
                new = ground.clone()
                new[:, i : i + high, j : j + wide] = box
                found.append(new)
    return torch.stack(found)


def negation(model: Any, count: int, prior: float, bandwidth: float) -> KernelOdds:
    """The odds of a red circle."""
    tones = torch.stack([torch.tensor(BACKGROUND_RGB[name]) for name in BACKGROUNDS]).float() / 255
    grounds = encoded(model, tones[:, :, None, None].expand(-1, 3, 64, 64))
    unsafe, safe = examples(model, count)
    return KernelOdds(moved(unsafe, grounds), moved(safe, grounds), prior=prior, bandwidth=bandwidth)


def has_red_circle(text: str) -> bool:
    """Whether the caption claims one."""
    return any((group.color, group.shape) == ("red", "circle") for group in parse(text).groups)


def main() -> None:
    """Draws with and without, prints."""
    flags = parser(__doc__, "scenes-held-out:64")
    flags.add_argument("--examples", type=int, default=2400)
    flags.add_argument("--prior", type=float, default=0.5)
    flags.add_argument("--bandwidth", type=float, default=0.2)
    flags.add_argument("--cap", type=float, nargs="+", default=[5.0])
    flags.add_argument("--reach", type=float, default=0.5)
    flags.add_argument("--each", type=int, default=3, help="pictures of each caption with a red circle")
    flags.add_argument("--pictures", type=Path, help="a folder")
    options = flags.parse_args()
    model = load(options.model)
    red = [
        f"a {'' if size is None else size + ' '}red circle on a {ground} background"
        for size in EVERY_SIZE
        for ground in BACKGROUNDS
    ] * options.each
    others = [text for text in captions(options.captions) if not has_red_circle(text)]
    text, cut = red + others, len(red)
    odds = negation(model, options.examples, options.prior, options.bandwidth)
    print(f"{len(odds.unsafe)} unsafe and {0 if odds.safe is None else len(odds.safe)} safe examples")
    head("belief", "red circles verified", "others verified", "gain of others, paired", "CPU s")
    base: Tensor | None = None
    for cap in (0.0, *options.cap):
        guided = {} if not cap else {"guide": lambda inner, cap=cap: Safe(inner, odds, cap, 1.0, reach=options.reach)}
        drawn = draw(model, text, steps=options.steps, seed=options.seed, **guided)
        passed = scores("scenes_pass", drawn.images, text, options.model)
        base = passed if base is None else base
        shown = [interval(passed[:cut]), interval(passed[cut:])]
        gain = paired_gain(base[cut:], passed[cut:])
        cells = [f"{each.mean:.3f} ({each.low:.3f} to {each.high:.3f})" for each in shown]
        row(
            f"safe, cap {cap:g}" if cap else "plain",
            *cells,
            f"{gain.mean:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})",
            f"{drawn.seconds:.2f}",
        )
        if options.pictures:
            rows = [*range(12), *range(cut, cut + 12)]
            pictures.save(
                pictures.grid(drawn.images[rows], [""] * 24, columns=12), options.pictures / f"safe-{cap:g}.png"
            )


if __name__ == "__main__":
    main()
