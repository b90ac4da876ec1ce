"""What evaluations, checkpoints, the report and the watch over a run's health cost, as a share of a default run.

A short run evaluates and saves every third step. Its steps are timed by themselves; what lies between them is the cost
of an evaluation with everything that follows it, to which the watch's share of a step is added. From both follows the
share in a run of the default length, with the default intervals.

    python benchmarks/overhead.py ddpo --threads 2
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
import time
from pathlib import Path

import torch

from tropism.cli import main as tropism
from tropism.config import TrainSettings
from tropism.health import Watched

STEPS, EVERY = 6, 3


def watch_seconds(images: torch.Tensor) -> float:
    """Of looking at one step's pictures."""
    watched = Watched(_Zero())
    watched(images, [""] * len(images))
    began = time.perf_counter()
    watched(images, [""] * len(images))
    return time.perf_counter() - began


class _Zero:
    name, differentiable = "zero", False

    def __call__(self, samples: torch.Tensor, prompts: object, **columns: object) -> torch.Tensor:
        return torch.zeros(len(samples))


def main() -> None:
    """Runs and reckons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", nargs="?", default="ddpo")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        words = ["train", options.method, "--out", str(out), "--threads", str(options.threads), "--steps", str(STEPS)]
        began = time.perf_counter()
        code = tropism([*words, "--eval-every", str(EVERY), "--save-every", str(EVERY)])
        assert code == 0, "the run failed"
        wall = time.perf_counter() - began
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    trained = [row for row in rows if "images_per_second" in row]
    images = trained[0]["images"]
    step = sum(images / row["images_per_second"] for row in trained) / len(trained)
    # Between the end of step 3 and that of step 6: three steps, one evaluation, one save.
    third, last = (next(row for row in rows if row["step"] == at) for at in (EVERY, STEPS))
    between = sum(images / row["images_per_second"] for row in trained if row["step"] > EVERY)
    event = last["seconds"] - third["seconds"] - between
    watch = watch_seconds(torch.rand(images, 3, 64, 64))
    usual = TrainSettings()
    evaluations, saves = 1 + usual.steps // usual.eval_every, usual.steps // usual.save_every
    cost, pure = max(evaluations, saves) * event, usual.steps * (step - watch)
    print(f"\n{datetime.date.today()}, {options.method}, {options.threads} threads, whole process {wall:.0f} s")
    looking = usual.steps * watch
    print(f"a step {step:.2f} s, of it the watch {watch:.4f} s; an evaluation with checkpoint and report {event:.2f} s")
    print(f"{usual.steps} steps, {evaluations} evaluations, {saves} saves: {pure:.0f} s and {cost + looking:.0f} s,")
    print(f"{(cost + looking) / (pure + cost + looking):.1%} of the run")


if __name__ == "__main__":
    main()
