"""The rules of the house that no single module's tests would notice: sizes, docstrings, imports, forbidden words.

Which module may import which is a matter of the contracts in pyproject.toml (``lint-imports``); here is what they
cannot see: what importing a method really loads.
"""

from __future__ import annotations

import ast
import os
import re
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = sorted((ROOT / "tropism").rglob("*.py"))
METHODS = sorted(path for path in (ROOT / "tropism" / "methods").glob("*.py") if path.stem != "__init__")

PAGES = sorted((ROOT / "docs").glob("*.md"))
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)

LIBRARY_LINES, METHOD_LINES = 400, 200
PAPER = re.compile(r"\(.+ (19|20)\d\d")  # authors and a year
HEAVY = ("diffusers", "transformers", "wandb", "tensorboard")
TEXT = {".py", ".md", ".toml", ".yml", ".yaml", ".txt", ".sh", ".cfg", ".json", ".jsonl", ".html", ".js", ".css", ""}
BUILT = {"site", "build", "dist", "runs", "__pycache__"}
# Put together here, so that this file does not contain them.
FOREIGN = tuple(first + rest for first, rest in (("/wo", "rk/"), ("/ro", "ot/"), ("../sha", "red"), ("/far", "m/")))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def is_method(path: Path) -> bool:
    """A file of ``methods`` that can be trained by name."""
    return any(isinstance(node, ast.ClassDef) and node.name == "Settings" for node in parsed(path).body)


def own_files() -> Iterator[Path]:
    """Text files of the repository, without hidden folders (an environment, caches) and what is built."""
    for folder, inside, names in os.walk(ROOT):
        inside[:] = sorted(
            name
            for name in inside
            if (not name.startswith(".") or name == ".ci") and name not in BUILT and not name.endswith(".egg-info")
        )
        yield from (path for path in (Path(folder, name) for name in sorted(names)) if path.suffix in TEXT)


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_library_files_are_short(path: Path) -> None:
    assert lines_of(path) <= LIBRARY_LINES


@pytest.mark.parametrize("path", METHODS, ids=name_of)
def test_method_files_are_shorter(path: Path) -> None:
    assert lines_of(path) <= METHOD_LINES


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_modules_say_what_they_are(path: Path) -> None:
    docstring = ast.get_docstring(parsed(path))
    assert docstring, f"{name_of(path)} has no docstring"
    assert len(docstring) >= 20, f"{name_of(path)} says only {docstring!r}"


def test_methods_name_their_paper() -> None:
    silent = [name_of(p) for p in METHODS if is_method(p) and not PAPER.search(ast.get_docstring(parsed(p)) or "")]
    assert not silent, f"no paper and year in the docstrings of {silent}"


def test_methods_load_no_model_library_and_no_tracker() -> None:
    """One process for all of them; the first that loads one is named."""
    modules = [f"tropism.methods.{path.stem}" for path in METHODS]
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        f"    loaded = [heavy for heavy in {HEAVY!r} if heavy in sys.modules]\n"
        "    assert not loaded, f'import {name} loads {loaded}'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr.strip().splitlines()[-1]


def test_importing_the_package_is_light() -> None:
    code = "import sys, tropism; print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_version_is_written_once() -> None:
    from tropism import __version__

    assert tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"] == __version__


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    found = []
    for path in own_files():
        text = path.read_text(encoding="utf-8", errors="replace")
        found += [f"{name_of(path)} has {word}" for word in FOREIGN if word in text]
    assert not found, found


def test_every_method_has_a_page() -> None:
    documented = {path.stem for path in (ROOT / "docs" / "methods").glob("*.md")}
    methods = {path.stem for path in METHODS if is_method(path)}
    assert methods <= documented, f"docs/methods has no page for {sorted(methods - documented)}"


@pytest.mark.parametrize("path", METHODS, ids=name_of)
def test_every_setting_is_explained(path: Path) -> None:
    """On the method's own page; those that methods share, on some page."""
    pages = (ROOT / "docs" / "methods").glob("*.md" if not is_method(path) else f"{path.stem}.md")
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    classes = [node for node in parsed(path).body if isinstance(node, ast.ClassDef) and node.name.endswith("Settings")]
    fields = [
        ast.unparse(node.target)
        for each in classes
        for node in each.body
        if isinstance(node, ast.AnnAssign) and not ast.unparse(node.annotation).startswith("ClassVar")
    ]
    assert not [name for name in fields if f"`{name}`" not in text]


@pytest.mark.parametrize("page", [page for page in PAGES if PYTHON.search(page.read_text())], ids=name_of)
def test_documented_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All python blocks of a page, one after another, as one file, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "documented.py"
    file.write_text("\n".join(PYTHON.findall(page.read_text(encoding="utf-8"))), encoding="utf-8")
    found = runpy.run_path(str(file), run_name="documented")
    if page.stem == "index":
        assert found["after"] > found["before"] + 0.2
