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

    @cached_property
    def gain(self) -> Gain:
        """Of the (weighted sum of the) rewards."""
        return paired_gain(self.before.total, self.after.total)


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
    )


def summary(outcome: Outcome) -> str:
    """What is printed at the end."""
    before, after = float(outcome.before.total.nanmean()), float(outcome.after.total.nanmean())
    return "\n".join(
        [
            f"done in {clock(outcome.seconds)}: reward {before:.3f} before, {after:.3f} after",
            f"  {in_words(outcome.gain)}",
            f"  before and after  {outcome.folder / 'before_after.png'}",
            f"  curve             {outcome.folder / 'curve.png'}",
            f"  report            {outcome.folder / 'report.html'}",
            f"  adapter           {outcome.folder / 'adapter'}",
            f"  model card        {outcome.folder / 'README.md'}",
        ]
    )
