"""A folder's files with their SHA-256, in the format of ``sha256sum``: whether it is still what was written."""

from __future__ import annotations

import hashlib
from pathlib import Path

NAME = "SHA256SUMS"


def seal(folder: Path) -> None:
    """Writes the sums of all files in a folder and below it."""
    lines = [f"{sha256(file)}  {file.relative_to(folder).as_posix()}\n" for file in _files(folder)]
    (folder / NAME).write_text("".join(lines), encoding="utf-8")


def check_seal(folder: Path) -> None:
    """Raises ValueError for a folder whose files are not those that were sealed."""
    try:
        lines = (folder / NAME).read_text(encoding="utf-8").splitlines()
        wanted = {name: found for found, name in (line.split("  ", 1) for line in lines)}
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is not whole: it has no list of its files ({NAME})") from error
    present = {file.relative_to(folder).as_posix(): file for file in _files(folder)}
    for name, found in wanted.items():
        if name not in present:
            raise ValueError(f"{folder} is not whole: {name} is missing")
        if sha256(present[name]) != found:
            raise ValueError(f"{folder} is not whole: {name} is not what was written")


def sha256(file: Path) -> str:
    """Of a file's bytes, as hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and file != folder / NAME)
