"""Which argument of a reward callable gets what, read off the names in its signature.

A parameter is filled, in this order, by a known name (samples, images, completions; prompts; metadata; singular as
well), by a column of its name, by a looser name (text, caption, p; meta, m; ``_`` for whatever comes next), by its
default. The first parameter may have any name when it stands for the samples. Columns that nothing asks for are left
out.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from .scores import RewardError

Parameters = tuple[inspect.Parameter, ...]

_SAMPLES = ("samples", "images", "completions")
_KNOWN = {
    **{name: "samples" for plural in _SAMPLES for name in (plural, plural[:-1])},
    **{"prompts": "prompts", "prompt": "prompts", "metadata": "metadata", "metadatas": "metadata"},
}
_LOOSE = {
    **dict.fromkeys(("text", "texts", "caption", "captions", "p"), "prompts"),
    **dict.fromkeys(("meta", "m"), "metadata"),
}


def parameters(function: Any, name: str) -> Parameters:
    """The named parameters of ``function``, and its ``**columns``; of a module, those of its ``forward``.

    Raises RewardError where there is nothing to go by.
    """
    if not callable(function):
        raise RewardError(f"reward '{name}' is a {type(function).__name__}; wanted something that can be called")
    try:
        signature = inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except (TypeError, ValueError) as cause:
        raise RewardError(f"reward '{name}' has no readable signature; wrap it in a def that names inputs") from cause
    found = tuple(p for p in signature.parameters.values() if p.kind is not p.VAR_POSITIONAL)
    if len(found) < len(signature.parameters) and all(p.kind is p.VAR_KEYWORD for p in found):
        raise RewardError(f"reward '{name}' takes {signature}; name its inputs, or decorate with functools.wraps")
    if not found:
        raise RewardError(f"reward '{name}' takes no arguments; wanted at least the samples")
    return found


def arguments(
    found: Parameters, samples: Any, prompts: Sequence[str], columns: Mapping[str, Any], name: str
) -> tuple[list[Any], dict[str, Any]]:
    """Positional and keyword arguments for one call. Raises RewardError for a parameter that nothing fills."""
    metadata = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    inputs = {"samples": samples, "prompts": list(prompts), "metadata": metadata or [{} for _ in prompts]}
    roles = _roles(found, columns)
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for parameter in found:
        key = parameter.name
        if parameter.kind is parameter.VAR_KEYWORD:
            for extra in _open(inputs, roles, columns).items():
                kwargs.setdefault(*extra)
            continue
        if key in roles:
            value = inputs[roles[key]]
        elif key in columns:
            value = columns[key]
        elif parameter.default is not parameter.empty:
            value = parameter.default
        else:
            raise RewardError(
                f"reward '{name}' wants '{key}', which is neither samples, prompts, metadata nor a column; "
                f"the columns are {sorted(columns)}"
            )
        if parameter.kind is parameter.POSITIONAL_ONLY:
            args.append(value)
        else:
            kwargs[key] = value
    return args, kwargs


def _roles(found: Parameters, columns: Mapping[str, Any]) -> dict[str, str]:
    """Parameter name -> samples, prompts or metadata; each is given once, clear names first."""
    named = [p for p in found if p.kind is not p.VAR_KEYWORD]
    free = ["samples", "prompts", "metadata"]
    roles: dict[str, str] = {}

    def give(key: str, role: str | None) -> None:
        if role in free and key not in roles:
            free.remove(role)
            roles[key] = role

    for p in named:
        if not (p.name in columns and _KNOWN.get(p.name) == "metadata"):
            give(p.name, _KNOWN.get(p.name))
    for at, p in enumerate(named):
        if p.name in columns:
            continue
        give(p.name, _LOOSE.get(p.name))
        if p.name.startswith("_"):
            give(p.name, next(iter(free), None))
        elif at == 0 and p.default is p.empty and p.kind is not p.KEYWORD_ONLY:
            give(p.name, "samples")
    return roles


def _open(inputs: Mapping[str, Any], roles: Mapping[str, str], columns: Mapping[str, Any]) -> dict[str, Any]:
    """What ``**columns`` receives: every column, the prompts, and the samples under each of their names."""
    given = set(roles.values())
    extra = {name: inputs[_KNOWN[name]] for name in ("prompts", *_SAMPLES) if _KNOWN[name] not in given}
    return {**columns, **extra}
