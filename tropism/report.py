"""What a finished run came to: before and after at equal seeds, in words and in one picture."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from tropism import pictures
from tropism.evaluate import Evaluation, Gain, paired_gain
from tropism.log import clock

if TYPE_CHECKING:
    from PIL import Image

    from tropism.policy import Policy

COMPARED = 6  # prompts of the picture


@dataclass(frozen=True)
class Outcome:
    """A finished run."""

    folder: Path
    before: Evaluation
    after: Evaluation
    seconds: float  # of training, with the evaluations in between
    images: int  # drawn in training
    steps: int  # made
    ends: tuple[str, str] | None = None  # whose the evaluations are, where not one model's before and after

    @property
    def labels(self) -> tuple[str, str]:
        """Of the two evaluations, a word each."""
        return ("before", "after") if self.ends is None else ("teacher", "student")

    @cached_property
    def gain(self) -> Gain:
        """Of the (weighted sum of the) rewards."""
        return paired_gain(self.before.total, self.after.total)


def ends_of(before: Policy, after: Policy) -> tuple[str, str] | None:
    """What teacher and student are called, by how they were evaluated; None where they are one model."""
    return None if before is after else (f"teacher in {drawn_in(before)}", f"student in {drawn_in(after)}")


def drawn_in(policy: Policy) -> str:
    """20 steps (guidance 3)."""
    scale = policy.model.guidance_scale if policy.guidance is None else policy.guidance
    told = "" if callable(scale) or scale == 1 else f" (guidance {scale:g})"
    return f"{policy.steps} step{'s' if policy.steps > 1 else ''}{told}"


def in_words(gain: Gain) -> str:
    """The gain with its interval."""
    dropped = f", {gain.dropped} without a score" if gain.dropped else ""
    return (
        f"gain {gain.mean:+.3f} (95 % interval {gain.low:+.3f} to {gain.high:+.3f}), better in "
        f"{100 * gain.win_rate:.0f} % of {gain.pairs} pairs at equal seeds{dropped}"
    )


def compared(outcome: Outcome, reward: str, how: str) -> Image.Image:
    """The first pictures of the two evaluations, one above the other."""
    before, after = outcome.before, outcome.after
    return pictures.before_after(
        before.images[:COMPARED],
        after.images[:COMPARED],
        before.text[:COMPARED],
        (before.total[:COMPARED], after.total[:COMPARED]),
        f"{reward}: {float(before.total.nanmean()):.3f} → {float(after.total.nanmean()):.3f}",
        f"{how}; {in_words(outcome.gain)}",
        outcome.labels,
    )


def summary(outcome: Outcome) -> str:
    """What is printed at the end."""
    before, after = float(outcome.before.total.nanmean()), float(outcome.after.total.nanmean())
    whose = outcome.labels if outcome.ends is None else [f"by the {each}" for each in outcome.ends]
    files = {
        " and ".join(outcome.labels): "before_after.png",
        "curve": "curve.png",
        "report": "report.html",
        "adapter": "adapter",
        "model card": "README.md",
    }
    width = max(map(len, files))
    return "\n".join(
        [
            f"done in {clock(outcome.seconds)}: reward {before:.3f} {whose[0]}, {after:.3f} {whose[1]}",
            f"  {in_words(outcome.gain)}",
            *(f"  {name:<{width}}  {outcome.folder / file}" for name, file in files.items()),
        ]
    )
