"""TFG-Flow on planar chain molecules that are learnt as a mixed flow (``tropism.mixed``).

python benchmarks/mixed_molecules.py --out runs/molecules --seeds 0 1 2

Properties: the number of N (symbols alone), the radius of gyration (positions alone), both, and the dipole
|sum_i q_i x_i| of charges by kind (of both halves). Values are -(property - target)^2 / (2 width^2). Best of K is what
the pool of plain samples gives in expectation. What is reported:

error   mean distance of a property from its target, of all samples
valid   share of valid molecules
TV      total variation of the law of the number of N from that of p exp(value), which is the pool reweighted; beside it
        what samples as many from that law itself have, against as many as the pool is worth (its effective number)
calls   rows of the network a molecule, passes back counted as well; values a molecule; CPU seconds a molecule
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from molecules import ATOMS, KINDS, RADII, SHAPE, allowed, dipole, gyration, nitrogens, trained, valid
from torch import Tensor
from torch.nn.functional import one_hot

from tropism.guidance import RewardGuided, window
from tropism.mixed import Mixed, draw
from tropism.randomness import row_generators, row_seeds

COLOURS = ["#374151", "#2563eb", "#dc2626", "#15803d"]


@dataclass(frozen=True)
class Task:
    """Properties by name, each with a target and a width, and whether the value has a gradient."""

    wanted: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], float, float]]
    smooth: bool = True

    def value(self, x: Tensor, said: Tensor) -> Tensor:
        """(B,) nats."""
        each = [-((of(x, said) - target) ** 2) / (2 * width**2) for of, target, width in self.wanted.values()]
        return torch.stack(each).sum(0)

    def errors(self, drawn: Mixed) -> dict[str, Tensor]:
        """(B,) a property."""
        return {name: (of(*drawn) - target).abs() for name, (of, target, _) in self.wanted.items()}


NUMBER, RADIUS = (nitrogens, 3.0, 0.4), (gyration, 1.2, 0.1)
TASKS = {
    "number of N": Task({"N": NUMBER}, smooth=False),
    "radius": Task({"radius": RADIUS}),
    "both": Task({"N": NUMBER, "radius": RADIUS}),
    "dipole": Task({"dipole": (dipole, 4.0, 0.3)}),
}


@dataclass
class Counted:
    """The network or a value that counts its rows."""

    inner: Any
    back: bool = True  # whether a pass back counts
    rows: int = 0

    def __call__(self, *given: Tensor) -> Any:
        self.rows += len(given[0]) * (1 + (self.back and given[0].requires_grad))
        return self.inner(*given)


def sampled(net: Any, rows: int, seed: int, steps: int, chunk: int = 250, **how: Any) -> Mixed:
    """Rows with seeds of their own, so that chunks do not matter."""
    parts = [
        draw(net, len(some), SHAPE, steps, target="flow", generator=row_generators(some), **how)
        for some in row_seeds(rows, torch.Generator().manual_seed(seed)).split(chunk)
    ]
    return Mixed(*(torch.cat(half) for half in zip(*parts, strict=True)))


def ways(task: Task, count: int, rho: float, limit: float, below: float) -> dict[str, dict[str, Any]]:
    """Arguments of ``draw`` by name; a value of symbols alone has nothing that a guide could follow, and one of
    positions alone nothing for candidates."""
    guide = partial(RewardGuided, rho=window(rho, 0.0, below), limit=limit) if task.smooth else None
    both: dict[str, Any] = {"count": count, "guide": guide, "value": task.value}
    found = {"TFG-Flow": both, "joint": both | {"joint": True}}
    if task.smooth and task is not TASKS["radius"]:
        found = {"symbols only": both | {"guide": None}, "positions only": both | {"count": 1}} | found
    if "N" in task.wanted:
        ruled = {"count": 8 * count, "value": lambda x, said: task.value(x, said).where(allowed(said), math.nan)}
        found |= {f"{name}, {8 * count} by the rule": how | ruled for name, how in found.items() if how["count"] > 1}
    return found


def measured(task: Task, drawn: Mixed, weights: Tensor, law: Tensor) -> dict[str, float]:
    """Of samples with ``weights`` (B,) that add up to 1; ``law`` (ATOMS + 1,) is what their number of N should have."""
    found = {name: float(error @ weights) for name, error in task.errors(drawn).items()}
    apart = float((law_of(drawn, weights) - law).abs().sum() / 2)
    return found | {"valid": float(valid(*drawn).float() @ weights), "TV": apart}


def best_of(task: Task, pool: Mixed, count: int) -> Tensor:
    """(M,) how likely each of the pool is the best of ``count`` of it."""
    size, place = len(pool.x), torch.empty(len(pool.x), dtype=torch.float64)
    place[task.value(*pool).argsort(descending=True)] = torch.arange(size, dtype=torch.float64)
    left = size - 1 - place  # those that are worse
    log = torch.lgamma(left + 1) - torch.lgamma((left - count + 2).clamp(min=1))
    log = log.where(left >= count - 1, -math.inf)
    return log.softmax(0).float()


def law_of(drawn: Mixed, weights: Tensor) -> Tensor:
    """(ATOMS + 1,) of the number of N."""
    return torch.bincount(nitrogens(*drawn).long(), weights, minlength=ATOMS + 1)


def noise_of(law: Tensor, rows: int, worth: int) -> tuple[float, float]:
    """Mean and standard deviation of the total variation of ``rows`` draws from ``law`` against ``worth`` others."""
    generator = torch.Generator().manual_seed(0)

    def shares(many: int) -> Tensor:
        drawn = torch.multinomial(law.expand(400, -1), many, True, generator=generator)
        return one_hot(drawn, len(law)).float().mean(1)

    apart = (shares(rows) - shares(max(worth, 1))).abs().sum(1) / 2
    return float(apart.mean()), float(apart.std())


def seed_measured(seed: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the table."""
    net = trained(seed, args.out, args.train_steps)
    began = time.process_time()
    pool = sampled(net, args.pool, 1000 + seed, args.steps)
    second = (time.process_time() - began) / args.pool
    even, found = torch.full((args.pool,), 1 / args.pool), []
    for name in args.tasks:
        task = TASKS[name]
        weights = task.value(*pool).softmax(0)
        worth, law = int(1 / weights.square().sum()), law_of(pool, weights)
        calls = args.steps * (3 if task.smooth else 2)
        values = args.steps * (args.count + task.smooth)
        for way, what, k in (
            ("plain", even, 1),
            ("best, equal network calls", best_of(task, pool, calls // args.steps), calls // args.steps),
            ("best, equal values", best_of(task, pool, values), values),
            (f"law, worth {worth}", weights, 0),
        ):
            row = {"task": name, "way": way, "seed": seed} | measured(task, pool, what, law)
            found.append(row | {"calls": k * args.steps, "values": k, "seconds": k * second})
            show(found[-1])
        print(f"   TV of {args.rows} from the law itself: {noise_of(law, args.rows, worth)}", flush=True)
        for way, how in ways(task, args.count, args.rho, args.limit, args.below).items():
            if args.only and args.only not in way:
                continue
            counted, value = Counted(net), Counted(how["value"], back=False)
            began = time.process_time()
            how = how | {"value": lambda x0, said, rows, v=value: v(x0, said)}
            drawn = sampled(counted, args.rows, seed, args.steps, **how)
            spent, same = time.process_time() - began, torch.full((args.rows,), 1 / args.rows)
            row = {"task": name, "way": way, "seed": seed} | measured(task, drawn, same, law)
            costs = {"calls": counted.rows, "values": value.rows, "seconds": spent}
            found.append(row | {name: cost / args.rows for name, cost in costs.items()})
            show(found[-1])
    return found


def picture(file: Path, args: argparse.Namespace, columns: int = 9) -> None:
    """Molecules from the same noise, plain and guided towards "both"; crosses on those that are not valid."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    net, task = trained(args.seeds[0], args.out, args.train_steps), TASKS["both"]
    how = ways(task, args.count, args.rho, args.limit, args.below)["joint"]
    rows = {"plain": {}, "guided": how | {"value": lambda x0, said, rows: task.value(x0, said)}}
    figure, axes = plt.subplots(2, columns, figsize=(1.35 * columns, 3.3))
    for (label, given), line in zip(rows.items(), axes, strict=True):
        drawn = sampled(net, columns, args.seeds[0], args.steps, **given)
        drawn = Mixed(drawn.x - drawn.x.mean(1, keepdim=True), drawn.symbols)
        limits = (-2.8, 2.8)
        for x, said, fine, number, radius, axis in zip(
            *drawn, valid(*drawn).tolist(), nitrogens(*drawn).tolist(), gyration(*drawn).tolist(), line, strict=True
        ):
            axis.plot(*x.T, color="#6b7280", linewidth=2, zorder=1)
            for place, kind in zip(x.tolist(), said.tolist(), strict=True):
                size = 260 * float(RADII[kind]) + 45
                axis.scatter(*place, s=size, color=COLOURS[kind], zorder=2)
                axis.text(*place, KINDS[kind], ha="center", va="center_baseline", fontsize=6.5, color="white", zorder=3)
            axis.set(xlim=limits, ylim=limits, aspect="equal", xticks=[], yticks=[])
            axis.set_title(f"{int(number)} N, {radius:.2f}" + ("" if fine else " ×"), fontsize=9)
            for side in axis.spines.values():
                side.set_visible(False)
        line[0].set_ylabel(label, fontsize=11)
    figure.tight_layout(pad=0.4)
    figure.savefig(file, dpi=110)


def show(row: dict[str, Any]) -> None:
    """One line."""
    cells = [f"{key} {each:.3f}" if isinstance(each, float) else f"{key} {each}" for key, each in row.items()]
    print("  ".join(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder for networks and results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train-steps", type=int, default=3000)
    parser.add_argument("--pool", type=int, default=12000, help="plain samples")
    parser.add_argument("--rows", type=int, default=400, help="guided samples of each way")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--count", type=int, default=32, help="candidates")
    parser.add_argument("--rho", type=float, default=1.0)
    parser.add_argument("--limit", type=float, default=0.3, help="of a move, root mean square")
    parser.add_argument("--below", type=float, default=0.6, help="the time from which positions are guided")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--only", help="guided ways with this in their names")
    parser.add_argument("--picture", type=Path, help="draw molecules of the first seed there, and nothing else")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{datetime.date.today()}, {platform.processor() or platform.machine()}, {vars(args)}", flush=True)
    if args.picture:
        picture(args.picture, args)
    for seed in [] if args.picture else args.seeds:
        rows = seed_measured(seed, args)
        name = f"measured-{seed}{'-' if args.only else ''}{args.only or ''}.json"
        (args.out / name).write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
