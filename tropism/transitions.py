"""The laws of a next state, as values: Gaussian for diffusion steps, Categorical for token chains.

Log-probabilities are exact, float32 whatever the inputs' dtype, in nats, and *summed* over event dimensions. A method
whose authors average over dimensions (DDPO, Flow-GRPO, DanceGRPO, RLCM) divides by ``event_size`` itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tropism.base import bcast
from tropism.codebook import nearest
from tropism.randomness import Randomness, exponential, normal


def _event_sum(value: Tensor) -> Tensor:
    """(B, ...) -> (B,)."""
    return value.flatten(1).sum(1) if value.ndim > 1 else value


def _same_shape(x: Tensor, wanted: torch.Size) -> None:
    if x.shape != wanted:
        raise ValueError(f"x has shape {tuple(x.shape)}, this law has {tuple(wanted)}; pass one state per row")


@dataclass(frozen=True, eq=False)
class Gaussian:
    """N(mean, std^2), independent over entries.

    mean (B, ...); std >= 0, either (B,), one number per row, or as many dimensions as mean and broadcastable to it with
    B rows. A row whose std has a zero has no density: ``is_random`` is False and its log-probability is 0. Raises
    ValueError on shapes that would broadcast otherwise.
    """

    mean: Tensor
    std: Tensor

    def __post_init__(self) -> None:
        mean, std = self.mean.shape, self.std.shape
        per_row = len(std) == 1 and std[:1] == mean[:1]
        spread = (
            len(std) == len(mean) and std[:1] == mean[:1] and all(a in (1, b) for a, b in zip(std, mean, strict=True))
        )
        if not per_row and not spread:
            raise ValueError(
                f"std {tuple(std)} does not fit mean {tuple(mean)}; wanted (B,) or one of 1 and D per dimension"
            )

    @cached_property
    def _std(self) -> Tensor:
        std = self.std.float()
        return bcast(std, self.mean) if std.ndim == 1 else std

    @property
    def mode(self) -> Tensor:
        """(B, ...) the mean."""
        return self.mean

    @property
    def is_random(self) -> Tensor:
        """(B,) bool."""
        return (self._std > 0).flatten(1).all(1) if self._std.ndim > 1 else self._std > 0

    @property
    def event_size(self) -> int:
        """The number of dimensions that a log-probability sums over."""
        return math.prod(self.mean.shape[1:])

    def sample(self, generator: Randomness = None) -> Tensor:
        """(B, ...) mean + std * noise, differentiable in both; exactly the mean where std is 0."""
        return self.mean + self._std * normal(self.mean.shape, generator, self.mean.device)

    def log_prob(self, x: Tensor) -> Tensor:
        """(B, ...) -> (B,) float32; 0 (and no gradient) for rows that are not random."""
        _same_shape(x, self.mean.shape)
        random = self.is_random
        std = self._std.where(bcast(random, self._std), 1.0)
        z = (x.float() - self.mean.float()) / std
        terms = -0.5 * z**2 - std.log() - 0.5 * math.log(2 * math.pi)
        return _event_sum(terms).where(random, 0.0)

    def kl(self, other: Gaussian) -> Tensor:
        """KL(self || other), (B,) float32. Two rows without density give 0, one of them inf."""
        _same_shape(other.mean, self.mean.shape)
        here, there = self.is_random, other.is_random
        both = here & there
        p, q = (law._std.where(bcast(both, law._std), 1.0) for law in (self, other))
        shift = (self.mean.float() - other.mean.float()) / q
        terms = (p / q) ** 2 / 2 - 0.5 + shift**2 / 2 - (p / q).log()
        singular = torch.zeros_like(both, dtype=torch.float32).masked_fill(here != there, math.inf)
        return _event_sum(terms.expand(self.mean.shape)).where(both, singular)


def as_gaussian(law: object, kernel: object, can: str) -> Gaussian:
    """``law``, which came from ``kernel``. Raises TypeError for one that is not Gaussian: what it cannot do."""
    if not isinstance(law, Gaussian):
        raise TypeError(f"only a Gaussian law can {can}; {type(kernel).__name__} returns {type(law).__name__}")
    return law


@dataclass(frozen=True, eq=False)
class Categorical:
    """One of V symbols per event entry: logits (B, ..., V), unnormalised, -inf for a forbidden symbol."""

    logits: Tensor

    def __post_init__(self) -> None:
        if self.logits.ndim < 2:
            raise ValueError(f"logits have shape {tuple(self.logits.shape)}; wanted (B, ..., V)")

    @cached_property
    def log_probs(self) -> Tensor:
        """(B, ..., V) float32, normalised."""
        return self.logits.float().log_softmax(-1)

    @property
    def mode(self) -> Tensor:
        """(B, ...) int64, the likeliest symbols."""
        return self.logits.argmax(-1)

    @property
    def is_random(self) -> Tensor:
        """(B,) True: a categorical law always has a probability, even when it is 1."""
        return torch.ones(self.logits.shape[0], dtype=torch.bool, device=self.logits.device)

    @property
    def event_size(self) -> int:
        """The number of symbols that a log-probability sums over."""
        return math.prod(self.logits.shape[1:-1])

    def sample(self, generator: Randomness = None) -> Tensor:
        """(B, ...) int64."""
        probs, device = self.log_probs.exp(), self.logits.device
        if generator is None or isinstance(generator, torch.Generator):
            home = device if generator is None else generator.device
            drawn = torch.multinomial(probs.flatten(0, -2).to(home), 1, generator=generator).to(device)
            return drawn.reshape(self.logits.shape[:-1])
        if probs.isnan().any():
            raise ValueError(f"logits {tuple(probs.shape)} have no law somewhere: NaN, or every symbol forbidden")
        return (probs / exponential(probs.shape, generator).to(device)).argmax(-1)  # as torch.multinomial, row by row

    def log_prob(self, x: Tensor) -> Tensor:
        """(B, ...) int64 symbols -> (B,) float32."""
        _same_shape(x, self.logits.shape[:-1])
        return _event_sum(self.log_probs.gather(-1, x.long()[..., None])[..., 0])

    def kl(self, other: Categorical) -> Tensor:
        """KL(self || other), (B,) float32; inf where self allows a symbol that other forbids."""
        _same_shape(other.logits, self.logits.shape)
        p, gap = self.log_probs.exp(), self.log_probs - other.log_probs
        return _event_sum((p * gap.where(p > 0, 0.0)).sum(-1))


@dataclass(frozen=True, eq=False)
class Filled:
    """x (B, L, d) with one position a row, ``place`` (B,), filled by a code (V, d) whose index has ``law`` (V symbols).

    A state is read at that place as the code it is nearest to; all other places are as in x.
    """

    x: Tensor
    place: Tensor
    law: Categorical
    codes: Tensor

    def _with(self, symbols: Tensor) -> Tensor:
        filled = self.x.float().clone()
        filled[torch.arange(len(filled), device=filled.device), self.place] = self.codes[symbols].to(filled)
        return filled

    @property
    def mode(self) -> Tensor:
        """(B, L, d) with the likeliest code."""
        return self._with(self.law.mode)

    @property
    def is_random(self) -> Tensor:
        """(B,) True."""
        return self.law.is_random

    @property
    def event_size(self) -> int:
        """1: one symbol."""
        return self.law.event_size

    def sample(self, generator: Randomness = None) -> Tensor:
        """(B, L, d)."""
        return self._with(self.law.sample(generator))

    def log_prob(self, x: Tensor) -> Tensor:
        """(B, L, d) -> (B,) float32, of the code at the place."""
        _same_shape(x, self.x.shape)
        here = x[torch.arange(len(x), device=x.device), self.place]
        return self.law.log_prob(nearest(here, self.codes.to(here)))

    def kl(self, other: Filled) -> Tensor:
        """KL(self || other), (B,) float32, for the same places."""
        return self.law.kl(other.law)
