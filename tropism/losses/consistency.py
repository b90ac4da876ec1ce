"""How far two answers of a consistency model are apart: (N, ...) and (N, ...) -> (N,), float32.

Vector distances have a threshold ``c`` in the units of the vector's norm, so it goes with the square root of the number
of dimensions D: what a paper gives for D_0 dimensions is c sqrt(D / D_0) here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Distance = Callable[[Tensor, Tensor], Tensor]
"""distance(said (N, ...), wanted (N, ...)) -> (N,) >= 0, smooth where the two are equal."""


def _gap(said: Tensor, wanted: Tensor) -> Tensor:
    """(N, D) by how much they differ."""
    if said.shape != wanted.shape:
        raise ValueError(f"answers of {tuple(said.shape)} and {tuple(wanted.shape)} must have the same shape")
    return (said.float() - wanted.float()).flatten(1)


def _squared(said: Tensor, wanted: Tensor) -> Tensor:
    """(N,) squared Euclidean distances."""
    return _gap(said, wanted).square().sum(1)


@dataclass(frozen=True)
class MeanSquare:
    """The mean over dimensions of the squared difference (2303.01469 and 2310.04378 call it l2)."""

    def __call__(self, said: Tensor, wanted: Tensor) -> Tensor:
        """(N, ...) twice -> (N,)."""
        return _squared(said, wanted) / said[0].numel()


@dataclass(frozen=True)
class SquaredNorm:
    """The squared Euclidean distance, for what is scaled already, as features are (``distillation.features``)."""

    def __call__(self, said: Tensor, wanted: Tensor) -> Tensor:
        """(N, ...) twice -> (N,)."""
        return _squared(said, wanted)


@dataclass(frozen=True)
class Huber:
    """The mean over dimensions of sqrt(d^2 + c^2) - c: the element-wise form that released LCM training code uses
    (diffusers' ``train_lcm_distill_*``). ``c`` is in the units of one dimension."""

    c: float = 0.001

    def __call__(self, said: Tensor, wanted: Tensor) -> Tensor:
        """(N, ...) twice -> (N,)."""
        return ((_gap(said, wanted).square() + self.c**2).sqrt() - self.c).mean(1)


@dataclass(frozen=True)
class PseudoHuber:
    """sqrt(|d|^2 + c^2) - c of the whole vector (2310.14189, eq. 7); 0.00054 sqrt(D) unless ``c`` is given.

    Departure from Kinyugo/consistency_models: theirs is element-wise, which changes what c means.
    """

    c: float | None = None

    def __call__(self, said: Tensor, wanted: Tensor) -> Tensor:
        """(N, ...) twice -> (N,)."""
        c = 0.00054 * said[0].numel() ** 0.5 if self.c is None else self.c
        return (_squared(said, wanted) + c**2).sqrt() - c


@dataclass(frozen=True)
class Cauchy:
    """log(1 + |d|^2 / (2 c^2)) (2502.01441): its gradient falls to 0 for what is far off, as rare large values are."""

    c: float

    def __call__(self, said: Tensor, wanted: Tensor) -> Tensor:
        """(N, ...) twice -> (N,)."""
        return torch.log1p(_squared(said, wanted) / (2 * self.c**2))


@dataclass(frozen=True)
class Adaptive:
    """|d|^2 / (|d|^2 + c)^power, the denominator held fixed: rows that are far off count for no more than others.

    2505.13447, section 4.3 (from 2406.14548); its gradient is that of log(|d|^2 + c) where ``power`` is 1.
    """

    power: float = 1.0
    c: float = 0.01

    def __call__(self, said: Tensor, wanted: Tensor) -> Tensor:
        """(N, ...) twice -> (N,)."""
        squared = _squared(said, wanted)
        return squared / (squared.detach() + self.c) ** self.power
