"""``tropism report``: everything there is to see of a run, in one file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tropism.config import BadInput
from tropism.pages.charts import Chart, Series, chart
from tropism.pages.facts import Run, read_run
from tropism.pages.render import check_html, write_page
from tropism.pages.settings import ReportSettings
from tropism.pages.verdict import Verdict, judge

FILE = "report.html"
STATISTICS = (
    "brightness", "contrast", "saturation", "redness", "colour_entropy", "edge_density", "dark_fraction",
    "high_frequency", "grid_energy",
)  # fmt: skip

DISTANCES = {"KL to the untrained model (nats a chain)": "eval_kl", "diversity within a prompt": "eval_diversity"}


def run_report(settings: ReportSettings) -> Path:
    """Writes the page again, and prints the verdict."""
    if not settings.run:
        raise BadInput("report wants the folder of a run, as in: tropism report runs/ddpo-scenes-1")
    out, run = None if settings.out is None else check_html(settings.out), read_run(settings.run)
    verdict = judge(run)
    file = _write(run, verdict, out)
    print("\n".join([verdict.line, *(f"warning: {text}" for text in verdict.warnings), f"written to {file}"]))
    return file


def write_report(folder: Path, file: Path | None = None) -> Path:
    """The page of the run in a folder. Raises BadInput for what is no run."""
    run = read_run(folder)
    return _write(run, judge(run), file)


def _write(run: Run, verdict: Verdict, file: Path | None) -> Path:
    return write_page("report.html.j2", file or run.folder / FILE, **page(run, verdict))


def page(run: Run, verdict: Verdict) -> dict[str, Any]:
    """What the template shows."""
    return {
        "run": run,
        "title": f"{run.name}: {run.method} on {run.config.get('model')}",
        "verdict": verdict,
        "rewards": [_reward_row(run, name) for name in run.weights],
        "total": _total_row(run) if len(run.trained) != 1 or run.weights[run.trained[0]] != 1 else None,
        "curves": kept(_curves(run)),
        "frontier": kept(_frontiers(run)),
        "statistics": kept([_statistic(run, name) for name in STATISTICS if name not in run.weights]),
    }


def kept(charts: list[Chart | None]) -> list[Chart]:
    """Those with something to see."""
    return [each for each in charts if each is not None]


def _reward_row(run: Run, name: str) -> dict[str, Any]:
    held = not run.weights[name]
    return {
        "name": name,
        "role": "held out" if held else f"{run.role}, weight {run.weights[name]:g}",
        "base": run.base.get(f"eval_{name}"),
        "tuned": run.last.get(f"eval_{name}"),
        **_gains(run, run.key(name, "")),
    }


def _total_row(run: Run) -> dict[str, Any]:
    ends = {"base": run.base.get("eval_reward"), "tuned": run.last.get("eval_reward")}
    return {"name": "weighted sum", "role": run.role, **ends, **_gains(run, "eval_")}


def _gains(run: Run, key: str) -> dict[str, Any]:
    names = ("gain", "gain_low", "gain_high", "win_rate", "win_rate_low", "win_rate_high")
    return {name: run.last.get(f"{key}{name}") for name in names}


def _curves(run: Run) -> list[Chart | None]:
    """Rewards, trained on and held out, then KL and diversity."""
    whole = "reward" if len(run.trained) < 2 else "weighted sum of the rewards"
    train = Series("training images", *run.series("reward_mean"), colour=5, dots=False)
    found = [chart(whole, [train, banded(run, "evaluation, 95 % interval")])]
    if len(run.trained) > 1:
        found += [chart(name, [Series(name, *run.series(f"eval_{name}"))]) for name in run.trained]
    found += [chart(f"held out: {n}", [Series(n, *run.series(f"eval_{n}"), colour=1)]) for n in run.held_out]
    return found + [chart(title, [Series(title, *run.series(key), colour=2)]) for title, key in DISTANCES.items()]


def banded(run: Run, name: str) -> Series:
    """The evaluations' mean reward with its interval, where all three are known."""
    names = ("eval_reward", "eval_reward_low", "eval_reward_high")
    rows = [row for row in run.tested if all(row.get(each) is not None for each in names)]
    mean, low, high = ([float(row[each]) for row in rows] for each in names)
    return Series(name, [float(row["step"]) for row in rows], mean, (low, high))


def _frontiers(run: Run) -> list[Chart | None]:
    keys = {"reward": "eval_reward"} | {f"held-out {name}": f"eval_{name}" for name in run.held_out}
    return [frontier(f"{what} against KL", [run], key, [run.name]) for what, key in keys.items()]


def frontier(title: str, runs: Sequence[Run], key: str, names: Sequence[str]) -> Chart | None:
    """What was gained against how far the model went for it: a point an evaluation, a line a run."""
    found = []
    for place, (run, name) in enumerate(zip(runs, names, strict=True)):
        rows = [row for row in run.tested if row.get("eval_kl") is not None and row.get(key) is not None]
        xs, ys = [float(row["eval_kl"]) for row in rows], [float(row[key]) for row in rows]
        said = [f"step {row['step']:g}: KL {x:.4g}, {y:.4g}" for row, x, y in zip(rows, xs, ys, strict=True)]
        found.append(Series(name, xs, ys, colour=place, labels=said))
    return chart(title, found, "KL (nats)")


def _statistic(run: Run, name: str) -> Chart | None:
    """Its height is a quarter of the value or more, so that nothing looks like a change that is none."""
    moved = run.last.get(f"eval_{name}_shift")
    title = name.replace("_", " ") + ("" if moved is None else f", {moved:+.2f} std")
    return chart(title, [Series(name, *run.series(f"eval_{name}"), colour=3)], least=0.25)
