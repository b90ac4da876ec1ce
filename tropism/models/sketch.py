"""A pipeline without its weights: the configurations of its parts, which is all that ``check`` looks at."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import transformers


class Config(dict[str, Any]):
    """Entries that are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


def sketch(folder: Path, index: Mapping[str, Any], base: Path | None = None) -> Any:
    """The parts that ``index`` (a model_index.json) names in ``folder``, or else in ``base``: the scheduler itself, of
    others ``.config``.

    What a file leaves out is the default of its class. A part that is missing is None.
    """
    places = {name: folder if base is None or (folder / name).is_dir() else base for name in index}
    parts = {name: _part(places[name] / name, value) for name, value in index.items() if isinstance(value, list)}
    return SimpleNamespace(config=Config({k: v for k, v in index.items() if k not in parts}), **parts)


def _part(folder: Path, value: list[Any]) -> Any:
    library, name = (*value, None, None)[:2]
    kind = getattr({"diffusers": diffusers, "transformers": transformers}.get(str(library)), str(name), None)
    if (folder / "scheduler_config.json").is_file() and kind is not None:
        return kind.from_pretrained(str(folder))
    if not (folder / "config.json").is_file():
        return None
    entries = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return SimpleNamespace(config=Config({**_defaults(kind), **entries}))


def _defaults(kind: Any) -> dict[str, Any]:
    if kind is None:
        return {}
    if getattr(kind, "config_class", None) is not None:
        return dict(kind.config_class().to_dict())
    parameters = inspect.signature(kind.__init__).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}
