"""Going on with a run: which checkpoint is meant, and whether the settings are still those of the run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tropism.config import BadInput, TrainSettings, config_entries, read_config
from tropism.data.prompts import PromptSet

FREE = {"steps", "save_every", "eval_every", "report_to", "threads", "device", "sample_batch"}
"""What may change between the parts of a run without changing what is learnt (a device only up to rounding)."""


def find_run(text: str, method: str) -> tuple[Path, Path]:
    """(folder of the run, its checkpoint): ``text`` is a run, one of its checkpoints, or latest. Raises BadInput."""
    if text == "latest":
        saved = [path for path in Path("runs").glob("*/checkpoints/step-*") if _method_of(path.parents[1]) == method]
        if not saved:
            raise BadInput(f"resume is latest, but no run of {method} in runs has a checkpoint; give its folder")
        text = str(max(saved, key=lambda path: (path / "state.json").stat().st_mtime).parents[1])
    folder = Path(text).expanduser()
    run = folder.parents[1] if folder.name.startswith("step-") and folder.parent.name == "checkpoints" else folder
    if not (run / "config.yaml").is_file():
        raise BadInput(f"resume is {text}, which has no config.yaml; wanted the folder of a run, or latest")
    if _method_of(run) != method:
        raise BadInput(f"resume is {text}, a run of {_method_of(run)}; start it with tropism train {_method_of(run)}")
    found = [folder] if folder != run else sorted((run / "checkpoints").glob("step-*"))
    if not found or not found[-1].is_dir():
        raise BadInput(
            f"resume is {text}, which has no checkpoint; with save_every, or when stopped, a run writes some"
        )
    return run, found[-1]


def _method_of(run: Path) -> str:
    file = run / "config.yaml"
    return str(read_config(file).get("method")) if file.is_file() else ""


def with_its_config(words: Sequence[str], method: str) -> list[str]:
    """The words of ``tropism train METHOD``, with the configuration of the run that they say to go on with."""
    for place, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag == "--resume" and "--config" not in words:
            text = value if equals else next(iter(words[place + 1 :]), "")
            return ["--config", str(find_run(text, method)[0] / "config.yaml"), *words]
    return list(words)


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
