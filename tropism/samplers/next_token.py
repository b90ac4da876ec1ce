"""Image tokens one by one, and in parts: the states (B, L, d) of a token model, noise where nothing is decided yet.

Time counts tokens: at t the first (1 - t) L positions are decided.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tropism.base import Cond, Denoiser, Prediction
from tropism.transitions import Categorical, Filled, Gaussian


def decided(t: Tensor, length: int) -> Tensor:
    """(B,) how many of ``length`` positions are decided at the times t (B,)."""
    return ((1 - t) * length).round().long()


@dataclass(frozen=True, eq=False)
class NextToken:
    """The next position is filled with a code (V, d), drawn by the logits (B, L, V) that the denoiser believes in."""

    codes: Tensor

    def __call__(self, denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, cond: Cond) -> tuple[Filled, Prediction]:
        """x (B, L, d), t and s (B,) one token apart. Raises ValueError for times that are further apart."""
        place = decided(t, x.shape[1])
        if not bool((decided(s, x.shape[1]) == place + 1).all()):
            raise ValueError(
                f"a move from t = {float(t[0]):g} to {float(s[0]):g} is not one of {x.shape[1]} tokens; "
                f"a token model is drawn with in {x.shape[1]} moves"
            )
        prediction = denoiser(x, t, cond)
        rows = torch.arange(len(x), device=x.device)
        return Filled(x, place, Categorical(prediction.x0[rows, place]), self.codes.to(x)), prediction


@dataclass(frozen=True)
class NextPart:
    """Of a student that says all tokens at once, those up to s are kept; the rest stays noise. Without chance."""

    def __call__(self, denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, cond: Cond) -> tuple[Gaussian, Prediction]:
        """x (B, L, d), t and s (B,) with s < t -> what is kept, and the prediction at (x, t)."""
        prediction = denoiser(x, t, cond)
        kept = torch.arange(x.shape[1], device=x.device) < decided(s, x.shape[1])[:, None]
        return Gaussian(torch.where(kept[..., None], prediction.x0, x), torch.zeros_like(t)), prediction
