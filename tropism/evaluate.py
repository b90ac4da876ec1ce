"""Evaluation at equal seeds: the same prompts from the same noise, before and after, and how sure the difference is.

Evaluation draws without chance: DDIM with eta 0, or Euler's method on a flow, with the default guidance and steps, from
noise that belongs to (seed, number of the image) and not to the batch. So two evaluations differ by the model alone. A
consistency model draws noise at every hop; there that noise belongs to the image as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tropism.base import Prompts, TextToImage, pick
from tropism.data.prompts import PromptSet
from tropism.health import check_finite_pictures
from tropism.policy import Policy
from tropism.processes import ALONE
from tropism.randomness import normal, row_generators, row_seeds
from tropism.rewards.composed import Weighted
from tropism.samplers import solver

RESAMPLES = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap interval; ``count`` values are behind it."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Gain:
    """Mean of after - before over the pairs that have both scores, with its interval.

    ``win_rate`` is the share of pairs that got better, equal ones counting half, with its interval (``win_low``,
    ``win_high``). ``dropped`` pairs lacked a score.
    """

    mean: float
    low: float
    high: float
    pairs: int
    dropped: int
    win_rate: float
    win_low: float
    win_high: float


@dataclass(frozen=True)
class Evaluation:
    """Images and what each reward says of them."""

    images: Tensor  # (N, 3, H, W) in [0, 1], on the CPU
    text: Sequence[str]  # N prompts
    total: Tensor  # (N,) the weighted sum of the rewards
    parts: Mapping[str, Tensor]  # each reward by name, (N,), unweighted


def deterministic(model: TextToImage, steps: int, guidance: float | None = None, microbatch: int = 16) -> Policy:
    """The policy of evaluation: no chance after the first noise; guidance is the model's own unless given."""
    return Policy(model, solver(model.denoiser), steps, guidance, microbatch=microbatch)


def first_images(prompts: PromptSet, count: int, per_prompt: int = 1) -> Prompts:
    """``count`` prompts, going round the set where it is shorter, each ``per_prompt`` times."""
    return prompts.batch([place % len(prompts) for place in range(count)], per_prompt)


def draw_images(policy: Policy, text: Sequence[str], seed: int, numbers: Tensor | None = None) -> Iterator[Tensor]:
    """Images (B, 3, H, W) of the prompts, a micro-batch at a time; image i starts from the noise of (seed, i).

    ``numbers`` (N,) says which images these are, where they are not all from 0 on.
    """
    numbers = torch.arange(len(text)) if numbers is None else numbers
    seeds = row_seeds(int(numbers.max()) + 1, torch.Generator().manual_seed(seed))[numbers]
    for rows in torch.arange(len(text)).split(policy.microbatch):
        generators = row_generators(seeds[rows])
        x = normal((len(rows), *policy.model.latent_shape), generators, policy.device)
        yield policy.images([text[row] for row in rows.tolist()], generators, x)


@torch.no_grad()
def evaluate(policy: Policy, reward: Weighted, prompts: Prompts, seed: int = 0) -> Evaluation:
    """Draws an image a prompt and scores it; columns of the prompts reach the rewards by name. Raises Unhealthy."""
    images, scores = list[Tensor](), list[dict[str, Tensor]]()
    processes, count = policy.processes, len(prompts.text)
    mine = processes.share(torch.arange(count))
    drawn = draw_images(policy.with_(processes=ALONE), pick(prompts, mine).text, seed, mine)
    for rows, batch in zip(mine.split(policy.microbatch), drawn, strict=True):
        images.append(batch.float().cpu())
        scores.append(_scored(batch, reward, pick(prompts, rows)))
    parts = {name: torch.cat([part[name] for part in scores]) for name in scores[0]}
    joined = {name: processes.joined(values, mine, count) for name, values in parts.items()}
    pixels = processes.joined(torch.cat(images), mine, count)
    return Evaluation(pixels, list(prompts.text), reward.combine(joined), joined)


def _scored(images: Tensor, reward: Weighted, prompts: Prompts) -> dict[str, Tensor]:
    """What every reward says of (B, 3, H, W), on the CPU. Raises Unhealthy for pictures that are not finite."""
    check_finite_pictures(images)
    parts = reward.parts(images, prompts.text, **prompts.columns)
    return {name: values.detach().float().cpu() for name, values in parts.items()}


@torch.no_grad()
def judge(images: Tensor, reward: Weighted, prompts: Prompts, batch: int = 16) -> Evaluation:
    """``evaluate`` of pictures (N, 3, H, W) that are drawn already, one a prompt, ``batch`` at a time."""
    rows = torch.arange(len(images)).split(batch)
    scores = [_scored(images[each], reward, pick(prompts, each)) for each in rows]
    parts = {name: torch.cat([part[name] for part in scores]) for name in scores[0]}
    return Evaluation(images.float().cpu(), list(prompts.text), reward.combine(parts), parts)


def interval(values: Tensor, seed: int = 0) -> Interval:
    """The mean of the values (N,) that are not NaN, with its 95 % percentile bootstrap interval."""
    given = values.double().numpy()
    given = given[~np.isnan(given)]
    if not len(given):
        return Interval(math.nan, math.nan, math.nan, 0)
    low, high = _bootstrap(given, seed)
    return Interval(float(given.mean()), low, high, len(given))


def paired_gain(before: Tensor, after: Tensor, seed: int = 0) -> Gain:
    """after - before, (N,) each, pair by pair at equal seeds, with a 95 % percentile bootstrap interval.

    Pairs that lack a score are left out and counted. Raises ValueError for different shapes.
    """
    if before.shape != after.shape or before.ndim != 1:
        raise ValueError(f"before {tuple(before.shape)} and after {tuple(after.shape)} must both be (N,)")
    difference = after.double() - before.double()
    given = difference[~difference.isnan()].numpy()
    dropped = len(difference) - len(given)
    if not len(given):
        return Gain(math.nan, math.nan, math.nan, 0, dropped, math.nan, math.nan, math.nan)
    wins = (given > 0) + 0.5 * (given == 0)
    return Gain(
        float(given.mean()), *_bootstrap(given, seed), len(given), dropped, float(wins.mean()), *_bootstrap(wins, seed)
    )


def _bootstrap(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]], seed: int) -> tuple[float, float]:
    """Percentiles of the means of resamples, as many at once as fit in some tens of megabytes."""
    rng = np.random.default_rng(seed)
    share = max(1, 2_000_000 // len(values))
    sizes = [min(share, RESAMPLES - start) for start in range(0, RESAMPLES, share)]
    means = [values[rng.integers(len(values), size=(size, len(values)))].mean(1) for size in sizes]
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
