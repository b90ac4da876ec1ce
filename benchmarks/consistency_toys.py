"""Consistency training on mixtures with exact data: plain and improved, tuned from a denoiser, and with outliers.

``ring``: CT, iCT and ECT (of a denoiser of 3,000 updates) on eight modes in the plane, 4,000 updates of 256 points each
(ECT: 2,000). ``continuous``: sCM on the same ring, a quarter of its updates a denoiser's, beside iCT and LCM with
all of them, with times told in waves of at most 4 radians a unit and of 64. ``outliers``: iCT and sLCT, switch by
switch, on eight modes in eight dimensions of which 2 % of the coordinates are 12 times as large. Students are averages
of the weights (0.998) that answer in 1 and 2 steps; the sliced W2 (64 directions, 10,000 points) is to fresh data
without outliers, of all samples and of those within the box of these data; the tail is the share of samples outside it.

    python benchmarks/consistency_toys.py ring --seeds 3
    python benchmarks/consistency_toys.py continuous --seeds 3
    python benchmarks/consistency_toys.py outliers --seeds 3
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tropism.data.prompts import PromptSet, batches
from tropism.distillation import Before, Distillation, Noised
from tropism.distillation.curriculum import HIGHEST, Span
from tropism.ema import Ema
from tropism.losses.consistency import MeanSquare
from tropism.methods import ct, ect, ict, lcm, scm, slct
from tropism.models.ring import OUTLIER, STD, Ring
from tropism.policy import Policy
from tropism.randomness import row_generators, row_seeds
from tropism.samplers import Consistency, walk
from tropism.train import Step, train

sys.path.insert(0, str(Path(__file__).parent))
from side_by_side import machine

POINTS, ROWS, STEPS = 10_000, 256, (1, 2)
MEASURES = ("sliced W2", "sliced W2 within the box", "tail")
COLUMNS = [f"{name}, steps {steps}" for name in MEASURES for steps in STEPS] + ["largest gradient over the median one"]
BOX = 4 * STD  # beyond the furthest mode


@dataclass(frozen=True)
class Variant:
    """A method with its settings, after so many updates of a denoiser."""

    settings: type[Any]
    options: dict[str, Any] = field(default_factory=dict)
    share: float = 1.0  # of the updates
    denoiser: float = 0.0  # updates before, as a share
    fastest: float = 64.0  # radians a unit of the waves in which the student is told times


SCM: dict[str, Any] = dict(share=0.75, denoiser=0.25)
PICTURES: dict[str, Any] = dict(data="pictures", warmup=250, level_mean=-1.1, level_std=2.0)
TRAINED: dict[str, Any] = PICTURES | dict(direction="data")
OFF: dict[str, Any] = dict(last_pairs=160, transport=False, diffusion_weight=0.0)
CAUCHY: dict[str, Any] = OFF | dict(cauchy_scale=4.0)
VARIANTS: dict[str, dict[str, Variant]] = {
    "ring": {
        "CT": Variant(ct.Settings),
        "iCT": Variant(ict.Settings, dict(last_pairs=160)),
        "ECT": Variant(ect.Settings, dict(stages=6), share=0.5, denoiser=0.75),
    },
    "continuous": {
        "sCD": Variant(scm.Settings, PICTURES, **SCM, fastest=4.0),
        "sCT": Variant(scm.Settings, TRAINED, **SCM, fastest=4.0),
        "iCT": Variant(ict.Settings, dict(last_pairs=160), fastest=4.0),
        "LCM": Variant(lcm.Settings, dict(data="pictures", inference_steps=18), fastest=4.0),
        "sCD, fast times": Variant(scm.Settings, PICTURES, **SCM),
        "iCT, fast times": Variant(ict.Settings, dict(last_pairs=160)),
        "sCD, tangents as they are": Variant(scm.Settings, PICTURES | dict(tangent_c=math.inf), **SCM, fastest=4.0),
        "sCT, tangents as they are": Variant(scm.Settings, TRAINED | dict(tangent_c=math.inf), **SCM, fastest=4.0),
    },
    "outliers": {
        "iCT": Variant(slct.Settings, OFF | dict(cauchy=False)),
        "Cauchy": Variant(slct.Settings, CAUCHY),
        "Cauchy, c of the first levels": Variant(slct.Settings, CAUCHY | dict(adaptive_c=False)),
        "Cauchy, c 10 times as large": Variant(slct.Settings, CAUCHY | dict(cauchy_scale=40.0)),
        "Cauchy, transport": Variant(slct.Settings, CAUCHY | dict(transport=True)),
        "Cauchy, diffusion": Variant(slct.Settings, CAUCHY | dict(diffusion_weight=1.0)),
    },
}


def sliced_w2(one: Tensor, other: Tensor) -> float:
    """Between two sets of as many points (N, D), over 64 fixed directions."""
    directions = torch.randn(one.shape[1], 64, generator=torch.Generator().manual_seed(0))
    directions = directions / directions.norm(dim=0)
    gap = (one @ directions).sort(0).values - (other @ directions).sort(0).values
    return float(gap.square().mean().sqrt())


def denoising(ring: Ring, generator: torch.Generator) -> Distillation:
    """EDM's training of a denoiser (2206.00364, table 1), as pairs whose nearer state is the data."""
    span = Span(ring.schedule, 0.5)

    def times(rows: int, made: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        far = (1.2 * torch.randn(rows, generator=generator) - 1.2).exp().clamp(0.002, HIGHEST)
        t, s, _ = span.times(far.double(), torch.zeros(rows, dtype=torch.float64))
        return t, s, (far**2 + 0.25) / (far * 0.5) ** 2

    source = Noised(ring, ring.pictures, times, ROWS, 1, 1, generator)
    policy = Policy(ring.few_step("consistency", 2), Consistency(), 2)
    return Distillation(policy, Policy(Before(ring), Consistency(), 2), source, generator, MeanSquare())


def fit(ring: Ring, method: Distillation, settings: Any, updates: int, seed: int) -> tuple[Ema, list[float]]:
    """The average of the weights over ``updates``, and the norm of every gradient."""
    average, norms = Ema(ring.parameters(), 0.998), list[float]()

    def note(step: Step) -> None:
        average.update()
        norms.append(step.metrics["grad_norm"])

    optimizer = torch.optim.AdamW(ring.parameters(), lr=1e-3, weight_decay=0.0)
    work = batches(PromptSet(["any"]), 1, ROWS, seed)
    train(method, work, optimizer, steps=updates, max_norm=0.0, hooks=[note], rate=settings.rate)
    return average, norms


def run(world: str, variant: Variant, seed: int, updates: int) -> list[float]:
    """As ``COLUMNS``."""
    eight = dict(dimensions=8, outliers=0.02) if world == "outliers" else {}
    ring, made = Ring(seed=seed, fastest=variant.fastest, **eight), max(1, int(variant.share * updates))
    batch = dict(prompts_per_step=1, images_per_prompt=ROWS, minibatch=ROWS, updates=1, passes=1)
    common: dict[str, Any] = dict(data_std=0.5, drop=0.0, student_steps=2, total_updates=made)
    known = {each.name for each in dataclasses.fields(variant.settings)}
    common = {name: value for name, value in common.items() if name in known}
    settings = variant.settings(**(batch | common | variant.options))
    settings.check()
    generator = torch.Generator().manual_seed(seed)
    if variant.denoiser:
        before, _ = fit(ring, denoising(ring, generator), settings, int(variant.denoiser * updates), seed)
        with before.swapped():
            denoiser = {name: value.clone() for name, value in ring.net.state_dict().items()}
        ring.net.load_state_dict(denoiser)
    method = settings.build(ring, None, generator, pictures=ring.pictures)
    average, norms = fit(ring, method, settings, made, seed)
    with average.swapped():
        found = [judged(ring, method.policy.with_(steps=steps)) for steps in STEPS]
    return [value for values in zip(*found, strict=True) for value in values] + [max(norms) / statistics.median(norms)]


def judged(ring: Ring, policy: Policy) -> tuple[float, float, float]:
    """(sliced W2, sliced W2 within the box, share outside it); the level between two steps is 0.625."""
    generators = row_generators(row_seeds(POINTS, torch.Generator().manual_seed(1)))
    x, cond, times = (
        policy.noise(POINTS, generators),
        ring.encode(["any"] * POINTS),
        torch.linspace(1, 0, policy.steps + 1),
    )
    with torch.no_grad():
        *_, last = walk(policy.kernel, policy.denoiser, x, times, cond, generators)
    drawn, wanted = last.x_next, ring.sample(["any"] * POINTS, torch.Generator().manual_seed(2))
    inside = drawn[(drawn.abs() <= ring.exact.means.abs().max() + BOX).all(1)]
    return sliced_w2(drawn, wanted), sliced_w2(inside, wanted[: len(inside)]), 1 - len(inside) / POINTS


def floor(world: str) -> tuple[float, float]:
    """What fresh data get by the same measure, and the tail of the data that are learnt from."""
    ring = Ring(**(dict(dimensions=8, outliers=0.02) if world == "outliers" else {}))
    one, two = (ring.sample(["any"] * POINTS, torch.Generator().manual_seed(seed)) for seed in (1, 2))
    far = torch.rand(one.shape, generator=torch.Generator().manual_seed(3)) < ring.outliers
    outside = (torch.where(far, OUTLIER * one, one).abs() > ring.exact.means.abs().max() + BOX).any(1)
    return sliced_w2(one, two), float(outside.float().mean())


def main() -> None:
    """Trains, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", choices=VARIANTS)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant")
    parser.add_argument("--updates", type=int, default=4000)
    parser.add_argument("--only", nargs="*", help="variants to run; all unless given")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.process_time()
    least, tail = floor(options.world)
    facts = machine()
    print(f"{facts['date']}, {facts['processor']}, one of {facts['cores']} cores, torch {torch.__version__}")
    print(f"{options.world}: {options.updates} updates; fresh data: {least:.3f}, tail of the data {tail:.3f}")
    for name, variant in VARIANTS[options.world].items():
        if options.only and name not in options.only:
            continue
        runs = [run(options.world, variant, seed, options.updates) for seed in range(options.seeds)]
        print(name)
        for column, values in zip(COLUMNS, zip(*runs, strict=True), strict=True):
            print(f"    {column:<40} {'  '.join(f'{value:.3f}' for value in values)}", flush=True)
    print(f"{time.process_time() - started:.0f} CPU seconds")


if __name__ == "__main__":
    main()
