"""A dry run of a reward: what it makes of sample pictures, a row for each thing that could be wrong with it.

Every check is a function from a ``Trial`` to a ``Row``. Pictures are (B, 3, H, W) floats in [0, 1].
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tropism.base import Reward

from .scores import RewardError, check_shape

ROUNDING = 1e-4  # of the scores' size: differences up to this are called rounding
NOISY = 0.1  # of the scores' spread: differences beyond this drown what the reward says
SLOW = 1.0  # seconds an image

Verdict = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    check: str
    measured: str
    verdict: Verdict = "ok"
    remedy: str = ""


@dataclass(frozen=True)
class Trial:
    """A reward, what it is shown, and what it said the first time."""

    reward: Reward
    images: Tensor
    prompts: Sequence[str]
    columns: Mapping[str, Sequence[Any]]
    scores: Tensor  # (B,) float32
    seconds: float  # of a call, after one to warm up

    def ask(self, rows: Sequence[int], images: Tensor | None = None) -> Tensor:
        """Scores of some rows, in their order; their pictures may be others. Raises RewardError."""
        picked = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        shown = self.images[list(rows)] if images is None else images
        return _called(self.reward, shown, [self.prompts[row] for row in rows], picked)

    @property
    def spread(self) -> float:
        """Population standard deviation of the scores there are; 0 where there are none."""
        given = self.scores[~self.scores.isnan()].double()
        return float(given.std(correction=0)) if len(given) else 0.0

    @property
    def size(self) -> float:
        """Mean size of the scores there are, at least their spread, never 0."""
        given = self.scores[~self.scores.isnan()].double().abs()
        return max(self.spread, float(given.mean()) if len(given) else 0.0, 1e-12)


@torch.no_grad()
def _called(reward: Reward, images: Tensor, prompts: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> Tensor:
    """(B,) float32 on the CPU. Raises RewardError, whatever went wrong."""
    try:
        scores = reward(images.clone(), list(prompts), **columns)
    except RewardError:
        raise
    except Exception as error:
        raise RewardError(f"reward '{reward.name}' raised {type(error).__name__}: {one_line(error)}") from error
    if not isinstance(scores, Tensor):
        raise RewardError(f"reward '{reward.name}' returned a {type(scores).__name__}; wanted a tensor (B,)")
    return check_shape(scores, len(prompts), f"reward '{reward.name}'").detach().float().cpu()


def try_out(
    reward: Reward, images: Tensor, prompts: Sequence[str], columns: Mapping[str, Sequence[Any]] | None = None
) -> list[Row]:
    """All rows; only the first where the reward does not even answer."""
    columns = columns or {}
    try:
        _called(reward, images, prompts, columns)
        started = time.perf_counter()
        scores = _called(reward, images, prompts, columns)
        seconds = time.perf_counter() - started
    except RewardError as error:
        return [Row("shape", str(error), "fail", "mend this first; the other checks were not made")]
    trial = Trial(reward, images, prompts, columns, scores, seconds)
    rows = []
    for name, check in CHECKS.items():
        try:
            rows.append(check(trial))
        except Exception as error:  # of the reward; the first two calls passed
            rows.append(Row(name, one_line(error), "fail", "it took the whole batch before: look for what differs"))
    return rows


# The checks.


def _shape(trial: Trial) -> Row:
    shape = tuple(trial.images.shape)
    return Row("shape", f"{tuple(trial.scores.shape)} for pictures {shape}")


def _finite(trial: Trial) -> Row:
    missing, infinite = int(trial.scores.isnan().sum()), int(trial.scores.isinf().sum())
    measured = f"{len(trial.scores) - missing - infinite} finite, {missing} missing, {infinite} infinite"
    if infinite:
        return Row("finite", measured, "fail", "return None for a picture that cannot be scored")
    if missing == len(trial.scores):
        return Row("finite", measured, "fail", "no picture got a score: look into what the reward is given")
    if missing:
        return Row("finite", measured, "warn", "pictures without a score teach nothing; see why they have none")
    return Row("finite", measured)


def _range(trial: Trial) -> Row:
    given = trial.scores[~trial.scores.isnan()]
    if not len(given):
        return Row("range", "no score", "fail", "see the row above")
    return Row("range", f"{float(given.min()):.4g} to {float(given.max()):.4g}, mean {float(given.mean()):.4g}")


def _spread(trial: Trial) -> Row:
    distinct = len(trial.scores[~trial.scores.isnan()].unique())
    measured = f"{distinct} different scores of {len(trial.scores)}, standard deviation {trial.spread:.4g}"
    if distinct < 2:
        return Row("tells apart", measured, "fail", "drawings, noise, black and white score alike: it teaches nothing")
    return Row("tells apart", measured)


def _prompts(trial: Trial) -> Row:
    if len(set(trial.prompts)) < 2:
        return Row("prompts", "only one prompt was given")
    rows, moved = range(len(trial.prompts)), [*trial.prompts[1:], trial.prompts[0]]
    try:
        changed = _called(trial.reward, trial.images, moved, trial.columns)
    except RewardError as error:
        return Row("prompts", f"with prompts exchanged: {error}", "warn", "prompts of a run must be ones that it knows")
    count = sum(not _same(trial.scores[row], changed[row]) for row in rows)
    return Row("prompts", f"exchanged, {count} of {len(rows)} scores change" if count else "do not matter to it")


def _again(trial: Trial) -> Row:
    return _compared(
        trial, "twice the same", trial.ask(range(len(trial.prompts))),
        "seed it, or set its temperature to 0; a reward cache would keep the first answer",
    )  # fmt: skip


def _order(trial: Trial) -> Row:
    back = list(reversed(range(len(trial.prompts))))
    return _compared(trial, "order", trial.ask(back).flip(0), "scores are in another order than the pictures")


def _one_by_one(trial: Trial) -> Row:
    alone = torch.cat([trial.ask([row]) for row in range(len(trial.prompts))])
    remedy = "a score depends on the rest of its batch: use no statistics of the batch, and evaluation mode"
    return _compared(trial, "batch size", alone, remedy)


def _unchanged(trial: Trial) -> Row:
    shown = trial.images.clone()
    with torch.no_grad():
        trial.reward(shown, list(trial.prompts), **trial.columns)
    if not torch.equal(shown, trial.images):
        return Row("input", "it writes into the pictures", "fail", "work on a copy: images.clone()")
    return Row("input", "left as it was")


def _half(trial: Trial) -> Row:
    """Models in mixed precision may hand over half precision."""
    try:
        scores = trial.ask(range(len(trial.prompts)), trial.images.bfloat16())
    except RewardError as error:
        return Row("bfloat16", str(error), "warn", "begin with images = images.float()")
    off = float((scores - trial.scores).abs().nan_to_num().max())
    return Row("bfloat16", f"taken, scores differ by up to {off:.3g}")


def _gradient(trial: Trial) -> Row:
    images = trial.images.clone().requires_grad_()
    without = "no method that differentiates the reward (AlignProp, DRaFT, ReFL) can use it"
    try:
        with torch.enable_grad():
            scores = trial.reward(images, list(trial.prompts), **trial.columns)
            given = scores[~scores.isnan()]
            if not given.requires_grad:
                return Row("gradient", "none", "fail" if trial.reward.differentiable else "ok", without)
            (found,) = torch.autograd.grad(given.sum(), images)
    except Exception as error:  # it takes pictures, but not ones that ask for a gradient
        return Row("gradient", one_line(error), "fail" if trial.reward.differentiable else "warn", without)
    broken = int((~found.isfinite()).flatten(1).any(1).sum())
    if broken:
        remedy = "look for divisions by 0 and roots of 0; black and white pictures are among the samples"
        return Row("gradient", f"not finite for {broken} of {len(found)} pictures", "fail", remedy)
    flat = int((found.flatten(1) == 0).all(1).sum())
    if flat == len(found):
        return Row("gradient", "0 everywhere", "fail", "compute the score without rounding or counting")
    return Row("gradient", f"finite; 0 for {flat} of {len(found)} pictures, mean norm {_norm(found):.3g}")


def _speed(trial: Trial) -> Row:
    each = trial.seconds / len(trial.prompts)
    started = time.perf_counter()
    trial.ask([0])
    alone = time.perf_counter() - started
    measured = f"{1000 * each:.3g} ms an image, {1 / max(each, 1e-9):.3g} images/s; {1000 * alone:.3g} ms for one alone"
    if each > SLOW:
        return Row("speed", measured, "warn", "serve it (tropism reward serve): it then runs while images are sampled")
    return Row("speed", measured)


CHECKS: Mapping[str, Callable[[Trial], Row]] = {
    "shape": _shape,
    "finite": _finite,
    "range": _range,
    "tells apart": _spread,
    "prompts": _prompts,
    "twice the same": _again,
    "order": _order,
    "batch size": _one_by_one,
    "input": _unchanged,
    "bfloat16": _half,
    "gradient": _gradient,
    "speed": _speed,
}


def _compared(trial: Trial, check: str, scores: Tensor, remedy: str) -> Row:
    """The first scores against others that should be equal."""
    if not torch.equal(scores.isnan(), trial.scores.isnan()):
        return Row(check, "other pictures have no score", "fail", remedy)
    off = float((scores - trial.scores).abs().nan_to_num().max())
    if off == 0:
        return Row(check, "equal to the last bit")
    if off <= ROUNDING * trial.size:
        return Row(check, f"equal but for rounding, {off:.2g}")
    verdict: Verdict = "fail" if off > NOISY * trial.spread else "warn"
    return Row(check, f"differs by up to {off:.3g}", verdict, remedy)


def one_line(error: BaseException) -> str:
    """The first line of what an exception says."""
    return str(error).strip().split("\n")[0] or "no message"


def _same(one: Tensor, other: Tensor) -> bool:
    return bool(one == other) or bool(one.isnan() and other.isnan())


def _norm(gradient: Tensor) -> float:
    return float(gradient.flatten(1).norm(dim=1).mean())


def table(rows: Sequence[Row]) -> str:
    """The rows as lines of text."""
    widths = [max(len(getattr(row, name)) for row in rows) for name in ("check", "verdict")]
    lines = []
    for row in rows:
        remedy = f"\n{'':<{sum(widths) + 4}}{row.remedy}" if row.remedy and row.verdict != "ok" else ""
        lines.append(f"{row.verdict:<{widths[1]}}  {row.check:<{widths[0]}}  {row.measured}{remedy}")
    return "\n".join(lines)
