"""What a run says while it goes, and when it stops: lines of JSON, a progress bar or lines, trackers, reasons."""

from __future__ import annotations

import errno
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from tropism.config import BadInput, one_line

if TYPE_CHECKING:
    from accelerate import Accelerator

# Names that Accelerate knows, with the packages that they need.
TRACKERS = {name: [name] for name in ("wandb", "trackio", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab")}
TRACKERS["tensorboard"] = ["tensorboard", "tensorboardX"]


def check_trackers(report_to: str) -> list[str]:
    """The trackers named, separated by commas. Raises BadInput for an unknown name or a package that is missing."""
    names = [name.strip() for name in report_to.split(",") if name.strip() not in ("", "none")]
    for name in names:
        if name not in TRACKERS:
            raise BadInput(f"report_to is {name}; wanted none, or one of {', '.join(sorted(TRACKERS))}")
        if not any(importlib.util.find_spec(package) for package in TRACKERS[name]):
            package = TRACKERS[name][0].replace("_", "-")
            raise BadInput(f"report_to is {name}, which is not installed; install it with: pip install {package}")
    return names


def start_trackers(accelerator: Accelerator, config: Mapping[str, Any]) -> None:
    """Tells every tracker the settings, in types that all of them take."""
    plain = {name: v if isinstance(v, int | float | str) else str(v) for name, v in config.items() if v is not None}
    accelerator.init_trackers("tropism", config=plain)


class Lines:
    """A file of JSON objects, one a line, whole lines only: what could not be written to the end is taken back."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def append(self, row: Mapping[str, Any]) -> None:
        """NaN and infinities, which JSON lacks, become null."""
        plain = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
        size = self.file.stat().st_size if self.file.exists() else 0
        try:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(plain) + "\n")
        except OSError:
            with suppress(OSError):
                os.truncate(self.file, size)
            raise

    def keep(self, last: int) -> list[dict[str, Any]]:
        """Removes what was written after step ``last``, and returns the rest."""
        rows = [json.loads(line) for line in self.file.read_text(encoding="utf-8").splitlines()]
        kept = [row for row in rows if row["step"] <= last]
        new = self.file.with_suffix(".tmp")
        new.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(new, self.file)
        return kept


class Progress:
    """A bar on a terminal, a line a step elsewhere."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.first = 0  # steps that another run had made
        self.evaluated = math.nan
        self._started = time.perf_counter()
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, unit="step", dynamic_ncols=True)

    def step(self, number: int, metrics: Mapping[str, float], images_per_second: float) -> None:
        """Shows a finished step: its reward, or the loss of what learns without."""
        name, form = ("reward_mean", ".3f") if "reward_mean" in metrics else ("loss", ".4g")
        facts = {name.removesuffix("_mean"): format(metrics[name], form)}
        if not math.isnan(self.evaluated):
            facts["eval"] = f"{self.evaluated:.3f}"
        facts["images/s"] = f"{images_per_second:.1f}"
        if self._bar is not None:
            self._bar.set_postfix(facts, refresh=False)
            self._bar.update(number - self._bar.n)
            return
        if "reward_std" in metrics:  # one that is followed by its gradient has none
            facts["reward"] += f" (std {metrics['reward_std']:.3f})"
        left = (time.perf_counter() - self._started) / (number - self.first) * (self.steps - number)
        said = "  ".join(f"{name} {value}" for name, value in facts.items())
        print(f"step {number}/{self.steps}  {said}  {clock(left)} left", flush=True)

    def say(self, text: str) -> None:
        """A line of its own."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.close()


def clock(seconds: float) -> str:
    """75 -> "1:15", 3725 -> "1:02:05"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def reason(error: BaseException, out: Path) -> str:
    """What went wrong, in a sentence without its end."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or (isinstance(error, SafetensorError) and ("StorageFull" in str(error) or "No space" in str(error))):
        return f"there is no space left on the disk of {out}"
    if isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL", "Connection closed")):
        return "another process of this run has ended, and says why itself"
    if type(error).__name__ == "OutOfMemoryError":
        return "the device ran out of memory; lower sample_batch or minibatch, or set gradient_checkpointing"
    return one_line(error)
