"""Guidance of symbols by importance sampling (the discrete half of TFG-Flow: Lin et al. 2025, 2501.14216).

A masked flow reveals each position by itself, with the law p(a_i) that a network says given what is revealed. Towards
p(a) exp(value(a)) the law of a position has to be the marginal of the tilted joint law, which is estimated from K whole
candidates drawn from p: the weights softmax(value) of those that have the symbol there (theorem 3.4). That needs values
only, and K of them whatever the number of symbols. One candidate drawn by the weights stands for all where a continuous
part is guided beside (its algorithm 1): ``RewardGuided`` with the value of that candidate. ``tropism.mixed`` does both.

Departures from linhaowei1/TFG-Flow: times are fractions throughout; weights are taken in logarithms; what is revealed
is never drawn again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from tropism.randomness import Randomness
from tropism.transitions import Categorical

TokenValue = Callable[[Tensor, Tensor], Tensor]
"""value(symbols (N, L), rows (N,) of the batch) -> (N,) nats; NaN is no score."""


class Reweighted(NamedTuple):
    """A law of symbols after guidance."""

    law: Categorical  # (B, L) positions of V symbols
    chosen: Tensor  # (B, L) int64, one candidate by its weight
    effective: Tensor  # (B,) effective number of candidates, 1 / sum of squared weights


def reweighted(law: Categorical, value: TokenValue, count: int, generator: Randomness = None) -> Reweighted:
    """The marginals of law x exp(value), from ``count`` candidates a row; law (B, L) of V symbols.

    Positions that must not change have a law of one symbol. Candidates without a score weigh nothing; a row that has
    none with a score keeps its candidates as they are. Raises ValueError for ``count`` below 1 and for a value that
    does not answer one number a candidate.
    """
    if count < 1:
        raise ValueError(f"count is {count}; wanted 1 candidate or more")
    rows = torch.arange(law.logits.shape[0], device=law.logits.device)
    candidates = Categorical(law.logits[:, None].expand(-1, count, -1, -1)).sample(generator)  # (B, K, L)
    scores = value(candidates.flatten(0, 1), rows.repeat_interleave(count))
    if scores.shape != (len(rows) * count,):
        raise ValueError(f"value answered {tuple(scores.shape)} for {len(rows) * count} candidates; wanted one each")
    scores = scores.reshape(len(rows), count).float()
    scores = scores.where(~scores.isnan(), -math.inf)
    scores = scores.where(scores.isfinite().any(1, keepdim=True), 0.0)
    weights = scores.softmax(1)
    places = candidates.transpose(1, 2)  # (B, L, K)
    shares = torch.zeros_like(law.log_probs).scatter_add(2, places, weights[:, None].expand_as(places).contiguous())
    place = Categorical(scores[:, None]).sample(generator)[:, 0]
    return Reweighted(Categorical(shares.log()), candidates[rows, place], 1 / weights.square().sum(1))


def revealed(law: Categorical, symbols: Tensor, mask: int, share: Tensor) -> Categorical:
    """The law of the next symbols of a masked flow: ``symbols`` (B, L) with ``mask`` = V where nothing is revealed yet,
    each of which is revealed with probability ``share`` (B,), dt / (1 - t), as ``law`` (B, L) of V symbols says."""
    share = share.clamp(0, 1)[:, None, None]
    stay = (1 - share).expand(*symbols.shape, 1)
    opened = torch.cat([share * law.log_probs.exp(), stay], dim=-1)
    known = one_hot(symbols, mask + 1).to(opened)
    return Categorical(opened.where((symbols == mask)[..., None], known).log())
