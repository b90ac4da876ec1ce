"""Any-to-any models on a ring of eight modes: flow matching, MeanFlow and shortcut models, at equal updates.

Each network begins from nothing and sees as many fresh points; the average of its weights (0.998) is drawn with. Flow
matching is MeanFlow's own code with r = t in every row, walked by Euler's method; the others jump. Compared is the
sliced W2 (64 directions, 10,000 points) to fresh data; the last row is what two sets of data are apart.

    python benchmarks/mean_flow_toys.py --seeds 3 --updates 4000
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tropism.base import Loss, Prompts
from tropism.data.prompts import PromptSet, batches
from tropism.ema import Ema
from tropism.methods import mean_flow, shortcut
from tropism.models.ring import Ring
from tropism.samplers import EulerODE
from tropism.schedules import RectifiedFlow
from tropism.train import train

sys.path.insert(0, str(Path(__file__).parent))
from side_by_side import machine

POINTS, MOVES = 10_000, (1, 2, 4, 32)
# Name, settings, what they change, and the kernel unless it is the model's own.
METHODS: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "flow matching": (mean_flow.Settings, dict(equal=1.0, power=0.0), EulerODE()),
    "MeanFlow": (mean_flow.Settings, {}, None),
    "shortcut": (shortcut.Settings, dict(longest=32), None),
}


class WithAverage:
    """A method that also moves an average of the weights."""

    def __init__(self, method: Any, average: Ema) -> None:
        self._method, self._average = method, average

    def experience(self, batch: Prompts) -> Iterator[Any]:
        """The method's."""
        updates: Iterator[Any] = self._method.experience(batch)
        return updates

    def loss(self, minibatch: Any) -> Loss:
        """The method's."""
        loss: Loss = self._method.loss(minibatch)
        return loss

    def after_step(self) -> None:
        """The method's, and the average's."""
        self._method.after_step()
        self._average.update()


def sliced_w2(one: Tensor, other: Tensor) -> float:
    """Between as many points (N, 2)."""
    directions = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    directions = directions / directions.norm(dim=0)
    gap = (one @ directions).sort(0).values - (other @ directions).sort(0).values
    return float(gap.square().mean().sqrt())


def run(name: str, seed: int, updates: int, rows: int, rate: float) -> tuple[list[float], float]:
    """The distances after 1, 2, 4 and 32 moves, and the seconds of one core that training took."""
    kind, changes, kernel = METHODS[name]
    ring, started = Ring(RectifiedFlow(), seed=seed), time.process_time()
    sizes = dict(prompts_per_step=1, images_per_prompt=rows, minibatch=rows, updates=1, passes=1, drop=0.0)
    settings = kind(**sizes, learning_rate=rate, max_grad_norm=0.0, **changes)
    settings.check()
    method = settings.build(ring, None, torch.Generator().manual_seed(seed), pictures=ring.pictures)
    average = Ema(ring.parameters(), 0.998)
    adam = torch.optim.AdamW(ring.parameters(), lr=rate, weight_decay=0.0)
    work = batches(PromptSet(["any"]), 1, rows, seed)
    train(WithAverage(method, average), work, adam, steps=updates, max_norm=0, rate=settings.rate)
    seconds = time.process_time() - started
    policy = method.policy.with_(microbatch=POINTS, kernel=kernel or method.policy.kernel)
    with average.swapped():
        noise, data = torch.randn(POINTS, 2, generator=torch.Generator().manual_seed(7)), fresh(99)
        return [sliced_w2(policy.with_(steps=k).images(["any"] * POINTS, x=noise), data) for k in MOVES], seconds


def fresh(seed: int) -> Tensor:
    """Points of the data."""
    return Ring(RectifiedFlow()).sample(["any"] * POINTS, torch.Generator().manual_seed(seed))


def main() -> None:
    """Trains, compares, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method")
    parser.add_argument("--updates", type=int, default=4000)
    parser.add_argument("--rows", type=int, default=256, help="points of an update")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts = machine()
    print(f"{facts['date']}, {facts['processor']}, one core, commit {facts['commit']}")
    print(f"{'':16}seed  {'  '.join(f'{k:>4} moves' for k in MOVES)}  seconds", flush=True)
    for seed in range(options.seeds):
        for name in options.methods:
            found, seconds = run(name, seed, options.updates, options.rows, options.learning_rate)
            print(f"{name:16}{seed:4}  {'  '.join(f'{each:10.3f}' for each in found)}  {seconds:7.0f}", flush=True)
    print(f"{'data':16}{'':4}  {sliced_w2(fresh(98), fresh(99)):10.3f}")


if __name__ == "__main__":
    main()
