"""Perturbing the policy that acts: DiffExp, Efficient Exploration in Reward Fine-tuning (2502.14070, AAAI 2025).

Two knobs: guidance that is low early in the chain and normal later, and random weights on the phrases of a prompt. The
paper publishes neither code nor, in what we could read, the treatment of log-probabilities; here the perturbation is a
part of the condition (per-row tensors in ``cond``), so that the loss evaluates the very policy that acted and the ratio
before the first update is 1. Evaluation uses the default guidance and the prompt as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tropism.base import WORDS, Cond, TextToImage
from tropism.guidance.cfg import Scale, step
from tropism.randomness import row_generators, row_seeds


@dataclass(frozen=True)
class Exploration:
    """Of every row, with ``probability``: guidance ``low`` while t > ``until`` (None leaves guidance alone), and phrase
    weights uniform in ``phrase_weights`` ((1, 1) leaves prompts alone), drawn once and held for the whole chain."""

    low: float | None = 1.0
    until: float = 0.2
    phrase_weights: tuple[float, float] = (1.0, 1.0)
    probability: float = 1.0

    def __post_init__(self) -> None:
        low, high = self.phrase_weights
        if not (0 <= low <= high and 0 <= self.until <= 1 and 0 <= self.probability <= 1):
            raise ValueError(
                "wanted 0 <= phrase_weights[0] <= phrase_weights[1] and until and probability in [0, 1]; got "
                f"{self.phrase_weights}, {self.until} and {self.probability}"
            )

    def guidance(self, default: float) -> float | Scale:
        """The policy's guidance: ``default``, lowered early in the rows that are perturbed."""
        return default if self.low is None else step(default, default, self.until)

    def __call__(
        self, model: TextToImage, prompts: Sequence[str], cond: Cond, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """cond (B rows) of ``prompts`` -> the perturbed rows."""
        count = len(prompts)
        device = next(iter(cond.values())).device
        own = row_generators(row_seeds(count, generator))
        chosen = (torch.cat([torch.rand(1, generator=each) for each in own]) < self.probability).to(device)
        perturbed = dict(cond)
        if self.low is not None:
            perturbed["guidance_low"] = torch.full((count,), self.low, device=device).where(chosen, math.nan)
        if self.phrase_weights != (1.0, 1.0):
            perturbed[WORDS] = self._reweighted(model, prompts, cond, chosen, own)
        return perturbed

    def _reweighted(
        self, model: TextToImage, prompts: Sequence[str], cond: Cond, chosen: Tensor, own: Sequence[torch.Generator]
    ) -> Tensor:
        """z' = z_null + w (z - z_null) for the tokens of each phrase, w one draw a phrase; other tokens stay as they
        are."""
        embeds = cond[WORDS]
        phrase = model.phrases(prompts).to(embeds.device)
        low, high = self.phrase_weights
        count = int(phrase.max()) + 1
        draws = torch.stack([low + (high - low) * torch.rand(count, generator=each) for each in own]).to(embeds)
        null, weight = model.null()[WORDS].to(embeds), draws.gather(1, phrase.clamp(min=0))
        touched = ((phrase >= 0) & chosen[:, None])[..., None]
        return (null + weight[..., None] * (embeds - null)).where(touched, embeds)
