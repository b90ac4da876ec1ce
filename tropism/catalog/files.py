"""What is found by its file instead of being registered: modules with a ``Settings`` class."""

from __future__ import annotations

import ast
from pathlib import Path


def with_settings(folder: Path) -> dict[str, str]:
    """The modules in a folder that have a ``Settings`` class, as they are typed, with the first line of each file;
    nothing is imported."""
    found = {}
    for file in sorted(folder.glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.ClassDef) and node.name == "Settings" for node in tree.body):
            found[file.stem.replace("_", "-")] = (ast.get_docstring(tree) or "").split("\n")[0]
    return found
