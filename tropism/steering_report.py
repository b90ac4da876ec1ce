"""Steer or tune? What ways to steer, and fine-tuned models, are worth on the same prompts from the same noise, and what
each costs in network calls, reward calls and seconds."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tropism.base import Prompts
from tropism.evaluate import Evaluation, Gain, Interval, interval, judge, paired_gain
from tropism.policy import Policy
from tropism.rewards.composed import Weighted
from tropism.steering import Guiding, Search, Trace, image_seeds, steer_policy


@dataclass(frozen=True)
class Way:
    """A policy and what steers it; no steerers is plain drawing."""

    policy: Policy
    steerers: Sequence[Search | Guiding] = ()


@dataclass(frozen=True)
class Entry:
    """One way, measured."""

    name: str
    trace: Trace  # its cost, a sample
    seconds: float  # a sample, drawn and decoded
    evaluation: Evaluation
    rewards: Mapping[str, Interval]
    gains: Mapping[str, Gain]  # over the first way, pair by pair


def steering_report(
    ways: Mapping[str, Way], reward: Weighted, judges: Weighted, prompts: Prompts, seed: int = 0
) -> list[Entry]:
    """Every way by its name, in this order; the first is what gains are over.

    ``reward`` steers and ``judges`` (which has it too) only look at what was drawn. Raises ValueError without ways,
    TypeError for a guide whose reward has no gradient.
    """
    if not ways:
        raise ValueError("no ways to draw were given; wanted at least one")
    found: list[Entry] = []
    seeds = image_seeds(len(prompts.text), seed)
    for name, way in ways.items():
        started = time.perf_counter()
        drawn, trace = steer_policy(way.policy, reward, prompts, way.steerers, seeds)
        images = way.policy.decode(drawn.latents).float().cpu()
        seconds = (time.perf_counter() - started) / len(images)
        seen = judge(images, judges, prompts, way.policy.microbatch)
        first = found[0].evaluation if found else seen
        rewards = {part: interval(values) for part, values in seen.parts.items()}
        gains = {part: paired_gain(first.parts[part], values) for part, values in seen.parts.items()}
        found.append(Entry(name, trace, seconds, seen, rewards, gains))
    return found


def rows(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Plain values, a row a way."""
    return [
        {
            "way": each.name,
            "calls": each.trace.calls,
            "scored": each.trace.scored,
            "seconds": each.seconds,
            "reward_seconds": each.trace.reward_seconds,
            **{
                f"{part}{end}": value
                for part, found in each.rewards.items()
                for end, value in (("", found.mean), ("_low", found.low), ("_high", found.high))
            },
            **{
                f"{part}_gain{end}": value
                for part, gain in each.gains.items()
                for end, value in (("", gain.mean), ("_low", gain.low), ("_high", gain.high))
            },
        }
        for each in entries
    ]


def table(entries: Sequence[Entry]) -> str:
    """In lines: a head, and a line a way; of every reward its mean, and the gain over the first way."""
    parts = list(entries[0].rewards)
    head = ["way", "calls", "scored", "seconds", *(word for part in parts for word in (part, "gain"))]
    body = []
    for each in entries:
        cells = [each.name, f"{each.trace.calls:g}", f"{each.trace.scored:g}", f"{each.seconds:.3g}"]
        for part in parts:
            gain = each.gains[part]
            cells.append(f"{each.rewards[part].mean:.3f}")
            cells.append(f"{gain.mean:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})" if each is not entries[0] else "")
        body.append(cells)
    widths = [max(len(row[column]) for row in [head, *body]) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *body]]
    return "\n".join(line.rstrip() for line in lines)


def sheet(entries: Sequence[Entry], shown: int) -> Any:
    """A row a prompt, a column a way."""
    from tropism import pictures

    text = entries[0].evaluation.text
    count = min(shown, len(text))
    cells = [(each, place) for place in range(count) for each in entries]
    return pictures.grid(
        torch.stack([each.evaluation.images[place] for each, place in cells]),
        [f"{each.name}: {text[place]}" for each, place in cells],
        [f"reward {pictures.number(float(each.evaluation.total[place]))}" for each, place in cells],
        "the same prompts from the same noise",
        len(entries),
    )


def chart(entries: Sequence[Entry], part: str) -> Any:
    """A matplotlib figure: a reward against network calls, a point a way."""
    from tropism import pictures

    lines = [
        pictures.Measured(each.name, [each.trace.calls], [found.mean], [found.low], [found.high], [each.name])
        for each in entries
        for found in [each.rewards[part]]
    ]
    return pictures.against_cost(lines, "what steering is worth, and costs", "network calls an image", part)
