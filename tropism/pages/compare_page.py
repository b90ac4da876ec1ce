"""``tropism compare``: several runs side by side, in the terminal and in one file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tropism import catalog
from tropism.config import BadInput
from tropism.flags import shown
from tropism.log import clock
from tropism.pages.charts import Chart, Series, chart
from tropism.pages.facts import Run, read_run
from tropism.pages.render import check_html, number, signed, write_page
from tropism.pages.run_page import DISTANCES, frontier, kept
from tropism.pages.settings import CompareSettings
from tropism.pages.verdict import Verdict, judge

JUDGED_BY = ("model", "eval_prompts", "eval_images", "eval_seed")  # what evaluations must share to be compared


def run_compare(settings: CompareSettings) -> Path:
    """Prints a table, and writes the page."""
    if len(settings.runs) < 2:
        raise BadInput("compare wants the folders of two runs or more, as in: tropism compare runs/a runs/b")
    out = check_html(settings.out)
    runs = [read_run(folder) for folder in settings.runs]
    columns = [column(run, name) for run, name in zip(runs, labels(runs), strict=True)]
    file = write_page("compare.html.j2", out, **page(runs, columns))
    print(table(columns))
    print("\n".join([*notes(runs), f"written to {file}"]))
    return file


def labels(runs: Sequence[Run]) -> list[str]:
    """The names of the folders, numbered where they are the same."""
    names = [run.name for run in runs]
    return [f"{name} ({names[:i].count(name) + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def column(run: Run, name: str) -> dict[str, Any]:
    """The facts of a run, by what is said of them, as text."""
    row, steps = run.last, run.rows[-1]["step"] if run.rows else None
    found = {"run": name, "method": run.method, "steps": number(steps, 9)}
    found["reward before"], found["reward after"] = number(run.base.get("eval_reward")), number(row.get("eval_reward"))
    found["gain"] = _interval(row, "eval_")
    for held in run.held_out:
        found[f"held-out {held} gain"] = _interval(row, run.key(held, ""))
    found |= {"KL (nats)": number(row.get("eval_kl")), "diversity": number(row.get("eval_diversity"))}
    images = max((row["images"] for row in run.rows if row.get("images") is not None), default=None)
    found |= {"images": number(images, 9), "time": clock(run.timings[-1][1]) if run.timings else "–"}
    return found | {"warnings": str(len(judge(run).warnings))}


def _interval(row: Any, key: str) -> str:
    mean, low, high = (row.get(f"{key}{name}") for name in ("gain", "gain_low", "gain_high"))
    return "–" if mean is None else f"{signed(mean)} ({signed(low)} to {signed(high)})"


def facts_of(columns: Sequence[dict[str, Any]]) -> list[str]:
    """What is known of any of them, in the order of the first that knows it."""
    found = dict.fromkeys(name for each in columns for name in each)
    last = ["KL (nats)", "diversity", "images", "time", "warnings"]
    return [name for name in found if name not in last] + last


def table(columns: Sequence[dict[str, Any]]) -> str:
    """A line a fact, a column a run."""
    rows = [[name, *(each.get(name, "–") for each in columns)] for name in facts_of(columns)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def notes(runs: Sequence[Run]) -> list[str]:
    """Why numbers may not compare."""
    found = []
    for name in JUDGED_BY:
        values = [shown(run.config.get(name)) for run in runs]
        values = [catalog.SHIPPED.get(value, value) for value in values] if name == "model" else values
        if len(set(values)) > 1:
            found.append(f"note: {name} differs ({', '.join(values)}), so that the runs were not judged alike")
    if len({tuple(sorted(run.weights.items())) for run in runs}) > 1:
        found.append("note: the rewards or their weights differ, so that only rewards of one name compare")
    return found


def different(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The settings in which the runs differ."""
    names = dict.fromkeys(name for run in runs for name, _, _ in run.settings)
    rows = [(name, [shown(run.config[name]) if name in run.config else "–" for run in runs]) for name in names]
    return [("method", [run.method for run in runs])] * (len({run.method for run in runs}) > 1) + [
        (name, values) for name, values in rows if len(set(values)) > 1
    ]


def page(runs: Sequence[Run], columns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the template shows."""
    verdicts: list[Verdict] = [judge(run) for run in runs]
    names = [each["run"] for each in columns]
    return {
        "title": "Comparison of " + ", ".join(names),
        "names": names,
        "facts": facts_of(columns),
        "columns": columns,
        "verdicts": verdicts,
        "notes": notes(runs),
        "charts": kept(_charts(runs, names)),
        "different": different(runs),
        "runs": runs,
    }


def _charts(runs: Sequence[Run], names: Sequence[str]) -> list[Chart | None]:
    rewards = list(dict.fromkeys(name for run in runs for name in run.weights))
    keys = [("gain in the reward", "eval_gain"), *((name, f"eval_{name}") for name in rewards)]
    keys += DISTANCES.items()
    named = list(enumerate(zip(runs, names, strict=True)))
    found = [
        chart(title, [Series(name, *run.series(key), colour=place) for place, (run, name) in named])
        for title, key in keys
    ]
    return [*found, frontier("gain against KL", runs, "eval_gain", names)]
