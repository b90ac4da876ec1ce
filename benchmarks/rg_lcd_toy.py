"""RG-LCD on the 2-D toy: what following a reward's gradient does beside following a proxy that was learnt of it.

The reward is minus the squared distance to a place beside the prompt's mode, plus a ripple of amplitude 0.3 and a
number of radians a unit (``--waves``) that says nothing of that place. Shown are, of 512 points of each student at 1
and 2 hops: the reward that was trained on; the same without the ripple, which nobody trained on (held out); the ripple
alone; and the mean over prompts of the sliced W2 distance to the guided teacher. ``lcm`` is plain LCM, of weight 0.

    python benchmarks/rg_lcd_toy.py --seeds 3
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from distillers import SIZES, Distiller, apart, drawn, taught
from methods import Off, fit, toy
from side_by_side import machine

from tropism.methods import rg_lcd
from tropism.models.toy import PROMPTS

AMPLITUDE = 0.3


@dataclass
class Rippled(Off):
    """``Off`` with a ripple of so many radians a unit."""

    waves: float
    name = "rippled"

    def __call__(self, samples: Tensor, prompts: Sequence[str], **columns: Any) -> Tensor:
        """samples (B, 2) -> (B,)."""
        return super().__call__(samples, prompts, **columns) + self.ripple(samples)

    def ripple(self, samples: Tensor) -> Tensor:
        """(B,) within +-AMPLITUDE."""
        return AMPLITUDE * (self.waves * samples).sin().mean(1)


def shown(images: Tensor, goal: Tensor, reward: Rippled) -> str:
    """Cells of the table."""
    text = list(PROMPTS) * (len(images) // len(PROMPTS))
    held_out, waves = float(Off()(images, text).mean()), float(reward.ripple(images).mean())
    return f"{held_out + waves:6.3f} | {held_out:6.3f} | {waves:6.3f} | {apart(images, goal):5.3f}"


def main() -> None:
    """Trains, compares, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--weights", type=float, nargs="+", default=[0.1, 0.3])
    parser.add_argument("--waves", type=float, default=40.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    goal, reward, started = taught(toy()), Rippled(options.waves), time.process_time()
    variants = [("lcm", "direct", 0.0)]
    variants += [(f"{kind} {weight:g}", kind, weight) for weight in options.weights for kind in ("direct", "proxy")]
    print(f"{datetime.date.today()}, {machine()['processor']}, one thread")
    print("| variant | seed | hops | reward | held out | ripple | W2 |\n|---|---|---|---|---|---|---|")
    print(f"| teacher | | 20 | {shown(goal, goal, reward)} |")
    for name, kind, weight in variants:
        for seed in range(options.seeds):
            settings = rg_lcd.Settings(**SIZES, variant=kind, reward_weight=weight)
            method = fit(Distiller(name, settings, 0.0), toy(), reward, options.steps, seed=seed)
            for hops in (1, 2):
                images = drawn(method.policy.with_(steps=hops))
                print(f"| {name} | {seed} | {hops} | {shown(images, goal, reward)} |", flush=True)
    print(f"{time.process_time() - started:.0f} CPU seconds")


if __name__ == "__main__":
    main()
