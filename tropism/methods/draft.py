"""DRaFT: Directly Fine-Tuning Diffusion Models on Differentiable Rewards (Clark et al. 2023, 2309.17400).

AlignProp with another gradient window on a deterministic chain: the last ``k`` moves (DRaFT-K), or the last one with
``repeats`` further gradients from the result noised again (DRaFT-LV). ``kl_weight`` makes it DRaFT+ (NeMo-Aligner).
There is no official code; settings are those of the paper's small runs. DRaFT-LV's gradients are averaged here and
summed in the paper, which AdamW does not notice.
"""

from __future__ import annotations

from dataclasses import dataclass

from tropism.methods import alignprop
from tropism.windows import LastK, LowVariance, Window


@dataclass(frozen=True)
class Settings(alignprop.Settings):
    """Reward gradients through the last K moves of a deterministic chain."""

    learning_rate: float = 4e-4
    weight_decay: float = 0.1
    eta: float = 0.0
    k: int = 1
    """Last moves that carry the gradient."""
    repeats: int = 0
    """DRaFT-LV's extra gradients from re-noised results; needs k 1."""

    def check(self) -> None:
        """As the shared settings; repeats go with k = 1."""
        if self.repeats < 0 or (self.repeats and self.k != 1):
            raise ValueError(f"repeats is {self.repeats} and k {self.k}; wanted 0 or more, and k 1 with repeats")
        super().check()

    def window(self) -> Window:
        """The last moves."""
        return LowVariance(self.repeats) if self.repeats else LastK(self.k)
