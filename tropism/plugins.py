"""A function of the user's, by MODULE:FUNCTION; MODULE may be a file: ``my_rewards:sharp``, ``./reward.py:sharp``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tropism.config import BadInput, one_line, suggest


def load_function(module: str, name: str, what: str) -> Callable[..., Any]:
    """The function; a class is called for an instance. Raises BadInput, saying that it is for ``what``."""
    found = _module(module, what)
    if not hasattr(found, name):
        names = [each for each, value in vars(found).items() if callable(value) and not each.startswith("_")]
        raise BadInput(f"{what} is {module}:{name}, but {module} has no {name}; {suggest(name, names)}")
    made = getattr(found, name)
    try:
        made = made() if isinstance(made, type) else made
    except Exception as error:
        raise BadInput(f"{what} is {module}:{name}, but {name}() raised {_named(error)}") from error
    if not callable(made):
        raise BadInput(f"{what} is {module}:{name}, which is of type {type(made).__name__}; wanted a function")
    return made  # type: ignore[no-any-return]


def _module(module: str, what: str) -> Any:
    path = Path(module).expanduser()
    if path.suffix == ".py" and not path.is_file():
        raise BadInput(f"{what} is in {module}, but there is no such file")
    try:
        with _here_importable():
            return _run_file(path) if path.suffix == ".py" else importlib.import_module(module)
    except Exception as error:
        raise BadInput(f"{what} is in {module}, whose import raised {_named(error)}") from error


def _run_file(path: Path) -> Any:
    found = importlib.util.spec_from_file_location(path.stem, path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@contextmanager
def _here_importable() -> Iterator[None]:
    """Inside, modules of the current folder can be imported, as under ``python -m``."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error)}"
