"""Planar chain molecules, and a small mixed flow that learns them.

A molecule is a chain of seven atoms of kinds C, N, O and F in the plane, in units of a C-C bond. A bond is as long as
the radii of its two kinds together, and turns by up to 75 degrees from the one before; atoms that are not bound keep
apart. F has one bond, so it ends a chain; N and O are bound to C alone. ``valid`` is exactly that: the rule of kinds,
every bond within 0.06 (half of what two kinds differ by), no two other atoms nearer than 0.6.

The network is a transformer whose attention sees distances and places in the chain, and whose answer turns and mirrors
with the molecule. It is trained once a seed, with a time for each half, and kept in ``--out``.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, one_hot

from tropism.mixed import Mixed

ATOMS, KINDS = 7, "CNOF"
MASK = len(KINDS)
RADII = torch.tensor([0.5, 0.38, 0.26, 0.14])
CHARGES = torch.tensor([0.0, 1.0, -1.0, -0.5])
TURN, SLACK, APART = math.radians(75), 0.06, 0.6
CARBON, NITROGEN, FLUORINE = 0, 1, 3
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
