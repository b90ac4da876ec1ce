"""RG-LCD: Reward Guided Latent Consistency Distillation (Li, Feng, Chen and Wang 2024, 2403.11027).

LCM's distillation with a reward of the student's own answer in the loss:

    distance(f(x_t), f_target(x_s)) - reward_weight * R(f(x_t), prompt),   f(x_t) the clean sample said in one hop.

R is a latent proxy of the reward (``distillation.proxy``), trained alongside to order what the student says as the
reward does, so that the reward may be anything; or, with ``variant: direct``, the reward of the decoded answer itself,
which then needs a gradient.

Departures from Ji4chenLi/rg-lcd, besides those of ``lcm`` and of the proxy: the proxy learns once before each batch of
chains, ``proxy_steps`` steps, where theirs takes one step after each of the student's; so the reward is asked for
``student_steps`` answers a chain and not for every row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from tropism.ascent import no_gradient, rewarded
from tropism.base import Distillable, Prompts, Reward
from tropism.distillation import Distillation, Pairs, Pictures
from tropism.distillation.proxy import Proxy, ProxySettings
from tropism.methods import lcm
from tropism.policy import reward_statistics

WHO, INSTEAD = "rg-lcd with variant direct", "use variant proxy, which needs only its values"


@dataclass(frozen=True)
class Praise:
    """The term: minus ``weight`` times the reward of what the student says; by ``proxy``, if there is one.

    Answers without a score are left out. Raises NoGradient when it is to follow a reward that declares no gradient, or
    returns none.
    """

    reward: Reward
    weight: float
    proxy: Proxy | None = None

    def __post_init__(self) -> None:
        if self.proxy is None and not self.reward.differentiable:
            raise no_gradient(self.reward, WHO, INSTEAD)

    def __call__(self, recipe: Distillation, pairs: Pairs, said: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """said (N, ...) clean latents -> (the sum to be added (), metrics)."""
        if self.proxy is not None:
            return -self.weight * self.proxy(said, pairs.cond).sum(), {}
        assert pairs.prompts is not None
        scores, present = rewarded(recipe.policy.model, self.reward, said, pairs.prompts, WHO, INSTEAD)
        kept = scores.where(present, 0.0)
        return -self.weight * kept.sum(), {"reward_mean": kept.detach().sum() / present.sum().clamp(min=1)}


@dataclass(kw_only=True)
class RewardGuided(Distillation):
    """Distillation with praise, whose proxy learns before each batch."""

    praise: Praise

    @property
    def proxy(self) -> Proxy | None:
        """For checkpoints."""
        return self.praise.proxy

    def experience(self, batch: Prompts) -> Iterator[Iterator[Pairs]]:
        """The proxy learns what the student says now; then pairs, as always."""
        info, proxy = dict[str, float](), self.proxy
        if proxy is not None:
            table = proxy.learn(self.policy, self.praise.reward, batch, self.generator)
            info = reward_statistics(table.reward, table.group) | {"proxy_accuracy": proxy.accuracy}
        for update in super().experience(batch):
            yield (replace(pairs, info={**pairs.info, **info}) for pairs in update)


@dataclass(frozen=True)
class Settings(ProxySettings, lcm.Settings):
    """Consistency distillation that also climbs a reward."""

    reward_weight: float = 0.1
    """Of the reward beside the distance."""
    variant: Literal["proxy", "direct"] = "proxy"
    """Follow a latent proxy of the reward, or the reward's own gradient, which it then must have."""

    def check(self) -> None:
        """As LCM, and the ranges above; answers are compared with others of their prompt."""
        super().check()
        if self.reward_weight < 0:
            raise ValueError(f"reward_weight is {self.reward_weight}; wanted 0 or more")
        if self.variant == "proxy":
            self.check_proxy(self.student_steps * self.images_per_prompt)

    def build(
        self, model: Distillable, reward: Reward, generator: torch.Generator, pictures: Pictures | None = None
    ) -> RewardGuided:
        """The method on this model. Raises NoGradient for a reward that cannot be followed."""
        plain = super().build(model, reward, generator, pictures)
        parts = {field.name: getattr(plain, field.name) for field in fields(plain)}
        proxy = self.proxy(plain.policy, generator) if self.variant == "proxy" else None
        praise = Praise(reward, self.reward_weight, proxy)
        return RewardGuided(**parts | {"terms": (praise,)}, praise=praise)
