"""Quality against cost: what every model is worth in 1, 2, 4, ... moves, and what it costs in calls and in seconds.

All is measured on the same prompts from the same noise. Network calls are counted where the denoiser is called, by
rows, so that guidance, which asks a network twice, costs twice as much. Seconds are those of drawing and decoding one
micro-batch, after all have been drawn once; the models take turns, so that whatever else a machine does meets them
all.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tropism.base import Prompts
from tropism.counting import Counted
from tropism.evaluate import Evaluation, Gain, Interval, draw_images, evaluate, interval, paired_gain
from tropism.policy import Policy
from tropism.rewards.composed import Weighted

COUNTS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Point:
    """One model in so many moves."""

    name: str
    moves: int
    calls: float  # of the network, an image
    seconds: float  # an image, drawn and decoded
    reward: Interval  # of the weighted sum
    gain: Gain  # over the first model in the most moves, pair by pair
    evaluation: Evaluation


def few_step_report(
    policies: Mapping[str, Policy],
    reward: Weighted,
    prompts: Prompts,
    counts: Sequence[int] = COUNTS,
    seed: int = 0,
    rounds: int = 3,
) -> list[Point]:
    """Every policy by its name at every count of moves, in this order; their own ``steps`` are not used.

    The first policy, in the most moves, is what the others' gain is over. ``rounds`` are those of the measurement of
    time, of which the median is told. Raises ValueError without policies, for counts that are no grid of a model, and
    for pictures that are not finite (health.Unhealthy).
    """
    if not policies or not counts or rounds < 1:
        raise ValueError(
            f"{len(policies)} policies, {len(counts)} counts and {rounds} rounds; wanted 1 or more of each"
        )
    drawn = {(name, moves): policy.with_(steps=moves) for name, policy in policies.items() for moves in counts}
    for policy in drawn.values():
        policy.model.grid(policy.steps)  # says whether it can be walked, before anything is drawn
    found, calls = dict[tuple[str, int], Evaluation](), dict[tuple[str, int], float]()
    for key, policy in drawn.items():
        counted = Counted(policy.model)
        found[key] = evaluate(policy.with_(model=counted), reward, prompts, seed)
        calls[key] = counted.rows / len(prompts.text)
    seconds, best = _seconds(drawn, prompts, seed, rounds), found[next(iter(policies)), max(counts)]
    return [
        Point(*key, calls[key], seconds[key], interval(each.total), paired_gain(best.total, each.total), each)
        for key, each in found.items()
    ]


def _seconds(
    drawn: Mapping[tuple[str, int], Policy], prompts: Prompts, seed: int, rounds: int
) -> dict[tuple[str, int], float]:
    """An image, of one micro-batch of each, in turns; every second round backwards."""
    taken: dict[tuple[str, int], list[float]] = {key: [] for key in drawn}
    for number in range(rounds):
        for key in list(drawn)[:: -1 if number % 2 else 1]:
            policy = drawn[key]
            text = prompts.text[: policy.microbatch]
            started = time.perf_counter()
            for images in draw_images(policy, text, seed):
                images.cpu()  # waits for the device
            taken[key].append((time.perf_counter() - started) / len(text))
    return {key: statistics.median(times) for key, times in taken.items()}


def rows(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Plain values, a row a point."""
    return [
        {
            "model": point.name,
            "moves": point.moves,
            "calls": point.calls,
            "seconds": point.seconds,
            "reward": point.reward.mean,
            "reward_low": point.reward.low,
            "reward_high": point.reward.high,
            "gain": point.gain.mean,
            "gain_low": point.gain.low,
            "gain_high": point.gain.high,
            **{f"mean_{name}": interval(values).mean for name, values in point.evaluation.parts.items()},
        }
        for point in points
    ]


def table(points: Sequence[Point], reward: str) -> str:
    """In lines: a head, and a line a point."""
    most = max(point.moves for point in points)
    head = ("model", "moves", "calls", "seconds", reward, f"against {points[0].name} in {most}")
    body = [
        (
            point.name,
            str(point.moves),
            f"{point.calls:g}",
            f"{point.seconds:.3g}",
            f"{point.reward.mean:.3f} ({point.reward.low:.3f} to {point.reward.high:.3f})",
            f"{point.gain.mean:+.3f} ({point.gain.low:+.3f} to {point.gain.high:+.3f})",
        )
        for point in points
    ]
    widths = [max(len(row[column]) for row in [head, *body]) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *body]]
    return "\n".join(line.rstrip() for line in lines)
