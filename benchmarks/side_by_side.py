"""What the side-by-side benchmarks share: workers that take turns, the machine, the floor, and how it is all printed.

Each side runs in a process of its own (its own environment, its own peak memory). A driver tells the workers in turn to
run one iteration while the others wait; the order is reversed from one round to the next.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

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


def parser(description: str | None) -> argparse.ArgumentParser:
    """The flags that all benchmarks have."""
    flags = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flags.add_argument("--trl-python", default=sys.executable, help="the interpreter that has trl (README.md)")
    flags.add_argument("--pipeline", help="folder of a Stable Diffusion pipeline; none: the shipped one")
    flags.add_argument("--random-weights", action="store_true", help="the shipped architecture with random weights")
    flags.add_argument("--sides", nargs="+", default=["trl", "tropism"], choices=["trl", "tropism", "plain"])
    flags.add_argument("--pairs", type=int, default=5, help="timed rounds, after one that warms up")
    flags.add_argument("--threads", type=int, default=2)
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--steps", type=int, default=20, help="sampling steps")
    flags.add_argument("--guidance", type=float, default=3.0)
    flags.add_argument("--rank", type=int, default=4, help="of the LoRA; TRL has 4 and no flag")
    flags.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    flags.add_argument("--no-profile", action="store_true", help="only speed, memory and floor")
    flags.add_argument("--json", type=Path, help="where to write everything as JSON")
    flags.add_argument("--worker", help=argparse.SUPPRESS)
    return flags


# The driver.


class Worker:
    """A process that holds one side and does what it is told, one thing at a time."""

    def __init__(self, side: str, python: str, argv: Sequence[str], threads: int) -> None:
        self.side = side
        limits = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        environment = os.environ | limits | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        self._log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115, lives as long as the worker
        self._process = subprocess.Popen(
            [python, *argv, "--worker", side],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )
        self.facts = self._answer()

    def __call__(self, order: str) -> dict[str, Any]:
        stdin: IO[str] = self._process.stdin  # type: ignore[assignment]
        stdin.write(order + "\n")
        stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        stdout: IO[str] = self._process.stdout  # type: ignore[assignment]
        line = stdout.readline()
        if not line:
            self._log.seek(0)
            sys.exit(f"the worker {self.side} ended:\n{self._log.read()[-4000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        stdin: IO[str] = self._process.stdin  # type: ignore[assignment]
        stdin.close()
        self._process.wait()


def drive(args: argparse.Namespace, title: str) -> dict[str, Any]:
    """Runs all sides in turn, prints the tables, and returns the numbers."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.pipeline or pipeline_folder(args.random_weights, args.seed, Path(scratch))
        argv = [*sys.argv, "--pipeline", str(folder)]
        heading(args, title, folder)
        workers = [
            Worker(side, args.trl_python if side == "trl" else sys.executable, argv, args.threads)
            for side in args.sides
        ]
        found = measure(workers, args.pairs)
        found["floor"] = workers[-1]("floor")
        if not args.no_profile:
            for worker in workers:
                found["sides"][worker.side] |= worker("profile")
        for worker in workers:
            worker.close()
    found |= {"title": title, "args": {name: str(value) for name, value in vars(args).items()}, "machine": machine()}
    report(found, args)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found


def measure(workers: Sequence[Worker], pairs: int) -> dict[str, Any]:
    """One round to warm up, then ``pairs`` timed ones; the order is reversed every time."""
    turns: dict[str, list[dict[str, Any]]] = {worker.side: [] for worker in workers}
    for number in range(pairs + 1):
        for worker in workers if number % 2 else reversed(workers):
            turn = worker("iterate")
            print(
                f"  round {number}  {worker.side:8} {turn['seconds']:8.2f} s ({turn['cpu']:.2f} s of processor)",
                flush=True,
            )
            if number:
                turns[worker.side].append(turn)
    sides = {worker.side: worker.facts | worker("memory") | {"turns": turns[worker.side]} for worker in workers}
    return {"sides": sides}


def heading(args: argparse.Namespace, title: str, folder: Path | str) -> None:
    """What a reader needs to run it again."""
    facts = machine()
    weights = "random weights" if args.random_weights else str(folder)
    print(f"{title}\n")
    print(f"command   {' '.join([Path(sys.executable).name, *sys.argv])}")
    print(f"date      {facts['date']}, seed {args.seed}, commit {facts['commit']}")
    print(f"machine   {facts['processor']}, {facts['cores']} cores, {args.threads} threads, {args.precision}")
    print(
        f"load      {os.getloadavg()[0]:.2f} (of {facts['cores']}) before the start: above 0.2 the machine is not quiet"
    )
    print(f"pipeline  {weights}\n", flush=True)


def machine() -> dict[str, Any]:
    """Processor, cores, commit and date."""
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "commit": commit.stdout.strip() or "unknown",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def report(found: dict[str, Any], args: argparse.Namespace) -> None:
    """Speeds, ratios, memory, floor, phases and operators."""
    floor = found["floor"]
    print("\nside      images/s  (min to max)         s/iteration  of floor  peak MiB  start MiB   packages")
    for side, facts in found["sides"].items():
        speeds = [turn["images"] / turn["seconds"] for turn in facts["turns"]]
        median = statistics.median(speeds)
        share = floor["flops_per_image"] * median / floor["rate"]
        spread = f"({min(speeds):.3f} to {max(speeds):.3f})"
        seconds = statistics.median([turn["seconds"] for turn in facts["turns"]])
        versions = " ".join(f"{name} {version}" for name, version in facts["versions"].items())
        print(
            f"{side:8} {median:9.3f}  {spread:20} {seconds:11.2f} {share:9.0%} {facts['peak_mib']:9.0f}"
            f" {facts['start_mib']:10.0f}   {versions}"
        )
    print_ratios(found["sides"])
    print(
        f"\nfloor: {floor['flops_per_image'] / 1e9:.1f} GFLOP of network calls an image ({floor['of_what']})\n"
        f"       at {floor['rate'] / 1e9:.0f} GFLOP/s, the best matrix product measured here now, a float32 or bfloat16"
        f" one as the run: {floor['rate'] / floor['flops_per_image']:.3f} images/s\n       "
        + ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in floor["rates"].items())
    )
    if not args.no_profile:
        for side, facts in found["sides"].items():
            print_profile(side, facts)


def print_ratios(sides: dict[str, Any]) -> None:
    """Of every side to TRL: of each pair of turns of one round."""
    if "trl" not in sides:
        return
    base = sides["trl"]
    for side, facts in sides.items():
        if side == "trl":
            continue
        pairs = zip(base["turns"], facts["turns"], strict=True)
        rounds = list(pairs)
        ratios = [theirs["seconds"] / ours["seconds"] for theirs, ours in rounds]
        processor = statistics.median([theirs["cpu"] / ours["cpu"] for theirs, ours in rounds])
        memory = facts["peak_mib"] / base["peak_mib"]
        print(
            f"\n{side} / trl: images per second x {statistics.median(ratios):.2f} (median of {len(ratios)} pairs, "
            f"min {min(ratios):.2f}, max {max(ratios):.2f}); peak memory x {memory:.2f}\n"
            f"  (images per second of processor time x {processor:.2f}: nearly the same on a quiet machine)"
        )


def print_profile(side: str, facts: dict[str, Any]) -> None:
    """Phases, counts, and operators by their own time on the processor."""
    phases, counts = facts["phases"], facts["counts"]
    total = sum(phases.values())
    print(f"\n{side}: one more iteration, with clocks, took {total:.2f} s: ", end="")
    print(", ".join(f"{name} {seconds:.2f} ({seconds / total:.0%})" for name, seconds in phases.items()))
    print("  " + ", ".join(f"{name} {value:.0f}" for name, value in counts.items()))
    for name, seconds, share, calls in facts["operators"]:
        print(f"  {share:6.1%} {seconds:8.2f} s {calls:7d} x  {name}")


# The workers.


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
