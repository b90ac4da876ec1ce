"""What decides the scores of a reward, as a short hash: the key of caches, and how a client sees that a server changed.

It covers what the reward is called, the release of tropism, the file that the reward's code is in, and the files it was
loaded from. It does not cover modules that this file imports, weights that are named but not local, or other packages.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tropism import __version__

DIGITS = 16


def version_of(text: str, code: Path | None, weights: Path | None = None) -> str:
    """16 hexadecimal digits for a reward that is called ``text``; ``weights`` may be a file or a folder."""
    found = hashlib.sha256()
    for part in (text.encode("utf-8", "replace"), __version__.encode(), *_contents(code), *_contents(weights)):
        found.update(hashlib.sha256(part).digest())
    return found.hexdigest()[:DIGITS]


def code_of(thing: Any) -> Path | None:
    """The file that defines a function, or the class of anything else, where there is one."""
    owner = thing if isinstance(thing, type) or hasattr(thing, "__code__") else type(thing)
    file = getattr(sys.modules.get(getattr(owner, "__module__", "")), "__file__", None)
    return Path(file) if file else None


def _contents(place: Path | None) -> Iterable[bytes]:
    """Names and hashes of the files, in order."""
    if place is None or not place.exists():
        return
    for file in [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file()):
        if "__pycache__" not in file.parts:
            yield b"" if place.is_file() else file.relative_to(place).as_posix().encode()
            with file.open("rb") as content:
                yield hashlib.file_digest(content, "sha256").digest()
