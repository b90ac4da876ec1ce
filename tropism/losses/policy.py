"""Policy-gradient losses and KL estimates: unreduced, one shape in and the same shape out, no broadcasting.

The cells of a chain, the hops of a consistency model and the tokens of a completion are all the same to these
functions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tropism.losses.reduce import same_shape

_LARGEST = 20.0  # log-ratios above it count as it, so that exp and its gradient stay finite


def clipped(log_ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A) with r = exp(log_ratio): PPO (1707.06347, eq. 7), to be minimised.

    log_ratio (any shape) of the current to the acting policy, advantage the same shape, 0 <= low <= 1, high >= 0. DDPO,
    RLCM and Flow-GRPO take low = high = 1e-4 on log-probabilities that are means over dimensions. Above 20 a log-ratio
    counts as 20 and passes no gradient. Raises ValueError on unequal shapes and on bounds out of range.
    """
    same_shape(log_ratio=log_ratio, advantage=advantage)
    if not (0 <= low <= 1 and high >= 0):
        raise ValueError(
            f"the ratio is clipped to [1 - low, 1 + high]: wanted 0 <= low <= 1, high >= 0; got {low}, {high}"
        )
    ratio = log_ratio.clamp(max=_LARGEST).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def score_function(log_prob: Tensor, advantage: Tensor) -> Tensor:
    """-A log p, REINFORCE's surrogate (DDPO-SF of 2305.13301); both of any one shape. Raises ValueError otherwise."""
    same_shape(log_prob=log_prob, advantage=advantage)
    return -advantage * log_prob


def k1(log_prob: Tensor, reference: Tensor) -> Tensor:
    """log p - log q at x ~ p: the unbiased, high-variance estimate of KL(p || q); may be negative.

    The names k1, k2 and k3 are Schulman's (2020, "Approximating KL divergence"). Both arguments have one shape.
    """
    same_shape(log_prob=log_prob, reference=reference)
    return log_prob - reference


def k2(log_prob: Tensor, reference: Tensor) -> Tensor:
    """(log p - log q)^2 / 2 at x ~ p: biased in value; its gradient at p = the current policy is that of KL(p || q)."""
    same_shape(log_prob=log_prob, reference=reference)
    return (log_prob - reference) ** 2 / 2


def k3(log_prob: Tensor, reference: Tensor) -> Tensor:
    """q / p - 1 - log(q / p) at x ~ p: unbiased in value, never negative (GRPO's estimate, 2402.03300, eq. 4)."""
    same_shape(log_prob=log_prob, reference=reference)
    log_ratio = (reference - log_prob).clamp(max=_LARGEST)
    return log_ratio.exp() - 1 - log_ratio
