"""TFG-Flow on planar chain molecules that are learnt as a mixed flow (``tropism.mixed``).

python benchmarks/mixed_molecules.py --out runs/molecules --seeds 0 1 2

A molecule is a chain of seven atoms of kinds C, N, O and F in the plane, in units of a C-C bond. A bond is as long as
the radii of its two kinds together, and turns by up to 75 degrees from the one before; atoms that are not bound keep
apart. F has one bond, so it ends a chain; N and O are bound to C alone. ``valid`` is exactly that: the rule of kinds,
every bond within 0.06 (half of what two kinds differ by), no two other atoms nearer than 0.6.

The network is a transformer whose attention sees distances and places in the chain, and whose answer turns and mirrors
with the molecule. It is trained once a seed, with a time for each half, and kept in ``--out``.

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
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, one_hot

from tropism.guidance import RewardGuided, window
from tropism.mixed import Mixed, draw
from tropism.randomness import row_generators, row_seeds

ATOMS, KINDS = 7, "CNOF"
MASK = len(KINDS)
RADII = torch.tensor([0.5, 0.38, 0.26, 0.14])
CHARGES = torch.tensor([0.0, 1.0, -1.0, -0.5])
TURN, SLACK, APART = math.radians(75), 0.06, 0.6
CARBON, NITROGEN, FLUORINE = 0, 1, 3
COLOURS = ["#374151", "#2563eb", "#dc2626", "#15803d"]
SHAPE = (ATOMS, 2, MASK)


def kinds(count: int, generator: torch.Generator) -> Tensor:
    """(count, ATOMS): from one end C, N or O in turn, N and O between C alone; an end that is C or O may be F."""
    said = torch.empty(count, ATOMS, dtype=torch.long)
    for place in range(ATOMS):
        drawn = torch.multinomial(torch.tensor([0.5, 0.25, 0.25]), count, True, generator=generator)
        said[:, place] = drawn if place == 0 else drawn.where(said[:, place - 1] == CARBON, CARBON)
    for end in (0, -1):
        to = torch.rand(count, generator=generator) < 0.3
        said[:, end] = said[:, end].where(~to | (said[:, end] == NITROGEN), FLUORINE)
    return said


def molecules(count: int, generator: torch.Generator) -> Mixed:
    """Valid ones: bonds as asked for to 0.01, turned anyhow, centred."""
    found: list[Mixed] = []
    while sum(len(each.x) for each in found) < count:
        said = kinds(count, generator)
        bonds = RADII[said[:, 1:]] + RADII[said[:, :-1]]
        bonds = bonds + 0.01 * torch.randn(bonds.shape, generator=generator).clamp(-3, 3)
        turns = (2 * torch.rand(bonds.shape, generator=generator) - 1) * TURN
        turns[:, 0] *= math.pi / TURN
        angle = turns.cumsum(1)
        steps = bonds[..., None] * torch.stack([angle.cos(), angle.sin()], -1)
        x = torch.cat([torch.zeros(count, 1, 2), steps.cumsum(1)], 1)
        fine = valid(x, said)
        found.append(Mixed((x - x.mean(1, keepdim=True))[fine], said[fine]))
    return Mixed(*(torch.cat(half)[:count] for half in zip(*found, strict=True)))


def valid(x: Tensor, said: Tensor) -> Tensor:
    """(B,) bool."""
    distance = torch.cdist(x, x)
    bonds = RADII[said[:, 1:]] + RADII[said[:, :-1]]
    right = ((distance.diagonal(1, 1, 2) - bonds).abs() < SLACK).all(1)
    far = (distance + 9 * torch.ones(ATOMS, ATOMS).tril(1) > APART).all(2).all(1)
    return right & far & allowed(said)


def allowed(said: Tensor) -> Tensor:
    """(B,) whether the kinds keep their rule."""
    carbon = said == CARBON
    return (carbon[:, 1:] | carbon[:, :-1]).all(1) & (said[:, 1:-1] != FLUORINE).all(1)


def nitrogens(x: Tensor, said: Tensor) -> Tensor:
    """(B,)."""
    return (said == NITROGEN).sum(1).float()


def gyration(x: Tensor, said: Tensor) -> Tensor:
    """(B,) radius, of equal masses."""
    return (x - x.mean(1, keepdim=True)).square().sum(2).mean(1).clamp(min=1e-12).sqrt()


def dipole(x: Tensor, said: Tensor) -> Tensor:
    """(B,) about the middle of the molecule."""
    return ((x - x.mean(1, keepdim=True)) * CHARGES[said][..., None]).sum(1).square().sum(1).clamp(min=1e-12).sqrt()


class Block(nn.Module):
    """Attention with a bias for every pair, and a layer of its own for every atom."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, h: Tensor, bias: Tensor) -> Tensor:
        """h (B, N, width), bias (B, heads, N, N)."""
        q, k, v = self.qkv(self.norm(h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5 + bias).softmax(-1) @ v
        h = h + self.out(mixed.transpose(1, 2).flatten(2))
        return h + self.down(gelu(self.up(self.norm2(h))))


class Transformer(nn.Module):
    """(x, symbols, t) -> velocity eps - x0 and logits."""

    def __init__(self, width: int = 64, layers: int = 4, heads: int = 4, pair: int = 32) -> None:
        super().__init__()
        self.symbol, self.place = nn.Embedding(MASK + 1, width), nn.Embedding(ATOMS, width)
        self.time = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))
        self.pair = nn.Sequential(nn.Linear(32 + 2 * ATOMS - 1 + 16, pair), nn.SiLU(), nn.Linear(pair, pair), nn.SiLU())
        self.bias = nn.Linear(pair, layers * heads)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.logits = nn.LayerNorm(width), nn.Linear(width, MASK)
        self.one, self.other, self.back = nn.Linear(width, pair), nn.Linear(width, pair), nn.Linear(pair, pair)
        self.pull = nn.Linear(pair, 1)
        place = torch.arange(ATOMS)
        self.register_buffer("offset", one_hot(place[:, None] - place + ATOMS - 1, 2 * ATOMS - 1).float(), False)

    def forward(self, x: Tensor, symbols: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        x = x - x.mean(1, keepdim=True)
        waves = t[:, None] * math.pi * torch.arange(1, 9)
        clock = torch.cat([waves.sin(), waves.cos()], 1)
        between = x[:, :, None] - x[:, None]
        distance = between.square().sum(-1, keepdim=True).clamp(min=1e-8).sqrt()
        near = (-((distance - torch.linspace(0, 3.1, 32)) ** 2) / 0.02).exp()
        rows = [near, self.offset.expand(len(x), -1, -1, -1), clock[:, None, None].expand(-1, ATOMS, ATOMS, -1)]
        pairs = self.pair(torch.cat(rows, -1))
        biases = self.bias(pairs).permute(0, 3, 1, 2).chunk(len(self.blocks), 1)
        h = self.symbol(symbols) + self.place.weight + self.time(clock)[:, None]
        for block, bias in zip(self.blocks, biases, strict=True):
            h = block(h, bias)
        h = self.norm(h)
        joined = gelu(self.one(h)[:, :, None] + self.other(h)[:, None] + self.back(pairs))
        velocity = (self.pull(joined) * between).sum(2)
        return velocity - velocity.mean(1, keepdim=True), self.logits(h)


def loss(net: nn.Module, data: Mixed, generator: torch.Generator) -> Tensor:
    """Squared error of the velocity, and cross-entropy where masked; each half has a time of its own, or the same."""
    rows = len(data.x)
    t = torch.rand(rows, generator=generator) ** 1.5  # bonds are decided late
    other = torch.rand(rows, generator=generator).where(torch.rand(rows, generator=generator) < 0.5, t)
    eps = torch.randn(data.x.shape, generator=generator)
    eps = eps - eps.mean(1, keepdim=True)
    hidden = torch.rand(data.symbols.shape, generator=generator) < other[:, None]
    symbols = data.symbols.where(~hidden, MASK)
    velocity, logits = net((1 - t)[:, None, None] * data.x + t[:, None, None] * eps, symbols, t)
    wrong = cross_entropy(logits.flatten(0, 1), data.symbols.flatten(), reduction="none").reshape(symbols.shape)
    return (velocity - eps + data.x).square().mean() + (wrong * hidden).sum() / hidden.sum().clamp(min=1)


def trained(seed: int, out: Path, steps: int, batch: int = 192) -> Transformer:
    """From ``out`` where it is kept."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Transformer()
    file = out / f"net-{steps}-{seed}.safetensors"
    if file.exists():
        net.load_state_dict(load_file(file), strict=False)
        return net.eval()
    generator, began = torch.Generator().manual_seed(seed), time.process_time()
    averaged = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.05)
    for step in range(steps):
        optimizer.zero_grad()
        found = loss(net, molecules(batch, generator), generator)
        found.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        for name, value in net.state_dict().items():
            averaged[name].lerp_(value, max(0.005, 1 / (step + 1)))
        if step % 500 == 0 or step == steps - 1:
            print(
                f"seed {seed} step {step} loss {found.item():.3f} CPU s {time.process_time() - began:.0f}", flush=True
            )
    net.load_state_dict(averaged)
    out.mkdir(parents=True, exist_ok=True)
    save_file(averaged, file)
    return net.eval()


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


def measured(task: Task, drawn: Mixed, weights: Tensor) -> dict[str, float]:
    """Of samples with ``weights`` (B,) that add up to 1."""
    found = {name: float(error @ weights) for name, error in task.errors(drawn).items()}
    return found | {"valid": float(valid(*drawn).float() @ weights)}


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
            row = {"task": name, "way": way, "seed": seed} | measured(task, pool, what)
            row |= {"TV": float((law_of(pool, what) - law).abs().sum() / 2)}
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
            row = {"task": name, "way": way, "seed": seed} | measured(task, drawn, same)
            row |= {"TV": float((law_of(drawn, same) - law).abs().sum() / 2), "calls": counted.rows / args.rows}
            found.append(row | {"values": value.rows / args.rows, "seconds": spent / args.rows})
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
