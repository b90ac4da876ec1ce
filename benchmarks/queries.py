"""How many reward queries two methods need for the same held-out reward, on the shipped pipeline.

``alignprop``: AlignProp against DDPO, reward: redness, of the pixels. ``diffexp``: DDPO with DiffExp's knobs against
DDPO, reward: the verifier, on pairs of objects.

A run is evaluated without exploration, at the pipeline's default guidance, every few batches, on held-out prompts from
noise that is the same in all runs. The goal is what the first method has reached at the end of its runs (the median
over seeds); a run needs as many queries as it had made at its first evaluation at or above the goal. Evaluation's own
queries are not counted.

    python benchmarks/queries.py alignprop --seeds 3 --threads 2
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tropism import catalog
from tropism.base import Reward
from tropism.data.prompts import PromptSet, batches
from tropism.models.latent_pipeline import LatentPipeline
from tropism.policy import Policy
from tropism.samplers import DDIM
from tropism.train import Step, train

sys.path.insert(0, str(Path(__file__).parent))
from goals import needed, told

EVALUATED = 64


@dataclass(frozen=True)
class Side:
    """A method, its settings, how many batches it gets and how often it is evaluated."""

    method: str
    steps: int
    every: int
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Sides with the same reward and prompts; the first is what the others are compared with."""

    reward: str
    prompts: str
    held_out: str
    sides: Mapping[str, Side]


POLICY = dict(inference_steps=8, noise_until=0.5, group_relative=True, learning_rate=1e-3, clip=1e-3)
EXPLORE = dict(explore_guidance=1.0, explore_until=0.5, explore_weights=(0.8, 1.2), explore_probability=0.5)
COMPARISONS = {
    "alignprop": Comparison(
        "redness",
        "scenes",
        f"scenes-held-out:{EVALUATED}",
        {"ddpo": Side("ddpo", 40, 8, POLICY), "alignprop": Side("alignprop", 24, 2, dict(inference_steps=8))},
    ),
    "diffexp": Comparison(
        "scenes",
        "scenes-pair",
        f"scenes-held-out-pair:{EVALUATED}",
        {"ddpo": Side("ddpo", 48, 4, POLICY), "diffexp": Side("ddpo", 48, 4, {**POLICY, **EXPLORE})},
    ),
}


def evaluate(model: LatentPipeline, reward: Reward, prompts: Sequence[str]) -> float:
    """Mean reward at the pipeline's own guidance and steps, from noise that is always the same."""
    policy = Policy(model, DDIM(0.0), model.steps)
    noise = torch.randn(len(prompts), *model.latent_shape, generator=torch.Generator().manual_seed(1))
    return float(reward(policy.images(prompts, torch.Generator().manual_seed(2), noise), prompts).mean())


def run(comparison: Comparison, side: Side, seed: int, precision: torch.dtype) -> list[tuple[int, float]]:
    """(queries so far, held-out reward), from (0, untrained)."""
    model = catalog.load_model("scenes-sd", precision, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    model.add_lora(16, generator=generator)
    reward = catalog.build_reward(catalog.parse_reward(comparison.reward), "scenes-sd", torch.device("cpu"))
    held_out = list(catalog.read_prompt_set(comparison.held_out).text)
    settings = catalog.method_settings(side.method)(**side.settings)
    settings.check()
    method = settings.build(model, reward, generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    prompts: PromptSet = catalog.read_prompt_set(comparison.prompts)
    work = batches(prompts, settings.prompts_per_step, settings.images_per_prompt, seed)
    curve = [(0, evaluate(model, reward, held_out))]

    def note(step: Step) -> None:
        if step.step % side.every == 0:
            curve.append((step.step * step.images, evaluate(model, reward, held_out)))

    train(method, work, optimizer, steps=side.steps, hooks=[note])
    return curve


def main() -> None:
    """Runs, compares, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", choices=COMPARISONS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--json", type=Path, help="where to write all curves")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    comparison = COMPARISONS[options.comparison]
    curves: dict[str, list[list[tuple[int, float]]]] = {name: [] for name in comparison.sides}
    for seed in range(options.seeds):
        for name, side in comparison.sides.items():
            began = time.perf_counter()
            curve = run(comparison, side, seed, getattr(torch, options.precision))
            curves[name].append(curve)
            points = " ".join(f"{queries}:{reward:.4g}" for queries, reward in curve)
            print(f"seed {seed} {name} ({time.perf_counter() - began:.0f} s): {points}", flush=True)
    base = next(iter(comparison.sides))
    goal = statistics.median(curve[-1][1] for curve in curves[base])
    print(f"\n{datetime.date.today()}, goal {goal:.4g} ({comparison.reward} on {comparison.held_out}); queries to it:")
    plain = statistics.median(needed(curve, goal) for curve in curves[base])
    for name, runs in curves.items():
        print(f"{name}: {told([needed(curve, goal) for curve in runs], plain, base)}")
    if options.json:
        options.json.write_text(json.dumps({"goal": goal, "curves": curves}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
