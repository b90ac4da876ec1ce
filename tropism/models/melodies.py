"""Spectrograms from prompts of notes: a small transformer over frames whose noise has the mean that the score suggests.

After CoMoSpeech (2305.06908): a table, the encoder, says how a voice (a pitch on an instrument, soft or loud) sounds on
average. Laid along the score it is the mean of the noise, and the decoder is shown it too. What the table cannot say,
attacks, decays, gaps, tuning, is the decoder's. The world of prompts is handed in, as the ``catalog`` does.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tropism.base import Cond, Denoiser, Hops, Prediction, Schedule, bcast
from tropism.denoisers import MASK, MEAN, ConsistencyDenoiser, Preconditioned, Shifted, consistent
from tropism.models.own import OwnModel
from tropism.schedules import EDM

SCALE = 3.5  # brings values in [0, 1], most of them 0, to a root mean square of 0.5
SIGMA_DATA, FLOOR = 0.5, 0.002
ZOOM = 3  # pixels of a value
TABLE, WEIGHTS_FILE = "encoder.table", "melodies.safetensors"


class Score(Protocol):
    """What a prompt says of each of F frames."""

    @property
    def voices(self) -> NDArray[np.int64]: ...

    @property
    def begins(self) -> NDArray[np.bool_]: ...

    @property
    def ends(self) -> NDArray[np.bool_]: ...

    @property
    def mask(self) -> NDArray[np.bool_]: ...


Read = Callable[[str], Score]


class Block(nn.Module):
    """Attention over frames and a feed-forward layer, each scaled and shifted by the time (2212.09748)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.told = nn.Linear(width, 6 * width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        nn.init.zeros_(self.told.weight)
        nn.init.zeros_(self.told.bias)

    def forward(self, h: Tensor, time: Tensor, seen: Tensor) -> Tensor:
        """h (B, F, W), time (B, W), seen (B, 1, 1, F) bool: frames that may be attended to."""
        a, b, c, d, e, f = self.told(time)[:, None].chunk(6, dim=2)
        normed = nn.functional.layer_norm(h, h.shape[-1:]) * (1 + a) + b
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(normed).chunk(3, dim=2))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        h = h + c * self.out(mixed.transpose(1, 2).flatten(2))
        normed = nn.functional.layer_norm(h, h.shape[-1:]) * (1 + d) + e
        return h + f * self.down(nn.functional.silu(self.up(normed)))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """x (B, 1, bins, F) and time (B,) -> (B, 1, bins, F); frames behind the mask are neither read nor written."""

    def __init__(self, bins: int, frames: int, width: int = 128, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.register_buffer("speeds", torch.logspace(0, math.log10(16.0), 8), persistent=False)
        self.first = nn.Linear(2 * bins + 2, width)
        self.places = nn.Parameter(0.02 * torch.randn(frames, width))
        self.time = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.last = nn.Linear(width, bins)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, tau: Tensor, noise_mean: Tensor, marks: Tensor, mask: Tensor) -> Tensor:
        """``noise_mean`` as x; ``marks`` (B, 1, 2, F), where notes begin and end, and ``mask`` (B, 1, 1, F) are 0
        and 1; tau is ln(level) / 4."""
        mask = mask.to(x)
        shown = torch.cat([x * mask, noise_mean.to(x), marks.to(x)], dim=2)[:, 0].transpose(1, 2)
        speeds: Tensor = self.speeds  # type: ignore[assignment]
        angle = tau.float().clamp(min=-4.0)[:, None] * speeds  # below level 1e-7 the answer is not used
        time = self.time(torch.cat([angle.sin(), angle.cos()], dim=1).to(x))
        h = self.first(shown) + self.places
        for block in self.blocks:
            h = block(h, time, mask > 0)
        return self.last(nn.functional.layer_norm(h, h.shape[-1:])).transpose(1, 2)[:, None] * mask  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False)
class Padded:
    """A denoiser for which frames behind cond[MASK] are silent: it sees nothing there, and says x0 = 0."""

    inner: Denoiser

    @property
    def schedule(self) -> Schedule:
        """The inner denoiser's."""
        return self.inner.schedule

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        """x (B, 1, bins, F), t (B,)."""
        x, mask = x.float(), cond[MASK].float()
        x0 = self.inner(x * mask, t, cond).x0 * mask
        return consistent(x0, x, bcast(self.schedule.alpha(t), x), bcast(self.schedule.sigma(t), x))


def encoder(table: Tensor, read: Read) -> Callable[[list[str]], dict[str, Tensor]]:
    """Prompts -> their rows of cond; table (voices, bins) in the units of x, of which the last is silence."""

    def encode(prompts: list[str]) -> dict[str, Tensor]:
        scores = [read(prompt) for prompt in prompts]
        voices = torch.from_numpy(np.stack([score.voices for score in scores]))
        marks = torch.from_numpy(np.stack([[score.begins, score.ends] for score in scores])).float()
        mask = torch.from_numpy(np.stack([score.mask for score in scores])).float()
        return {MEAN: table[voices].transpose(1, 2)[:, None], "marks": marks[:, None], MASK: mask[:, None, None]}

    return encode


class Melodies(OwnModel):
    """One x is (1, bins, F), ``SCALE`` times a spectrogram with values in [0, 1]; pictures are grey, low notes at the
    bottom, ``ZOOM`` pixels a value.

    The path is variance exploding (``EDM``, divided so that chains start at unit noise), with the preconditioning of
    2206.00364 and the boundary of consistency models in the teacher already, so that the student starts from it.
    ``shifted`` False leaves the noise without a mean; the decoder is still shown it.
    """

    def __init__(self, network: nn.Module, table: Tensor, read: Read, *, shifted: bool = True) -> None:
        self.table = table
        frames = len(read("").mask)
        super().__init__(
            network,
            encoder(table, read),
            _pictures,
            (1, table.shape[1], frames),
            schedule=EDM(variance_preserving=True),
            grid=karras_grid,
            steps=50,
            latents=_values,
        )
        inner = Padded(Preconditioned(self.net, self._schedule, SIGMA_DATA, FLOOR))
        self.denoiser = Shifted(inner) if shifted else inner

    def _few_step_view(self, hops: Hops, steps: int) -> Self:
        view = copy.copy(self)
        if hops == "consistency":
            view.denoiser = ConsistencyDenoiser(view.denoiser, None)  # the boundary holds already
        return view


def karras_grid(steps: int) -> Tensor:
    """(steps + 1,) times: ``steps`` levels from 80 towards 0.002, rho 7 (2206.00364, eq. 5), then 0."""
    times = torch.linspace(1.0, float(EDM().time(torch.tensor(FLOOR))), steps + 1)
    times[-1] = 0.0
    return times


def _pictures(x: Tensor) -> Tensor:
    """(B, 1, bins, F) -> (B, 3, bins * ZOOM, F * ZOOM)."""
    large = (x / SCALE).flip(2).repeat_interleave(ZOOM, 2).repeat_interleave(ZOOM, 3)
    return large.expand(-1, 3, -1, -1)


def _values(images: Tensor) -> Tensor:
    """``_pictures`` backwards."""
    return nn.functional.avg_pool2d(images.mean(1, keepdim=True), ZOOM).flip(2) * SCALE


def save_melodies(file: Path, network: nn.Module, table: Tensor) -> None:
    """Decoder and encoder, in half precision."""
    state = {name: value.to(torch.float16).contiguous() for name, value in network.state_dict().items()}
    save_file(state | {TABLE: table.to(torch.float16).contiguous()}, file)


def load_melodies(file: Path, read: Read, **options: Any) -> Melodies:
    """What ``save_melodies`` wrote, as a model. Raises OSError and SafetensorError for a file that cannot be read."""
    state = {name: value.float() for name, value in load_file(file).items()}
    table = state.pop(TABLE)
    depth = sum(name.endswith(".out.weight") for name in state)
    frames, width = state["places"].shape
    network = Decoder(table.shape[1], frames, width, depth)
    network.load_state_dict(state)
    return Melodies(network, table, read, **options)
