"""Prompts: a text file (one a line), a JSON-lines file (``prompt`` and free columns), and endless batches of groups."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tropism.base import Prompts


@dataclass(frozen=True)
class PromptSet:
    """Distinct or repeated prompts with metadata columns, one value a prompt. Raises ValueError otherwise."""

    text: Sequence[str]
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, values in self.columns.items():
            if len(values) != len(self.text):
                raise ValueError(
                    f"column {name!r} has {len(values)} values for {len(self.text)} prompts; give one a prompt"
                )

    def __len__(self) -> int:
        return len(self.text)

    def batch(self, index: Sequence[int], per_prompt: int, first_group: int = 0) -> Prompts:
        """Each named prompt ``per_prompt`` times, in groups of its own."""
        rows = [i for i in index for _ in range(per_prompt)]
        group = torch.arange(first_group, first_group + len(index)).repeat_interleave(per_prompt)
        columns = {name: [values[i] for i in rows] for name, values in self.columns.items()}
        return Prompts([self.text[i] for i in rows], group, columns)


def read_prompts(path: str | Path) -> PromptSet:
    """A ``.txt`` (one prompt a line; empty lines are skipped) or ``.jsonl`` file (objects with a ``prompt``).

    Raises ValueError in one sentence for a missing, empty or malformed file.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"there is no prompt file {file}; give a .txt (one prompt a line) or .jsonl file")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error.reason}); save it as UTF-8") from error
    lines = {number: line.strip() for number, line in enumerate(text.split("\n"), 1) if line.strip()}
    if not lines:
        raise ValueError(f"{file} has no prompts; write one a line")
    if file.suffix != ".jsonl":
        return PromptSet(list(lines.values()))
    return _from_rows({number: _row(file, number, line) for number, line in lines.items()}, file)


def _row(file: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number} of {file} is not JSON ({error}); write one object a line") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise ValueError(
            f'line {number} of {file} has no prompt; wanted an object such as {{"prompt": "a red circle"}}'
        )
    return row


def _from_rows(numbered: Mapping[int, dict[str, Any]], file: Path) -> PromptSet:
    """From the rows by the number of their line."""
    first, rows = next(iter(numbered)), list(numbered.values())
    names = set(rows[0]) - {"prompt"}
    for number, row in numbered.items():
        own = set(row) - {"prompt"}
        if own != names:
            raise ValueError(
                f"line {number} of {file} has the columns {sorted(own)}, line {first} has {sorted(names)}; give every "
                "prompt the same columns"
            )
    clash = names & {"images", "prompts", "samples", "completions", "metadata"}
    if clash:
        raise ValueError(f"{file} has a column {sorted(clash)[0]!r}, which rewards receive already; rename it")
    return PromptSet([row["prompt"] for row in rows], {name: [row[name] for row in rows] for name in sorted(names)})


def batches(prompts: PromptSet, per_step: int, per_prompt: int, seed: int, first: int = 0) -> Iterator[Prompts]:
    """Endless batches of ``per_step`` prompts x ``per_prompt`` images; batch number n depends on (seed, n) alone.

    Every prompt comes once a pass, in a fresh order each pass; a batch that is larger than the set holds a prompt more
    than once, in separate groups. Raises ValueError for sizes below 1 and an empty set.
    """
    if per_step < 1 or per_prompt < 1:
        raise ValueError(f"prompts per step and images per prompt must be at least 1; got {per_step} and {per_prompt}")
    if not len(prompts):
        raise ValueError("there are no prompts; give at least one")
    number = first
    while True:
        places = range(number * per_step, (number + 1) * per_step)
        yield prompts.batch([_at(place, len(prompts), seed) for place in places], per_prompt, number * per_step)
        number += 1


def _at(place: int, count: int, seed: int) -> int:
    """The prompt at a place of the endless stream of shuffled passes."""
    epoch, offset = divmod(place, count)
    return int(_order(count, seed, epoch)[offset])


@functools.lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
