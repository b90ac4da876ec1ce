"""Pictures that belong to prompts: files named by a column ``image``; or by two, and a label of which is preferred.

The columns of pairs are Pick-a-Pic's, which diffusers' training scripts for preferences read as well: ``jpg_0``,
``jpg_1`` and ``label_0``, 1 where the first is preferred and 0 where the second is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

COLUMN = "image"
PAIR, LABEL = ("jpg_0", "jpg_1"), "label_0"


def check_files(paths: Sequence[str], column: str = COLUMN) -> None:
    """Raises ValueError for the first path that is no file or no picture, and for pictures of different sizes; only
    their headers are read."""
    seen: dict[tuple[int, int], str] = {}
    for path in dict.fromkeys(paths):
        if not Path(str(path)).expanduser().is_file():
            raise ValueError(f"the column {column} names {path!r}, which is no file; wanted the path of a picture")
        with _opened(str(path)) as image:
            seen.setdefault(image.size, str(path))
    if len(seen) > 1:
        (one, first), (other, second) = list(seen.items())[:2]
        raise ValueError(
            f"{first} is {one[0]} x {one[1]} pixels and {second} {other[0]} x {other[1]}; wanted pictures of one size"
        )


def check_pairs(columns: Mapping[str, Sequence[Any]]) -> None:
    """Raises ValueError for a column that is missing, a path that is no file, a label that is neither 0 nor 1."""
    for name in (*PAIR, LABEL):
        if name not in columns:
            raise ValueError(f"there is no column {name}; wanted {', '.join(PAIR)} (paths of pictures) and {LABEL}")
    for label in columns[LABEL]:
        if isinstance(label, bool) or label not in (0, 1):
            tie = "; leave ties out" if label == 0.5 else ""
            wanted = f"wanted 1 where {PAIR[0]} is preferred and 0 where {PAIR[1]} is{tie}"
            raise ValueError(f"the column {LABEL} says {label!r}; {wanted}")
    for name in PAIR:
        check_files(columns[name], name)


def read_pairs(columns: Mapping[str, Sequence[Any]]) -> Tensor:
    """(B, 2, 3, H, W), the preferred first. As ``read_images``."""
    first, second, labels = (columns[name] for name in (*PAIR, LABEL))
    rows = [(a, b) if label else (b, a) for a, b, label in zip(first, second, labels, strict=True)]
    found = read_images([str(path) for row in rows for path in row])
    return found.reshape(-1, 2, *found.shape[1:])


def read_images(paths: Sequence[str]) -> Tensor:
    """(B, 3, H, W) in [0, 1], float32. Raises ValueError for a file that is no picture, and for different sizes."""
    found = [_read(path) for path in paths]
    sizes = {tuple(each.shape[1:]) for each in found}
    if len(sizes) > 1:
        raise ValueError(f"the pictures of a batch are of {sorted(sizes)} pixels; wanted one size")
    return torch.stack(found)


def _read(path: str) -> Tensor:
    with _opened(path) as image:
        pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)


@contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    """The picture, while it is read. Raises ValueError for what is none."""
    try:
        with Image.open(Path(path).expanduser()) as image:
            yield image
    except OSError as error:  # what PIL raises for a file that it does not know is one
        raise ValueError(f"{path} is not a picture that can be read ({error}); wanted a PNG or JPEG") from error
