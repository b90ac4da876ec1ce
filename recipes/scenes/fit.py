"""The training loop of the two pipelines: bf16 network over float32 weights, Muon for matrices, AdamW for the rest."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import Average, Log, cosine, load_state, minibatches, save_state
from safetensors.torch import load_file
from torch import Tensor, nn

LossOf = Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor]
"""loss(network, latents (N, 8, 8, 8) float32, token ids (N, L), generator) -> ()."""


def split_parameters(network: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices of the hidden layers, for Muon; everything else, for AdamW)."""
    hidden, rest = [], []
    for name, parameter in network.named_parameters():
        (hidden if parameter.ndim == 2 and "embed" not in name else rest).append(parameter)
    return hidden, rest


class Master:
    """float32 weights that are stepped, behind a bf16 network that is run."""

    def __init__(self, network: nn.Module) -> None:
        self.weights = network
        self.network = copy.deepcopy(network).to(torch.bfloat16).to(memory_format=torch.channels_last)
        self.pairs = list(zip(self.weights.parameters(), self.network.parameters(), strict=True))

    @torch.no_grad()
    def pull_gradients(self) -> None:
        for weight, parameter in self.pairs:
            weight.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None

    @torch.no_grad()
    def push_weights(self) -> None:
        for weight, parameter in self.pairs:
            parameter.copy_(weight)


class Stepper:
    """One optimizer step at a time, with its average and its saved state."""

    def __init__(self, network: nn.Module, lr: float, steps: int, decay: float = 0.999, warmup: int = 200) -> None:
        hidden, rest = split_parameters(network)
        muon = torch.optim.Muon(hidden, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        adam = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
        self.network, self.lr, self.steps, self.warmup = network, lr, steps, warmup
        self.optimizers: tuple[torch.optim.Optimizer, ...] = (muon, adam)
        self.average = Average(network, decay)
        self.state = ({"network": network}, {"network": self.average}, {"muon": muon, "adam": adam})

    def load(self, folder: Path) -> int:
        """The step to go on with."""
        return load_state(folder, *self.state)

    def save(self, folder: Path, step: int) -> None:
        save_state(folder, step, *self.state)

    def step(self, master: Master, step: int) -> float:
        """From the bf16 network's gradients to its next weights. Returns the gradient's norm."""
        master.pull_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.lr * cosine(step, self.steps, self.warmup)
            optimizer.step()
        master.push_weights()
        self.average.update(self.network, step)
        return float(norm)


def arguments(description: str | None, steps: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--latents", type=Path, required=True)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="torch.compile the network (a C++ compiler is needed)")
    parser.add_argument("--export", action="store_true", help="only write the pipeline of the saved state")
    parser.add_argument("--start", type=Path, help="folder whose averaged weights to start from; none: random ones")
    return parser.parse_args()


def begin(args: argparse.Namespace, network: nn.Module) -> Stepper:
    """The stepper of ``network``, which first gets the averaged weights of ``args.start``, if that is given."""
    if args.start:
        saved = Stepper(network, args.lr, args.steps)
        saved.load(args.start)
        saved.average.copy_to(network)
    return Stepper(network, args.lr, args.steps)


def fit(args: argparse.Namespace, stepper: Stepper, prepare: Callable[[nn.Module], None], loss: LossOf) -> None:
    """``prepare`` changes how the bf16 network runs, never what it computes. Goes on from what was saved."""
    first = stepper.load(args.out)
    data = load_file(args.latents)
    latents, ids, empty = data["latents"], data["ids"], data["empty"].long()
    master, log = Master(stepper.network), Log(args.out)
    prepare(master.network)
    module = torch.compile(master.network) if args.compile else master.network

    def of_rows(rows: Tensor, generator: torch.Generator) -> Tensor:
        tokens = ids[rows].long()
        tokens[torch.rand(len(rows), generator=generator) < 0.1] = empty  # for classifier-free guidance
        return loss(module, latents[rows].float(), tokens, generator)

    learn(args, stepper, master, log, first, len(latents), of_rows)


def learn(
    args: argparse.Namespace,
    stepper: Stepper,
    master: Master,
    log: Log,
    first: int,
    count: int,
    loss: Callable[[Tensor, torch.Generator], Tensor],
    said: int = 100,
    saved: int = 500,
) -> None:
    """Steps ``first`` to ``args.steps`` down the ``loss`` of rows (B,) of ``count``, each with a generator of its own;
    logs every ``said`` and saves every ``saved`` steps."""
    order = minibatches(count, args.batch, np.random.default_rng(args.seed))
    for _ in range(first):
        next(order)
    running = None
    for step in range(first, args.steps):
        rows, generator = torch.from_numpy(next(order)), torch.Generator().manual_seed(args.seed * 10**7 + step)
        value = loss(rows, generator)
        value.backward()
        norm = stepper.step(master, step)
        running = value.item() if running is None else 0.98 * running + 0.02 * value.item()
        if (step + 1) % said == 0:
            log(step=step + 1, loss=round(running, 5), norm=round(norm, 3))
        if (step + 1) % saved == 0 or step + 1 == args.steps:
            stepper.save(args.out, step + 1)
