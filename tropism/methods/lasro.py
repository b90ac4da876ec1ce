"""LaSRO: latent-space surrogate reward optimisation (Jia, Nan, Zhao and Liu 2025, 2411.15247), for one or two hops.

A model of one hop has no random move to learn from, and one of two has a single one, so policy gradients have little to
say. Here a proxy of the reward is learnt on the latents of the model's own samples (``distillation.proxy``), at first
for some rounds and then once before each batch, and the model climbs the proxy's gradient alone, through its own hops:
``alignprop`` with the proxy where the decoder and the reward would be. The reward may be anything.

Departures from the paper (no code was released): those of the proxy; the latents are those of the current model, where
theirs also come from other samplers (off-policy exploration); the stay near the model before training is AlignProp's
``kl_weight``, where theirs is LCM's loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tropism.base import Prompts, Reward, TextToImage, pick
from tropism.distillation.proxy import Proxy, ProxySettings
from tropism.methods import alignprop
from tropism.methods.alignprop import AlignProp, Draws
from tropism.methods.rlcm import check_hops
from tropism.policy import reward_statistics
from tropism.samplers import Consistency
from tropism.windows import LastK, Window


@dataclass(frozen=True)
class Judged(Draws):
    """Draws whose ``rewards`` are the proxy's; the reward itself has judged other samples of the same model."""

    judged: Mapping[str, float] = field(default_factory=dict)

    @property
    def info(self) -> dict[str, float]:
        """Statistics of the reward, and the proxy's mean of what it was climbed with."""
        return {**self.judged, "proxy_reward": float(self.rewards.nanmean())}


@dataclass(kw_only=True)
class LaSRO(AlignProp):
    """AlignProp on latents: ``proxy`` is climbed, and learns before each batch."""

    proxy: Proxy

    def __post_init__(self) -> None:
        """The reward needs no gradient."""

    def experience(self, batch: Prompts) -> Iterator[Iterator[Draws]]:
        """The proxy learns what the model draws now; then one update. Prompts without a score are left out."""
        table = self.proxy.learn(self.policy, self.reward, batch, self.generator, ends=True)
        judged = reward_statistics(table.reward, table.group) | {"proxy_accuracy": self.proxy.accuracy}
        scored = (~table.reward.isnan()).cpu().nonzero()[:, 0]
        if not len(scored):
            return
        for update in super().experience(pick(batch, scored)):
            yield (Judged(**vars(draws), judged=judged) for draws in update)

    def _scored(self, latents: Tensor, prompts: Prompts) -> Tensor:
        """(N,) what the proxy says."""
        return self.proxy(latents, self.policy.model.encode(prompts.text))


@dataclass(frozen=True)
class Settings(ProxySettings, alignprop.Settings):
    """The gradient of a learnt latent reward, through one or two hops."""

    inference_steps: int = 2
    """Hops of a chain while training; evaluate with as many."""
    images_per_prompt: int = 4
    learning_rate: float = 3e-4
    longest: int | None = None
    """Most hops that carry the gradient; none: all."""

    def check(self) -> None:
        """As the shared settings; samples are compared with others of their prompt."""
        super().check()
        self.check_proxy(self.images_per_prompt)

    def window(self) -> Window:
        """The last hops."""
        return LastK(self.inference_steps if self.longest is None else self.longest)

    def build(self, model: TextToImage, reward: Reward, generator: torch.Generator) -> LaSRO:
        """The method on this model. Raises ValueError for one that does not draw in hops."""
        check_hops(model)
        explore = self.exploration()
        policy = self.policy(model, Consistency(), explore)
        proxy = self.proxy(policy, generator)
        return LaSRO(policy, reward, self.window(), self.minibatch, self.kl_weight, explore, generator, proxy=proxy)
