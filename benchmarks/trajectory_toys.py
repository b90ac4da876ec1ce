"""Students of a perfect teacher, and what noise in the teacher costs: CD, CTM and SCott on toys with exact answers.

``ring``: eight modes in the plane, whose denoiser is known. LCM (consistency distillation, CD here), CTM and SCott
learn from it by updates of 256 points; the sliced W2 (64 directions, 10,000 points) is to fresh data, at 1 to 16 steps.
Also, at 2 steps, the spread: the standard deviation about the nearest mode (0.05 in the data), and the share of the
emptiest mode times 8 (1 is even).
``line``: three modes on a line. The fixed point of a squared distance is f_0(x) = x, f_(n+1)(x) = E[f_n(y) | x], which
quadrature finds without training; W2 of f_N(noise) to the data, and its standard deviation.

    python benchmarks/trajectory_toys.py ring --seeds 3 --updates 1500
    python benchmarks/trajectory_toys.py line
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tropism.data.prompts import PromptSet, batches
from tropism.ema import Ema
from tropism.methods import ctm, lcm, scott
from tropism.models.ring import Ring
from tropism.models.toy import MixtureDenoiser
from tropism.policy import Policy
from tropism.samplers import DDIM, Jump
from tropism.schedules import EDM, karras_grid
from tropism.train import train

sys.path.insert(0, str(Path(__file__).parent))
from side_by_side import machine

POINTS, ROWS, STEPS = 10_000, 256, (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Variant:
    """A method with its settings, drawn with at each of ``gammas`` where it jumps."""

    settings: type[Any]
    options: dict[str, Any] = field(default_factory=dict)
    gammas: tuple[float, ...] = ()


VARIANTS = {
    "CD": Variant(lcm.Settings),
    "CTM": Variant(ctm.Settings, gammas=(0.0, 1.0)),
    "SCott, eta 0.1, h 1": Variant(scott.Settings, dict(eta=0.1, substeps=1)),
    "SCott, eta 0.1, h 3": Variant(scott.Settings, dict(eta=0.1, substeps=3)),
    "CD, skip 3": Variant(lcm.Settings, dict(skip=3)),
    "SCott, eta 0.5, h 3, adversarial": Variant(scott.Settings, dict(eta=0.5, substeps=3, adversarial_weight=0.4)),
    "CTM, denoiser not learnt": Variant(ctm.Settings, dict(denoiser_weight=0.0), gammas=(0.0, 1.0)),
}


def sliced_w2(one: Tensor, other: Tensor) -> float:
    """Between two sets of as many points (N, D), over 64 fixed directions."""
    directions = torch.randn(one.shape[1], 64, generator=torch.Generator().manual_seed(0))
    directions = directions / directions.norm(dim=0)
    gap = (one @ directions).sort(0).values - (other @ directions).sort(0).values
    return float(gap.square().mean().sqrt())


def described(ring: Ring, points: Tensor) -> str:
    """Standard deviation about the nearest mode, per dimension; share of the emptiest mode, 1 is even."""
    gaps, nearest = torch.cdist(points, ring.exact.means).min(1)
    share = torch.bincount(nearest, minlength=len(ring.exact.means)).min() / len(points)
    return f"{float((gaps.square().mean() / 2).sqrt()):9.3f}{float(share * len(ring.exact.means)):10.2f}"


def learned(variant: Variant, seed: int, updates: int, moves: int, rate: float) -> tuple[Ring, Policy]:
    """The student after so many updates, holding the average of its weights (0.998)."""
    ring = Ring(seed=seed)
    batch = dict(prompts_per_step=1, images_per_prompt=ROWS, minibatch=ROWS, sample_batch=ROWS, inference_steps=moves)
    settings = variant.settings(**batch, updates=moves, learning_rate=rate, **variant.options)
    settings.check()
    method = settings.build(ring, None, torch.Generator().manual_seed(seed))
    average = Ema(ring.parameters(), 0.998**moves)
    optimizer = torch.optim.AdamW(ring.parameters(), lr=rate, weight_decay=0.0)
    work = batches(PromptSet(["any"]), 1, ROWS, seed)
    hooks = [lambda step: average.update()]
    train(method, work, optimizer, steps=updates // moves, max_norm=1.0, hooks=hooks, rate=settings.rate)
    average._write(average._shadow)
    return ring, method.policy.with_(microbatch=POINTS)


def on_the_ring(options: argparse.Namespace) -> None:
    """Trains and prints, a line a method and seed."""
    exact = Ring()
    data = exact.sample(["any"] * POINTS, torch.Generator().manual_seed(1))
    fresh = exact.sample(["any"] * POINTS, torch.Generator().manual_seed(2))
    print(f"{'':<34} seed  " + "".join(f"{steps:>7}" for steps in STEPS) + "   spread  emptiest  (2 steps)  CPU s")
    print(f"{'data':<34}       {sliced_w2(fresh, data):7.3f}{'':28}{described(exact, fresh)}")
    for name, variant in VARIANTS.items():
        if options.only and options.only not in name:
            continue
        for seed in range(options.seeds):
            started = time.process_time()
            ring, policy = learned(variant, seed, options.updates, options.moves, options.rate)
            took = time.process_time() - started
            for gamma in variant.gammas or (None,):
                said = f"{name}, gamma {gamma:g}" if gamma is not None else name
                walked = policy if gamma is None else policy.with_(kernel=Jump(gamma))
                drawn = [
                    walked.with_(steps=steps).draw(["any"] * POINTS, torch.Generator().manual_seed(3))
                    for steps in STEPS
                ]
                found = "".join(f"{sliced_w2(points, data):7.3f}" for points in drawn)
                print(f"{said:<34} {seed:>4}  {found}{described(ring, drawn[1])}  {took:15.0f}", flush=True)


def levels(substeps: int) -> Tensor:
    """Rising times of EDM's 50 levels, every fifth, with ``substeps`` - 1 more between two, even as the levels are."""
    grid = karras_grid(50)[:-1].flip(0).double()
    coarse = grid[[*range(0, 49, 5), 49]]
    parts = [torch.linspace(low, high, substeps + 1)[:-1] for low, high in itertools.pairwise(coarse.tolist())]
    return torch.cat([*parts, coarse[-1:].float()]).clamp(max=1)


def fixed_point(eta: float, substeps: int) -> tuple[float, float]:
    """(W2 to the data, standard deviation) of what a squared distance leads a student to say in one step."""
    schedule, std = EDM(), 0.557
    means, scale = torch.tensor([[-0.7], [0.1], [0.6]], dtype=torch.float64), torch.full((3,), 0.1).double()
    shares = torch.tensor([0.35, 0.3, 0.35], dtype=torch.float64)
    exact, kernel = MixtureDenoiser(means, scale, shares, schedule), DDIM(eta)
    nodes, weights = np.polynomial.hermite_e.hermegauss(32)
    unit = torch.linspace(-6, 6, 2401, dtype=torch.float64)[:, None]  # x over the standard deviation of x_t
    times = levels(substeps)
    size = (schedule.level(times).double() ** 2 + std**2).sqrt().tolist()
    values = (unit * size[0]).flatten().numpy()
    for number, (s, t) in enumerate(itertools.pairwise(times)):
        rows = len(unit)
        law, _ = kernel(exact, unit * size[number + 1], t.expand(rows), s.expand(rows), {})
        mean, noise = law.mean.double().flatten().numpy(), float(law.std[0])
        next_states = (mean[:, None] + noise * nodes) / size[number]
        values = np.interp(next_states, unit.flatten().numpy(), values) @ weights / weights.sum()
    chances = (np.arange(20_000) + 0.5) / 20_000
    start = torch.special.ndtri(torch.from_numpy(chances)).numpy() * 80.0 / size[-1]
    answers = np.sort(np.interp(start, unit.flatten().numpy(), values))
    x = torch.linspace(-2, 2, 40_001, dtype=torch.float64)
    below = (torch.special.ndtr((x[:, None] - means.T) / scale) * shares).sum(1).numpy()
    data = np.interp(chances, below, x.numpy())
    return float(np.sqrt(((answers - data) ** 2).mean())), float(answers.std())


def on_the_line() -> None:
    """Prints, a line a number of sub-steps and noise."""
    print("h   eta     W2   standard deviation of the answers")
    for substeps, eta in itertools.product((1, 3), (0.0, 0.1, 0.2, 0.3, 0.6, 1.0)):
        print("{}   {:.1f}  {:.3f}   {:.3f}".format(substeps, eta, *fixed_point(eta, substeps)))


def main() -> None:
    """Trains, compares, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", choices=["ring", "line"])
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method")
    parser.add_argument("--updates", type=int, default=3000)
    parser.add_argument("--moves", type=int, default=24, help="of the teacher's chains")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--only", default="", help="methods whose name has this in it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    on_the_ring(options) if options.world == "ring" else on_the_line()
    print(f"{time.strftime('%Y-%m-%d')}, {machine()}")


if __name__ == "__main__":
    main()
