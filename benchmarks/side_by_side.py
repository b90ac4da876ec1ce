"""What the side-by-side benchmarks share: workers that take turns, the machine, the floor, and how it is all printed.

Each side runs in a process of its own (its own environment, its own peak memory). A driver tells the workers in turn to
run one iteration while the others wait; the order is reversed from one round to the next.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from worker import pipeline_folder

ROOT = Path(__file__).resolve().parents[1]


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
