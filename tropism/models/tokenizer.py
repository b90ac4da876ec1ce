"""Pictures as grids of tokens: finite scalar quantisation (2309.15505) of an autoencoder's latents.

A code is a point of a fixed grid in R^d, so that there is no codebook to learn and none that could collapse.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

CONFIG, WEIGHTS = "config.json", "model.safetensors"
EDGE = 1e-3  # by which the outermost levels are within reach of tanh, as in the paper's appendix


def fsq_codes(levels: Sequence[int]) -> Tensor:
    """(V, d) all codes, the last dimension the fastest: level l of L is (l - L // 2) / (L // 2).

    Raises ValueError unless there are two levels or more a dimension.
    """
    if not levels or min(levels) < 2:
        raise ValueError(f"levels are {list(levels)}; wanted at least 2 in each of one or more dimensions")
    axes = [[(level - count // 2) / (count // 2) for level in range(count)] for count in levels]
    return torch.tensor(list(itertools.product(*axes)))


def fsq(z: Tensor, levels: Sequence[int]) -> Tensor:
    """(..., d) -> codes (..., d): bounded by tanh, rounded; the gradient passes as if it were not rounded.

    2309.15505, section 3.1 and its appendix: even numbers of levels are shifted by half a level.
    """
    count = torch.tensor(levels, dtype=z.dtype, device=z.device)
    half = (count - 1) * (1 + EDGE) / 2
    offset = torch.where(count % 2 == 0, 0.5, 0.0).to(z)
    bounded = (z + (offset / half).atanh()).tanh() * half - offset
    return (bounded + (bounded.round() - bounded).detach()) / (count // 2)


class Tokenizer(nn.Module):
    """Latents (B, C, h, w) <-> codes (B, h w, d), in raster order.

    A code is of a cell and its eight neighbours, by three layers; what is decoded of it sees the whole grid, by
    ``layers`` of attention.
    """

    def __init__(
        self,
        channels: int = 8,
        side: int = 8,
        levels: Sequence[int] = (5, 5, 5, 5),
        width: int = 128,
        layers: int = 3,
    ) -> None:
        super().__init__()
        self.config = {
            "channels": channels,
            "side": side,
            "levels": list(levels),
            "width": width,
            "layers": layers,
        }
        self.levels, self.side = tuple(levels), side
        self.register_buffer("codes", fsq_codes(levels), persistent=False)
        self.encoder = nn.Sequential(
            nn.Linear(9 * channels, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, len(levels))
        )
        self.enter = nn.Linear(len(levels), width)
        self.places = nn.Parameter(torch.randn(side * side, width) * 0.02)
        block = nn.TransformerEncoderLayer(
            width, max(1, width // 32), 2 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.decoder = nn.TransformerEncoder(block, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.leave = nn.Linear(width, channels)

    def encode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> codes (B, h w, d), with a gradient. Raises ValueError for another size."""
        wanted = (self.config["channels"], self.side, self.side)
        if tuple(latents.shape[1:]) != wanted:
            raise ValueError(f"latents are {tuple(latents.shape[1:])}; wanted {wanted}: pictures of the model's size")
        patches = nn.functional.unfold(latents, 3, padding=1).transpose(1, 2)
        return fsq(self.encoder(patches).float(), self.levels)

    def decode(self, codes: Tensor) -> Tensor:
        """(B, h w, d) -> latents (B, C, h, w)."""
        hidden = self.decoder(self.enter(codes) + self.places)
        return self.leave(hidden).transpose(1, 2).unflatten(2, (self.side, self.side))  # type: ignore[no-any-return]

    def save(self, folder: Path) -> None:
        """Half precision, safetensors and JSON."""
        save_module(self, self.config, folder)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """What ``save`` wrote, in float32."""
        return load_module(cls, folder)  # type: ignore[no-any-return]


def save_module(module: nn.Module, config: dict[str, Any], folder: Path) -> None:
    """The constructor's arguments as JSON and the weights in half precision."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().half().contiguous() for name, value in module.state_dict().items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")


def load_module(kind: Any, folder: Path) -> Any:
    """``kind(**config)`` with its weights, in float32. Raises ValueError where either file is missing."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"there is no {name} in {folder}; wanted what save wrote")
    made = kind(**json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    made.load_state_dict({name: value.float() for name, value in load_file(folder / WEIGHTS).items()})
    return made


def psnr(one: Tensor, other: Tensor) -> float:
    """Decibels between pictures in [0, 1] of one shape."""
    return -10 * math.log10(float((one - other).square().mean()))
