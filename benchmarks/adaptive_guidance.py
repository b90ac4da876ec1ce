"""Adaptive guidance on the shipped pipelines: calls of the network saved, and whether the pictures stay the same.

Held-out captions from the same noise, the pipeline's own guidance, no chance in the walk. Calls are rows of the
network an image. SSIM is against full guidance in as many moves. ``linear`` asks for the half without prompt
at these moves alone (every second of the first half is the paper's policy); its coefficients are fitted on chains of
training captions, with another seed. ``full K`` is full guidance in K moves, for the same calls.

    python benchmarks/adaptive_guidance.py --model scenes-flow
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from guiding import Drawn, captions, cells, draw, head, load, parser, row, scores, ssim

from tropism.adaptive import Walk, adaptive, remembered
from tropism.evaluate import interval
from tropism.guidance import Guided
from tropism.guidance.adaptive import Linear, fit_linear
from tropism.randomness import normal, row_generators, row_seeds
from tropism.samplers import solver


def memories(model: object, count: int, steps: int, batch: int = 32) -> list:
    """Of fully guided chains of training captions."""
    text = captions(f"scenes:{count}")
    denoiser, seeds = (
        Guided(model.denoiser, model.null(), model.guidance_scale),
        row_seeds(count, torch.Generator().manual_seed(99)),
    )
    found = []
    with torch.no_grad():
        for rows in torch.arange(count).split(batch):
            each = row_generators(seeds[rows])
            x = normal((len(rows), *model.latent_shape), each, torch.device("cpu"))
            cond = model.encode([text[place] for place in rows])
            found.append(remembered(solver(denoiser), denoiser, x, model.grid(steps), cond, each))
    return found


def main() -> None:
    """Fits, draws, compares, prints."""
    flags = parser(__doc__)
    flags.add_argument("--thresholds", type=float, nargs="+", default=[0.99, 0.98])
    flags.add_argument("--asked", nargs="+", default=["0,1,2,4", "0,2,4,6,8"], help="moves at which linear asks")
    flags.add_argument("--both", type=float, nargs="*", default=[], help="thresholds of the first linear with AG")
    flags.add_argument("--fewer", type=int, nargs="*", default=[])
    flags.add_argument("--chains", type=int, default=96)
    flags.add_argument("--save", type=Path, help="a folder for the coefficients")
    options = flags.parse_args()
    model, text, steps = load(options.model), captions(options.captions), options.steps
    chains = memories(model, options.chains, steps)
    ts = model.grid(steps)
    fitted: dict[str, Linear] = {}
    for name in options.asked:
        moves = {int(move) for move in name.split(",")}
        fitted[name] = fit_linear(chains, ts, model.guidance_scale, [move in moves for move in range(steps)])
    for name, each in fitted.items():
        errors = ", ".join("-" if error is None else f"{error:.4f}" for error in each.error)
        print(f"linear {name}: relative error of the fit {errors}")
        if options.save:
            each.save(options.save / f"{options.model}-{name.replace(',', '-')}.json")
    first_linear = next(iter(fitted.values()))
    variants: list[tuple[str, Walk | None, int]] = [("full", None, steps)]
    variants += [(f"AG {value:g}", adaptive(value), steps) for value in options.thresholds]
    variants += [(f"linear {name}", adaptive(linear=each), steps) for name, each in fitted.items()]
    variants += [(f"linear {options.asked[0]}, AG {v:g}", adaptive(v, first_linear), steps) for v in options.both]
    variants += [(f"full {count}", None, count) for count in options.fewer]
    head("guidance", "calls", "saved", "CPU s", "verified", "gain, paired", "SSIM", "SSIM, 5th percentile")
    first: Drawn | None = None
    for name, along, count in variants:
        drawn = draw(model, text, steps=count, seed=options.seed, **({} if along is None else {"along": along}))
        passed = {"verified": scores("scenes_pass", drawn.images, text)}
        if first is None:
            first, base = drawn, passed
        alike = ssim(drawn.images, first.images)
        calls, seconds, *rest = cells(drawn, passed, base)
        own, tail = interval(alike), float(alike.quantile(0.05))
        row(name, calls, f"{1 - drawn.calls / first.calls:.0%}", seconds, *rest, f"{own.mean:.4f}", f"{tail:.4f}")


if __name__ == "__main__":
    main()
