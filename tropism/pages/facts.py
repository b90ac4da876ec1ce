"""A run as its folder tells it: configuration, rows of metrics, and the small pictures of its evaluations."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from tropism import catalog
from tropism.config import BadInput, TrainSettings, read_config
from tropism.pictures import PROMPTS

Row = Mapping[str, Any]
SHEET = 8  # rows of a contact sheet, at most
UNTOLD = {"method", "out", "resume"}  # of the configuration, not settings of what is learnt


@dataclass(frozen=True)
class Run:
    """What is known of a run. Values of rows are finite numbers or None."""

    folder: Path
    method: str
    config: Mapping[str, Any]
    rows: Sequence[Row]
    failure: str  # the last line of error.txt

    @property
    def name(self) -> str:
        """The folder's."""
        return self.folder.resolve().name

    @cached_property
    def distils(self) -> bool:
        """Whether the first evaluation is a teacher's and the others are its student's."""
        return self.method in catalog.distilling()

    @property
    def role(self) -> str:
        """Of the rewards that are not held out."""
        return "judges" if self.distils else "trained on"

    @property
    def ends(self) -> tuple[str, str]:
        """Whose the first evaluation is, and whose the last."""
        student = f"student in {self.config.get('student_steps')} steps"
        return ("teacher", student) if self.distils else ("base", "tuned")

    @cached_property
    def tested(self) -> list[Row]:
        """The rows with an evaluation."""
        return [row for row in self.rows if "eval_reward" in row]

    @cached_property
    def weights(self) -> dict[str, float]:
        """Every reward by its name in the metrics, with its weight in the sum; held-out ones have 0."""
        first = self.tested[0] if self.tested else {}
        found = {name: value for name, value in first.items() if name.startswith("eval_") and name.endswith("_weight")}
        return {name[5:-7]: value for name, value in found.items() if value is not None}

    @property
    def held_out(self) -> list[str]:
        """Rewards that are evaluated and not trained on."""
        return [name for name, weight in self.weights.items() if not weight]

    @property
    def trained(self) -> list[str]:
        """Rewards that are trained on."""
        return [name for name, weight in self.weights.items() if weight]

    @property
    def last(self) -> Row:
        """The last evaluation; empty where there is none."""
        return self.tested[-1] if self.tested else {}

    @property
    def base(self) -> Row:
        """The first evaluation; empty where there is none."""
        return self.tested[0] if self.tested else {}

    def key(self, reward: str, what: str) -> str:
        """Such as eval_scenes_gain_low; with one reward alone its gain is that of the sum."""
        return f"eval_{reward}_{what}" if len(self.weights) > 1 else f"eval_{what}"

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """(steps, values) of the rows that have the value."""
        found = [(float(row["step"]), float(row[key])) for row in self.rows if row.get(key) is not None]
        return [step for step, _ in found], [value for _, value in found]

    @cached_property
    def settings(self) -> list[tuple[str, Any, bool]]:
        """(name, value, is it other than the default) of every setting, those that are first."""
        defaults = _defaults(self.method)
        rows = [(k, v, v != defaults.get(k, MISSING)) for k, v in self.config.items() if k not in UNTOLD]
        return sorted(rows, key=lambda row: not row[2])

    @cached_property
    def prompts(self) -> list[str]:
        """Of the pictures of a strip; none where that is not known."""
        try:
            text = json.loads((self.folder / "strips" / PROMPTS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return []
        return [str(each) for each in text] if isinstance(text, list) else []

    @cached_property
    def strips(self) -> list[tuple[int, str]]:
        """(step, data: URI) of small pictures at fixed seeds: at most eight evaluations, the first and last of them."""
        files = [(int(row["step"]), self.folder / "strips" / f"step-{int(row['step']):06}.png") for row in self.tested]
        there = [(step, file) for step, file in files if file.is_file()]
        places = sorted({round(i * (len(there) - 1) / (SHEET - 1)) for i in range(SHEET)}) if there else []
        return [(there[i][0], data_uri(there[i][1].read_bytes())) for i in places]

    @cached_property
    def timings(self) -> list[tuple[str, float]]:
        """Where the time went, in seconds."""
        if not self.rows:
            return []
        total = max((row["seconds"] for row in self.rows if row.get("seconds") is not None), default=0.0)
        total += self.rows[-1].get("eval_seconds") or 0.0  # rows are begun before their evaluation
        steps = sum(self._step_seconds())
        tests = sum(row["eval_seconds"] for row in self.tested[1:] if row.get("eval_seconds") is not None)
        rest = max(total - steps - tests, 0.0)
        parts = [("steps: drawing, scoring, updating", steps), ("evaluations", tests)]
        return [*parts, ("checkpoints, pictures, pages", rest), ("all, from the first step on", total)]

    def _step_seconds(self) -> list[float]:
        found, before = [], 0.0
        for row in self.rows:
            images, speed = row.get("images"), row.get("images_per_second")
            if images is not None and speed:
                found.append((images - before) / speed)
            before = images if images is not None else before
        return found


def data_uri(png: bytes) -> str:
    """A picture as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def read_run(folder: str | Path) -> Run:
    """Raises BadInput for what is not the folder of a run."""
    home = Path(folder).expanduser()
    if not (home / "config.yaml").is_file() or not (home / "metrics.jsonl").is_file():
        raise BadInput(f"{folder} is no run: it lacks config.yaml or metrics.jsonl; wanted the folder of a run")
    config = read_config(home / "config.yaml")
    error = home / "error.txt"
    lines = error.read_text(encoding="utf-8", errors="replace").strip().splitlines() if error.is_file() else []
    rows = _rows(home / "metrics.jsonl")
    next((row for row in rows if "eval_reward" in row), {}).setdefault("eval_gain", 0.0)  # over itself
    return Run(home, str(config.get("method", "")), config, rows, lines[-1] if lines else "")


def _rows(file: Path) -> list[dict[str, float | None]]:
    """A last line without its end is still being written, and left out."""
    rows = []
    text = file.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or _plain(row.get("step")) is None:
            raise BadInput(f"line {number} of {file} is no row of metrics; wanted an object with a step, as runs write")
        rows.append({name: _plain(value) for name, value in row.items()})
    return rows


def _plain(value: Any) -> float | None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if good else None


def _defaults(method: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    kinds: list[type[Any]] = [TrainSettings]
    with suppress(BadInput):  # of a method that is not here
        kinds.append(catalog.method_settings(method))
    for kind in kinds:
        for each in fields(kind):
            value = each.default_factory() if each.default_factory is not MISSING else each.default
            found[each.name] = list(value) if isinstance(value, tuple) else value
    return found
