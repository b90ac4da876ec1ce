"""What the recipes of the shipped scenes weights share: pictures, a cosine schedule, EMA, resumable state."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tropism.worlds.scenes.grammar import KINDS, caption, sample_scene
from tropism.worlds.scenes.render import render_batch

SHARES = (0.34, 0.30, 0.36)  # pairs are the hardest, single objects must be the surest


def draw(
    rng: np.random.Generator, count: int, split: str = "train", kind: str | None = None
) -> tuple[np.ndarray, list[str]]:
    """``count`` pictures (N, 64, 64, 3) uint8 and their captions; singles, counts and pairs in fixed shares, or all of
    one ``kind``."""
    kinds = [KINDS[k] for k in rng.choice(len(KINDS), size=count, p=SHARES)] if kind is None else [kind] * count
    scenes = [sample_scene(rng, split, each) for each in kinds]
    seeds = rng.integers(0, 2**31, size=count).tolist()
    return render_batch(scenes, seeds), [caption(scene) for scene in scenes]


def to_tensor(pictures: np.ndarray) -> Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def cosine(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then half a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


class Average:
    """Exponential moving average of a module's parameters, with the usual short-memory start."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        names = list(self.values)
        parameters = dict(module.named_parameters())
        torch._foreach_lerp_([self.values[n] for n in names], [parameters[n] for n in names], 1.0 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters():
            parameter.copy_(self.values[name])


def _flatten(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for key, slots in state["state"].items():
        for slot, value in slots.items():
            (tensors if isinstance(value, Tensor) else scalars)[f"optimizer/{key}/{slot}"] = value
    return tensors, scalars


def save_state(
    folder: Path,
    step: int,
    modules: dict[str, nn.Module],
    averages: dict[str, Average],
    optimizers: dict[str, torch.optim.Optimizer],
) -> None:
    """Everything that the next step needs, written to a temporary name and renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        tensors |= {f"module/{name}/{key}": value for key, value in module.state_dict().items()}
    for name, average in averages.items():
        tensors |= {f"average/{name}/{key}": value for key, value in average.values.items()}
    for name, optimizer in optimizers.items():
        tensors |= {f"{name}/{key}": value for key, value in _flatten(optimizer.state_dict())[0].items()}
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "state.tmp", {"step": json.dumps(step)})
    os.replace(folder / "state.tmp", folder / "state.safetensors")


def load_state(
    folder: Path,
    modules: dict[str, nn.Module],
    averages: dict[str, Average],
    optimizers: dict[str, torch.optim.Optimizer],
) -> int:
    """The step to go on with; 0 where nothing was saved."""
    path = folder / "state.safetensors"
    if not path.exists():
        return 0
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        step = json.loads(file.metadata()["step"])
    tensors = load_file(path)
    for name, module in modules.items():
        prefix = f"module/{name}/"
        module.load_state_dict({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
    for name, average in averages.items():
        prefix = f"average/{name}/"
        average.values = {k[len(prefix) :]: v.clone() for k, v in tensors.items() if k.startswith(prefix)}
    for name, optimizer in optimizers.items():
        prefix = f"{name}/optimizer/"
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(prefix):
                index, slot = key[len(prefix) :].split("/")
                state.setdefault(int(index), {})[slot] = value.clone()
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return step


class Log:
    """One JSON line a call, to a file and to the terminal."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        self.start = time.time()

    def __call__(self, **values: Any) -> None:
        line = json.dumps({"seconds": round(time.time() - self.start, 1)} | values)
        print(line, flush=True)
        with self.path.open("a") as file:
            file.write(line + "\n")


def minibatches(count: int, size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Endless shuffled index slices of ``size``; a fresh permutation each pass."""
    while True:
        order = rng.permutation(count)
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]
