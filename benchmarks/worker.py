"""What runs inside a side of a benchmark: orders and clocks, what both sides draw and score, and the floor."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parents[1]

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "trl")
WORDS = ("red", "blue", "green", "yellow", "purple", "orange", "white", "black")


class Side(Protocol):
    """One of the things that are compared, ready to run."""

    def iterate(self) -> int:
        """One iteration; returns how many images it was about."""
        ...

    def phases(self) -> contextlib.AbstractContextManager[Counter[str]]:
        """Inside, iterations add seconds to phases and counts of what was done; slower than the plain thing."""
        ...


def serve(side: Side, floor: Callable[[], dict[str, Any]]) -> None:
    """Answers orders from standard input, a line of JSON each; whatever else is printed goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    start = resident_mib()
    say({"start_mib": start, "versions": versions()})
    for line in sys.stdin:
        order = line.strip()
        if order == "iterate":
            began, cpu = time.perf_counter(), time.process_time()
            images = side.iterate()
            seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
            say({"seconds": seconds, "cpu": cpu, "images": images})
        elif order == "memory":
            say({"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024})
        elif order == "floor":
            say(floor())
        elif order == "profile":
            say(profiled(side))


def versions() -> dict[str, str]:
    """Of the packages that matter here, where installed."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def resident_mib() -> float:
    """What is in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def profiled(side: Side) -> dict[str, Any]:
    """One iteration with clocks around its phases, one under torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    began = time.perf_counter()
    with side.phases() as found:
        side.iterate()
    total = time.perf_counter() - began
    phases = {name.removesuffix(" s"): value for name, value in found.items() if name.endswith(" s")}
    phases["other"] = total - sum(phases.values())
    counts = {name: value for name, value in found.items() if not name.endswith(" s")}
    with profile(activities=[ProfilerActivity.CPU]) as record:
        side.iterate()
    table = record.key_averages()
    whole = sum(row.self_cpu_time_total for row in table) / 1e6
    rows = sorted(table, key=lambda row: row.self_cpu_time_total, reverse=True)[:10]
    operators = [
        (row.key, row.self_cpu_time_total / 1e6, row.self_cpu_time_total / 1e6 / whole, row.count) for row in rows
    ]
    return {"phases": phases, "counts": counts, "operators": operators}


@contextlib.contextmanager
def clocked(found: Counter[str], places: Sequence[tuple[Any, str, str]]) -> Iterator[Counter[str]]:
    """Inside, ``(holder, attribute, phase)`` are functions that add their own seconds to ``found["<phase> s"]``.

    What runs inside another clocked function counts for the inner one only.
    """
    running: list[float] = []

    def clock(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            running.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.perf_counter() - began
                found[f"{name} s"] += spent - running.pop()
                if running:
                    running[-1] += spent

        return timed

    with contextlib.ExitStack() as stack:
        for holder, attribute, name in places:
            own = attribute in vars(holder)
            before = getattr(holder, attribute)
            setattr(holder, attribute, clock(before, name))
            stack.callback(setattr, holder, attribute, before) if own else stack.callback(delattr, holder, attribute)
        yield found


# What both sides draw, score and train.


def pipeline_folder(random_weights: bool, seed: int, scratch: Path) -> Path:
    """The shipped pipeline, or one of its architecture with random weights, written to ``scratch``."""
    shipped = ROOT / "tropism" / "worlds" / "scenes" / "weights" / "sd"
    if not random_weights:
        if not (shipped / "model_index.json").is_file():
            sys.exit(f"there is no pipeline in {shipped}; give --pipeline FOLDER, or --random-weights")
        return shipped
    script = ROOT / "benchmarks" / "random_pipeline.py"
    command = [sys.executable, str(script), str(scratch), str(seed)]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    return scratch


def prompts(count: int) -> list[str]:
    """``count`` captions; eight different ones, repeated."""
    return [f"a {WORDS[index % len(WORDS)]} circle" for index in range(count)]


def redness(images: Any) -> Any:
    """Mean of the red channel less the mean of the others: costs nothing, and has a gradient. (B, 3, H, W) -> (B,)."""
    images = images.float()  # TRL in bf16 hands over bf16 pictures, whose rewards it then cannot take
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def trl_reward(images: Any, texts: Any, metadata: Any) -> tuple[Any, dict[str, Any]]:
    """``redness`` as TRL wants it."""
    return redness(images), {}


class TurningPrompts:
    """TRL's prompt function: the captions in their order, again and again."""

    def __init__(self, count: int) -> None:
        self._prompts, self._next = prompts(count), 0

    def __call__(self) -> tuple[str, dict[str, Any]]:
        self._next += 1
        return self._prompts[(self._next - 1) % len(self._prompts)], {}


def load_model(args: argparse.Namespace, plain: bool) -> Any:
    """tropism's model with its LoRA, in the precision of the run."""
    import torch

    from tropism.models.pipelines import load_pipeline

    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    model = load_pipeline(args.pipeline, dtype, guidance_scale=args.guidance, steps=args.steps, onednn=not plain)
    model.add_lora(args.rank, generator=torch.Generator().manual_seed(args.seed))
    return model


def optimizer_of(parameters: Any, lr: float) -> Any:
    """AdamW as TRL makes it."""
    import torch

    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.999), weight_decay=1e-4, eps=1e-8)


def count_calls(module: Any, found: Counter[str]) -> Any:
    """A hook on a denoising network that counts its rows, with and without a graph."""
    import torch

    def count(_: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        x = arguments[0] if arguments else keywords["sample"]
        found["rows with a graph" if torch.is_grad_enabled() else "rows without"] += len(x)

    return module.register_forward_pre_hook(count, with_kwargs=True)


def count_updates(optimizer: Any, found: Counter[str]) -> Any:
    """A hook on an optimizer that counts its steps."""

    def count(*_: Any) -> None:
        found["optimizer steps"] += 1

    return optimizer.register_step_post_hook(count)


# The floor.


def rates(precision: str) -> dict[str, float]:
    """FLOP/s of matrix products, the best of several sizes and repetitions: torch's own, and oneDNN's."""
    import torch
    from torch.nn import functional as F

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    ways: dict[str, Callable[[Any, Any], Any]] = {"torch linear": F.linear}
    if precision == "fp32" and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        ways["oneDNN linear"] = lambda x, w: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    best = dict.fromkeys(ways, 0.0)
    for size in (512, 1024, 2048):
        x, w = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
        for name, way in ways.items():
            for _ in range(10):
                began = time.perf_counter()
                way(x, w)
                best[name] = max(best[name], 2 * size**3 / (time.perf_counter() - began))
    return best


def network_flops(args: argparse.Namespace) -> dict[str, float]:
    """FLOPs of one row: the network forward, forward and backward; the decoder likewise. By torch's own counter.

    Of a fresh model that recomputes nothing; its linear layers are torch's, which the counter knows.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    model = load_model(args, plain=True)
    x = torch.randn(2, *model.latent_shape)
    latents = x.clone().requires_grad_()
    tau, cond = torch.tensor([500, 500]), model.encode(["a red circle", "a blue circle"])

    def count(run: Callable[[], Any], backward: bool) -> float:
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
            answer = run()
            if backward:
                answer.sum().backward()
        return counter.get_total_flops() / 2

    return {
        "forward": count(lambda: model.net(x, tau, cond), False),
        "training": count(lambda: model.net(x, tau, cond), True),
        "through": count(lambda: model.net(latents, tau, cond), True),
        "decode": count(lambda: model.decode(x), False),
        "decode training": count(lambda: model.decode(latents), True),
    }
