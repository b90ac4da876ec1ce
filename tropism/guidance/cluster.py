"""Cluster-conditioned guidance of OneActor (Wang et al. 2024, 2404.10267, equations 6 to 8).

A prompt means a cluster of identities. An offset on the embedding of one of its words means a smaller one: that of the
target, and another offset the mean of its siblings. With the unconditional answer eps_u,

    eps = eps_u + w (eps(c + v target) - eps_u) - exclude (eps(c + others) - eps_u),

at times within [low, high], and plain guidance outside. Written in both halves of a Prediction, which is the same since
the weights of answers sum to 1.

Departure from JoHnneyWang/OneActor: the last term runs; its pipeline reads the weight under another name than its
configuration writes, so that it never does there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tropism.base import WORDS, Cond, Denoiser, Prediction, Schedule, bcast
from tropism.denoisers import untold
from tropism.guidance.cfg import ROW, Guided, network_cond


@dataclass(frozen=True, eq=False)
class Clustered:
    """``target`` and ``others`` (D,) are added to the words at ``places`` (P, L) bool of cond[WORDS] (B, L, D).

    ``likeness`` is v. With ``exclude`` 0 there is no third pass of the network; otherwise ``inner`` must be classifier-
    free guidance: raises ValueError for anything else.
    """

    inner: Denoiser
    target: Tensor
    others: Tensor
    places: Tensor
    likeness: float = 0.8
    exclude: float = 0.0
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if self.exclude and not isinstance(self.inner, Guided):
            raise ValueError(
                f"exclude is {self.exclude}, which changes classifier-free guidance, and there is a "
                f"{type(self.inner).__name__}; put one-actor before other guides, or leave exclude at 0"
            )

    @property
    def schedule(self) -> Schedule:
        """The inner denoiser's."""
        return self.inner.schedule

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        """x (B, ...), t (B,), cond rows with ``ROW`` among P."""
        used = ((t >= self.low) & (t <= self.high)).float()
        told = self._told(cond, self.target, self.likeness * used)
        if not self.exclude or not bool(used.any()):
            return self.inner(x, t, told)
        assert isinstance(self.inner, Guided)
        with_it, null = self.inner.halves(x, t, told)
        guided, net = self.inner.joined(with_it, null, t, told), self.inner.inner
        other = net(x, t, untold(net, network_cond(self._told(cond, self.others, used))))
        weight = bcast(self.exclude * used, x)
        return Prediction(guided.x0 - weight * (other.x0 - null.x0), guided.eps - weight * (other.eps - null.eps))

    def _told(self, cond: Cond, offset: Tensor, weight: Tensor) -> Cond:
        words = cond[WORDS]
        return {**cond, WORDS: moved(words, self.places.to(words.device)[cond[ROW]], offset, weight)}


def moved(words: Tensor, places: Tensor, offset: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """Words (B, L, D) with ``offset`` (D,) or (B, D), times ``weight`` (B,), added at ``places`` (B, L) bool."""
    offset = offset.to(words).expand(len(words), words.shape[2])
    step = offset * (weight[:, None].to(words) if isinstance(weight, Tensor) else weight)
    return words + torch.where(places[..., None], step[:, None], 0.0)
