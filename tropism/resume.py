"""Going on with a run: which checkpoint is meant, and whether the settings are still those of the run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tropism.config import BadInput, HealthSettings, TrainSettings, config_entries, read_config
from tropism.flags import words_by_flag

if TYPE_CHECKING:
    from tropism.data.prompts import PromptSet

BEST = "best"  # name of the checkpoint with the best evaluation
FREE = {"steps", "save_every", "eval_every", "patience", "report_to", "threads", "device", "sample_batch"}
FREE |= {"reward_cache", "drop_text_encoders", "reward_device", "shard", "save_total_limit"}
FREE |= {field.name for field in fields(HealthSettings)} - {"mixed_precision", "image_size"}
"""What may change between the parts of a run without changing what is learnt (a device only up to rounding)."""


def find_run(text: str, method: str) -> tuple[Path, Path]:
    """(folder of the run, its checkpoint): ``text`` is a run, one of its checkpoints, or latest or best for those of
    the run that was saved last. Raises BadInput."""
    if text in ("latest", BEST):
        text = str(_latest(method, text))
    folder = Path(text).expanduser()
    run = folder.parents[1] if folder.parent.name == "checkpoints" else folder
    if not (run / "config.yaml").is_file():
        raise BadInput(f"resume is {text}, which has no config.yaml; wanted the folder of a run, or latest")
    of = _method_of(run)
    if of != method:
        raise BadInput(f"resume is {text}, a run of {of}; start it with tropism train {of}")
    found = [folder] if folder != run else checkpoints(run / "checkpoints")
    if not found or not found[-1].is_dir():
        raise BadInput(
            f"resume is {text}, which has no checkpoint; with save_every, or when stopped, a run writes some"
        )
    return run, found[-1]


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(folder.glob("step-*")) if folder.is_dir() else []


def _latest(method: str, which: str) -> Path:
    """The run of the method in ``runs`` that was saved last, or the best checkpoint that was. Raises BadInput."""
    runs = [folder.parent for folder in Path("runs").glob("*/checkpoints") if _method_of(folder.parent) == method]
    best = which == BEST
    saved = [path for run in runs for path in (run / "checkpoints").glob(BEST if best else "step-*")]
    if not saved:
        kind = "checkpoint better than the untrained model" if best else "checkpoint"
        raise BadInput(f"resume is {which}, but no run of {method} in runs has a {kind}; give its folder")
    found = max(saved, key=lambda path: (path / "state.json").stat().st_mtime)
    return found if best else found.parents[1]


def _method_of(run: Path) -> str:
    file = run / "config.yaml"
    return str(read_config(file).get("method")) if file.is_file() else ""


def with_its_config(words: Sequence[str], method: str) -> list[str]:
    """The words of ``tropism train METHOD``, with the configuration of the run that they say to go on with."""
    said = dict(words_by_flag(words))
    if "resume" not in said or "config" in said:
        return list(words)
    run, _ = find_run(" ".join(said["resume"]), method)
    return ["--config", str(run / "config.yaml"), *words]


def check_same(run: Path, method: str, settings: TrainSettings, method_settings: Any) -> None:
    """Raises BadInput for a setting that would change what the run is about."""
    before, now = read_config(run / "config.yaml"), config_entries(method, settings, method_settings)
    for name in sorted((set(before) | set(now)) - FREE):
        if before.get(name) != now.get(name):
            raise BadInput(
                f"{name} is {now.get(name)}, but {before.get(name)} in {run}; leave it out, or start a new run: a run "
                f"goes on with its own settings, and only {', '.join(sorted(FREE))} may change"
            )


def fingerprint(prompts: PromptSet) -> str:
    """Of the prompts and their columns: a file that was edited is another set."""
    content = json.dumps([list(prompts.text), {k: list(v) for k, v in prompts.columns.items()}], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
