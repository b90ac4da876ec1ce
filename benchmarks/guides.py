"""Guidance by the gradient of the small CLIP on the shipped flow pipeline: what it raises, and what else it changes.

Held-out captions from the same noise in as many calls of the network. ``mean W`` moves x0 by itself (mu = W, MPGD's but
for the noise half), ``through W`` through the network as well (rho = W, DPS's but for the noise half; a pass back on
top of each call), both for t <= 0.9 and by at most 0.3 (root mean square) a move. ``recurrent`` makes the moves from
t <= 0.7 twice. The verifier is not what is climbed.

    python benchmarks/guides.py
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from guiding import captions, cells, draw, head, load, parser, row, scores
from torch import Tensor

from tropism import catalog, pictures
from tropism.base import Denoiser
from tropism.guidance import RewardGuided, window
from tropism.samplers import recurrent_walk

REWARDS = ("clip", "scenes_pass")


def variants(value: Any, names: list[str]) -> dict[str, dict[str, Any]]:
    """Arguments of ``draw`` by name: mean:W, through:W, recurrent:W."""
    found: dict[str, dict[str, Any]] = {"plain": {}}
    for name in names:
        kind, _, weight = name.partition(":")
        strength = window(float(weight), 0.0, 0.9)
        rho, mu = (strength, 0.0) if kind == "through" else (0.0, strength)

        def guide(inner: Denoiser, rho: Any = rho, mu: Any = mu) -> Denoiser:
            return RewardGuided(inner, value, rho, mu, limit=0.3)

        found[f"{kind} {weight}"] = {"guide": guide}
        if kind == "recurrent":
            found[f"{kind} {weight}"]["along"] = partial(recurrent_walk, times=2, high=0.7)
    return found


def main() -> None:
    """Draws, scores, prints."""
    flags = parser(__doc__, "scenes-held-out:96")
    flags.add_argument("--variants", nargs="+", default=["mean:4", "through:4", "mean:16"])
    flags.add_argument("--pictures", type=Path, help="a folder for the first 24 pictures of each")
    options = flags.parse_args()
    model, text = load(options.model), captions(options.captions)
    clip = catalog.build_reward(catalog.parse_reward("clip"), options.model, torch.device("cpu"))

    def value(x0: Tensor, rows: Tensor) -> Tensor:
        return clip(model.decode(x0), [text[place] for place in rows.tolist()])

    head("guide", "calls", "CPU s", "CLIP", "gain, paired", "verified", "gain, paired")
    base: dict[str, Tensor] = {}
    for name, arguments in variants(value, options.variants).items():
        drawn = draw(model, text, steps=options.steps, seed=options.seed, **arguments)
        found = {reward: scores(reward, drawn.images, text, options.model) for reward in REWARDS}
        base = base or found
        row(name, *cells(drawn, found, base))
        if options.pictures:
            pictures.save(pictures.grid(drawn.images[:24], [""] * 24, columns=12), options.pictures / f"{name}.png")


if __name__ == "__main__":
    main()
