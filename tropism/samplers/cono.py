"""CoNo: a clip that goes on from another by what was said of its noise (Consistency Noise Injection, Wang et
al. 2024, 2406.05082).

Clips of N frames overlap by S: the first S frames of a clip are to be the last S of the clip before it. Three things
hold them together, none of which is trained:

- the noise of a clip is that of the clip before it in the reverse order, but for the S shared frames, which come first
  and in their own order (``extended_noise``): the same set of noises in every clip, and equal ones where they overlap;
- while t >= ``until`` the noise that is believed in the shared frames is replaced by what was believed of them in the
  clip before it, at the same move (``Held``). With equal starts and a kernel without chance, their states are then
  equal as well, to the last bit;
- the means over frames of the believed noise, which stand for the content, are drawn together. The gradient of
  |mean_f eps_2 - mean_f eps_1|^2 in a frame of eps_2 is 2 / N (mean_f eps_2 - mean_f eps_1), so a step of descent
  shifts every frame by ``step`` (mean_f eps_1 - mean_f eps_2), step = 2 delta / N, and at 1 the means are equal.

The authors' repository is empty, so their code could not be compared. Departures: ``step`` is the strength instead of
delta, whose effect depends on the number of frames; more than 1 overshoots and is refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tropism.base import Cond, Denoiser, Kernel, Prediction, Schedule, bcast
from tropism.denoisers import consistent_with
from tropism.randomness import Randomness
from tropism.samplers.chain import Move, check_grid, walk


def extended_noise(noise: Tensor, shared: int, axis: int) -> Tensor:
    """The noise of the next clip from that of a clip, frames along ``axis``: the last ``shared``, then the others from
    the last to the first."""
    frames = noise.shape[axis]
    order = [*range(frames - shared, frames), *range(frames - shared - 1, -1, -1)]
    return frames_of(noise, order, axis)


def regularised(eps: Tensor, content: Tensor, step: float, axis: int) -> Tensor:
    """eps (B, ...) with every frame shifted by ``step`` times the way from its mean over frames to ``content``, a mean
    (1 frame along ``axis``)."""
    return eps + step * (content - eps.mean(axis, keepdim=True))


@dataclass(frozen=True)
class Overlap:
    """What frames ``places`` of a clip are told of the clip before it, or of two neighbours, move by move."""

    places: Sequence[int]
    told: Sequence[Prediction]  # a move each: what was believed of those frames, (B, ...) with len(places) of them
    content: Sequence[Tensor]  # a move each: the mean over frames of the noise believed of the clip before, one frame


def beliefs(moves: Sequence[Move], places: Sequence[int], axis: int) -> list[Prediction]:
    """What was believed of frames ``places`` at every move of a clip."""
    return [Prediction(*(frames_of(half, places, axis) for half in move.prediction)) for move in moves]


def frames_of(clip: Tensor, places: Sequence[int], axis: int) -> Tensor:
    """Frames ``places`` of a clip (B, ...) whose frames are along ``axis``."""
    return clip.index_select(axis, torch.tensor(list(places), device=clip.device))


@dataclass(frozen=True, eq=False)
class Held:
    """A denoiser that believes of frames ``places`` what it is given, and of the others what the inner one does.

    ``content`` (B, ...), one frame, pulls all frames by ``step`` before that. Where alpha is 0 the clean half is left.
    """

    inner: Denoiser
    axis: int
    places: Sequence[int] = ()
    told: Prediction | None = None
    content: Tensor | None = None
    step: float = 0.0

    @property
    def schedule(self) -> Schedule:
        """The inner denoiser's."""
        return self.inner.schedule

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        """x (B, ...), t (B,), cond rows (B, ...)."""
        x0, eps = self.inner(x, t, cond)
        if self.content is not None and self.step:
            eps = regularised(eps, self.content, self.step, self.axis)
            alpha, sigma = bcast(self.schedule.alpha(t), x), bcast(self.schedule.sigma(t), x)
            x0, eps = consistent_with(eps, x, alpha, sigma, x0)
        if self.told is not None:
            places = torch.tensor(list(self.places), device=x.device)
            x0, eps = (
                half.index_copy(self.axis, places, told.to(half))
                for half, told in zip((x0, eps), self.told, strict=True)
            )
        return Prediction(x0, eps)


@dataclass(frozen=True, eq=False)
class Continued:
    """A ``Walk`` that injects: at moves from t >= ``until`` the frames of ``overlap`` are held, and at every move all
    are pulled by ``step`` towards the content of the clip before.

    Above 1 ``until`` holds nothing. Raises ValueError for a step outside [0, 1] and a time below 0. The kernel must ask
    once a move.
    """

    overlap: Overlap
    axis: int
    until: float = 0.2
    step: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.step <= 1 or self.until < 0:
            raise ValueError(f"until is {self.until} and step {self.step}; wanted at least 0, and 0 to 1")

    def __call__(
        self, kernel: Kernel, denoiser: Denoiser, x: Tensor, ts: Tensor, cond: Cond, generator: Randomness = None
    ) -> Iterator[Move]:
        """As ``samplers.walk``. Raises ValueError for another number of moves than was told of."""
        check_grid(ts)
        if len(self.overlap.told) != len(ts) - 1:
            raise ValueError(
                f"this walk has {len(ts) - 1} moves, and the clip before it had {len(self.overlap.told)}; walk one grid"
            )
        for index, pair in enumerate(itertools.pairwise(ts)):
            held = self.overlap.told[index] if float(pair[0]) >= self.until else None
            content = self.overlap.content[index] if self.step else None
            told = Held(denoiser, self.axis, self.overlap.places, held, content, self.step)
            (move,) = walk(kernel, told, x, torch.stack(pair), cond, generator)
            yield move
            x = move.x_next
