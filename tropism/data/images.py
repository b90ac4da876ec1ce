"""Pictures that belong to prompts: files named by a column ``image``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

COLUMN = "image"


def check_files(paths: Sequence[str]) -> None:
    """Raises ValueError, naming it, for the first path that is no file."""
    for path in paths:
        if not Path(str(path)).expanduser().is_file():
            raise ValueError(f"the column {COLUMN} names {path!r}, which is no file; wanted the path of a picture")


def read_images(paths: Sequence[str]) -> Tensor:
    """(B, 3, H, W) in [0, 1], float32. Raises ValueError for a file that is no picture, and for different sizes."""
    found = [_read(path) for path in paths]
    sizes = {tuple(each.shape[1:]) for each in found}
    if len(sizes) > 1:
        raise ValueError(f"the pictures of a batch are of {sorted(sizes)} pixels; wanted one size")
    return torch.stack(found)


def _read(path: str) -> Tensor:
    try:
        with Image.open(Path(path).expanduser()) as image:
            pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"{path} is not a picture that can be read ({error}); wanted a PNG or JPEG") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)
