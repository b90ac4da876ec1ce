"""Tokens as points: what is known of a token of a codebook when only a noisy point of it is seen.

A position's law is p over V codes c_j in R^d, and its path is x_t = (1 - t) c + t e with e ~ N(0, I), t from 1 (noise)
to 0 (a code). The law of x_t is a mixture of V Gaussians, so that its posterior mean, its score and its flow are known
in closed form (Distilled Decoding 1, 2412.17153, section 3.2; Distilled Decoding 2, 2510.21003, section 3.1).
"""

from __future__ import annotations

import torch
from torch import Tensor


def posterior_mean(x: Tensor, t: Tensor, log_p: Tensor, codes: Tensor) -> Tensor:
    """E[c | x_t = x], (..., d): x (..., d), t (...) in (0, 1], log_p (..., V) need not be normalised, codes (V, d).

    The weights are softmax(log p_j - |x - (1 - t) c_j|^2 / (2 t^2)). Of the square only what depends on j is computed.
    """
    near = 1 - t[..., None]
    cross = near * (x @ codes.T) - near.square() * codes.square().sum(-1) / 2
    weights = (log_p + cross / t[..., None].square()).softmax(-1)
    return weights @ codes


def score(x: Tensor, t: Tensor, log_p: Tensor, codes: Tensor) -> Tensor:
    """The gradient of log p_t at x, (..., d): -(x - (1 - t) m) / t^2 with m the posterior mean."""
    t = t[..., None]
    return -(x - (1 - t) * posterior_mean(x, t[..., 0], log_p, codes)) / t.square()


def flow_to_code(noise: Tensor, log_p: Tensor, codes: Tensor, steps: int = 20) -> Tensor:
    """The code at which the flow from ``noise`` (N, d) ends, as an index (N,): over noises its law is p.

    The velocity is E[e - c | x_t] = (x - m) / t (2412.17153, eq. 5), walked in ``steps`` even steps of Heun's method;
    the last of them shows the code that is nearest to the posterior mean. Raises ValueError for less than two steps.
    """
    if steps < 2:
        raise ValueError(f"steps is {steps}; wanted at least 2 to walk from noise to a code")
    times = torch.linspace(1, 0, steps + 1, dtype=noise.dtype, device=noise.device)
    x, now = noise, times[0].expand(len(noise))
    for after in times[1:-1]:
        ahead, then = posterior_mean(x, now, log_p, codes), after.expand(len(noise))
        velocity = (x - ahead) / now[:, None]
        guess = x + (after - now)[:, None] * velocity
        there = (guess - posterior_mean(guess, then, log_p, codes)) / after
        x, now = x + (after - now)[:, None] * (velocity + there) / 2, then
    return nearest(posterior_mean(x, now, log_p, codes), codes)


def nearest(x: Tensor, codes: Tensor) -> Tensor:
    """(...) the index of the code nearest to each point (..., d)."""
    codes = codes.to(x)
    return (x @ codes.T - codes.square().sum(-1) / 2).argmax(-1)
