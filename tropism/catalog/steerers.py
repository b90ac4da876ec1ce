"""Steerers by name: every module of ``tropism.steering`` with a ``Settings`` class."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tropism.catalog.files import with_settings
from tropism.config import BadInput, suggest

STEERING = Path(__file__).parents[1] / "steering"
AND = "+"  # between guides, and a search, that work together


def steerer_names() -> dict[str, str]:
    """Every steerer, as it is typed, with the first line of its file; nothing is imported."""
    return with_settings(STEERING)


def steerer_settings(text: str) -> Sequence[type[Any]]:
    """The settings classes of NAME or NAME+NAME; dashes and underscores are the same. Raises BadInput for an unknown
    name, one that is given twice, and for two that decide how chains are run."""
    known, names = steerer_names(), [name.strip().replace("_", "-") for name in text.split(AND)]
    for name in names:
        if name not in known:
            raise BadInput(f"there is no steerer {name!r}; {suggest(name, known)}")
        if names.count(name) > 1:
            raise BadInput(f"steer is {text}, with {name} twice; give it once")
    kinds = [importlib.import_module(f"tropism.steering.{name.replace('-', '_')}").Settings for name in names]
    searches = [name for name, kind in zip(names, kinds, strict=True) if hasattr(kind, "draw")]
    if len(searches) > 1:
        raise BadInput(
            f"steer is {text}, but {' and '.join(searches)} both decide how chains are run; give one of them"
        )
    return kinds
