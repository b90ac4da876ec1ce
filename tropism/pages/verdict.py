"""Is a run better, and by whose word? The rules behind the first line of a report, and behind its warnings.

Every gain is that of the last evaluation over the untrained model, pair by pair at equal seeds, with a 95 % interval.
A reward rose, or fell, when that interval lies above, or below, 0. A distillation is judged against its teacher, which
draws in many more moves: falling behind is no mistake there, only a warning.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

from tropism.pages.facts import Row, Run

FALL = 0.3  # of diversity or colour entropy: the share of the untrained model's that may be lost without a warning
MOVED = 1.0  # pooled standard deviations that a pixel statistic may move without a warning
UNCERTAIN, ROSE, FELL = "no certain difference", "better", "worse"


@dataclass(frozen=True)
class Verdict:
    """One line, how it is meant (good, bad, warn or unsure), and what else to look at."""

    line: str
    tone: str
    warnings: list[str]


def judge(run: Run) -> Verdict:
    """Of the last evaluation."""
    row = run.last
    if len(run.tested) < 2:
        when = "only before training" if run.tested else "not once"
        return Verdict(f"No verdict: the model was evaluated {when}.", "unsure", [])
    trained = direction(row, "eval_")
    held = {name: direction(row, run.key(name, "")) for name in run.held_out}
    lost = _losses(run)
    warnings = [*([] if run.distils else _disagreements(run)), *lost.values(), *_moves(run, {*run.weights, *lost})]
    if trained == FELL:
        tone = "warn" if run.distils else "bad"
    elif warnings:
        tone = "warn"
    else:
        tone = "good" if trained == ROSE else "unsure"
    return Verdict(_line(run, trained, held), tone, warnings)


def direction(row: Row, key: str) -> str:
    """What the interval of the gain under ``key`` (eval_, eval_scenes_) says."""
    low, high = row.get(f"{key}gain_low"), row.get(f"{key}gain_high")
    if low is None or high is None:
        return UNCERTAIN
    return ROSE if low > 0 else FELL if high < 0 else UNCERTAIN


def _line(run: Run, trained: str, held: Mapping[str, str]) -> str:
    if run.distils:
        parts = [f"The student against its teacher: {trained} by {' + '.join(run.trained)}{_gain(run.last, 'eval_')}"]
    else:
        parts = [f"{trained.capitalize()} by the reward that it was trained on{_gain(run.last, 'eval_')}"]
    for name, found in held.items():
        parts.append(f"{found} by the held-out {name}{_gain(run.last, run.key(name, ''))}")
    if not held and not run.distils:
        parts.append("nothing was held out")
    return "; ".join(parts) + "."


def _gain(row: Row, key: str) -> str:
    mean, low, high = (row.get(f"{key}{name}") for name in ("gain", "gain_low", "gain_high"))
    return "" if mean is None or low is None or high is None else f" ({mean:+.3g}, {low:+.3g} to {high:+.3g})"


def _disagreements(run: Run) -> list[str]:
    """The trained reward rose and a held-out one fell; since when."""
    found = []
    for name in run.held_out:
        key = run.key(name, "")
        apart = [row for row in run.tested if direction(row, "eval_") == ROSE and direction(row, key) == FELL]
        if apart and apart[-1] is run.last:
            since = run.tested[_since(run, apart)]["step"]
            found.append(
                f"The trained reward rose while the held-out {name} fell{_gain(run.last, key)}, since step {since:g}: "
                "the model is learning the reward, not what it stands for."
            )
    return found


def _since(run: Run, apart: list[Row]) -> int:
    """The place of the first evaluation of those that lie apart without interruption up to the last."""
    place = len(run.tested) - 1
    while place and run.tested[place - 1] in apart:
        place -= 1
    return place


def _losses(run: Run) -> dict[str, str]:
    """By what fell."""
    found = {}
    for name, what in (("diversity", "Diversity within a prompt"), ("colour_entropy", "Colour entropy")):
        before, now = run.base.get(f"eval_{name}"), run.last.get(f"eval_{name}")
        if before and now is not None and now < (1 - FALL) * before and name not in run.weights:
            found[name] = f"{what} fell by {1 - now / before:.0%}, from {before:.3g} to {now:.3g}."
    return found


def _moves(run: Run, known: Set[str]) -> list[str]:
    """Pixel statistics that moved, but for those that are rewards themselves or have been said to fall."""
    found = []
    for key, value in run.last.items():
        name = key[5:-6]
        if key.endswith("_shift") and value is not None and abs(value) > MOVED and name not in known:
            before, now = run.base.get(f"eval_{name}"), run.last.get(f"eval_{name}")
            ends = "" if before is None or now is None else f", from {before:.3g} to {now:.3g}"
            found.append(f"{name.replace('_', ' ').capitalize()} moved by {value:+.1f} standard deviations{ends}.")
    return found
