"""``tropism models``: the families that can be trained, and what a given model is."""

from __future__ import annotations

from collections.abc import Sequence

from tropism import catalog
from tropism.config import ModelsSettings
from tropism.plan import as_bad_input


def run_models(settings: ModelsSettings) -> list[str]:
    """Prints the table, or what is known of one model; returns the lines."""
    if settings.model is None:
        head, *body = catalog.families()
        lines = [line for row in body for line in _entry(head, row)]
    else:
        with as_bad_input(ValueError, OSError, ImportError):
            facts = catalog.describe_model(settings.model)
        lines = _entry(("model", *facts), (settings.model, *facts.values()))
    print("\n".join(lines))
    return lines


def _entry(names: Sequence[str], values: Sequence[str]) -> list[str]:
    """The first value alone, the others below it, each after its name."""
    return [values[0], *(f"  {name:<17} {value}" for name, value in zip(names[1:], values[1:], strict=True)), ""]


def markdown() -> str:
    """The table as ``docs/models.md`` has it."""
    head, *body = catalog.families()
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
