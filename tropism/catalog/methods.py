"""Methods by name: every module of ``tropism.methods`` with a ``Settings`` class."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from typing import Any

from tropism.catalog.files import with_settings
from tropism.config import BadInput, suggest

DISTILS = re.compile(r"\w*(Distillation|Training|Student)Settings")  # which their settings extend
METHODS = Path(__file__).parents[1] / "methods"


def method_names() -> dict[str, str]:
    """Every method, as it is typed, with the first line of its file; nothing is imported."""
    return with_settings(METHODS)


def distilling() -> list[str]:
    """The methods that make a model for few steps; nothing is imported."""
    return [name for name in method_names() if _extends(name.replace("-", "_"))]


def _extends(module: str) -> bool:
    """Whether the settings in this file extend those of distillation, perhaps by way of another method's."""
    tree = ast.parse((METHODS / f"{module}.py").read_text(encoding="utf-8"))
    bases = [
        base for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Settings" for base in node.bases
    ]
    names = [ast.unparse(base).split(".") for base in bases]
    return any(_extends(name[0]) if len(name) == 2 else bool(DISTILS.fullmatch(name[0])) for name in names)


def method_settings(name: str) -> type[Any]:
    """The settings class of a method; dashes and underscores are the same. Raises BadInput for an unknown name."""
    known = method_names()
    if name.replace("_", "-") not in known:
        raise BadInput(f"there is no method {name!r}; {suggest(name, known)}")
    settings: type[Any] = importlib.import_module(f"tropism.methods.{name.replace('-', '_')}").Settings
    return settings
