"""Two samples of one prompt, of which one is preferred: where they come from, and what their likelihood is.

Both are shown to the model in the same moment: at one move of two chains, or noised alike. Methods that learn from
preferences differ in what they make of the two likelihoods.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from tropism.base import Cond, Distillable, Prompts, Reward, take
from tropism.denoisers import denoising_error
from tropism.distillation import Pictures
from tropism.overlap import scored_chains
from tropism.policy import Policy, reward_statistics
from tropism.randomness import row_generators, row_seeds
from tropism.samplers import FlowSDE


@dataclass(frozen=True)
class Duels:
    """N moves of two chains of one prompt, or N noised pairs of samples; the preferred is the first of two."""

    x: Tensor  # (N, 2, ...) states at t; of samples: clean
    y: Tensor  # (N, 2, ...) the states at s that were drawn; of samples: the noise
    t: Tensor  # (N,)
    s: Tensor  # (N,)
    cond: Cond  # N rows
    info: Mapping[str, float] = field(default_factory=dict)

    def rows(self, i: Tensor) -> Duels:
        """Rows i (M,)."""
        return Duels(self.x[i], self.y[i], self.t[i], self.s[i], take(self.cond, i), self.info)

    def flat(self) -> Duels:
        """2N rows of one each."""
        cond = {name: value.repeat_interleave(2, dim=0) for name, value in self.cond.items()}
        t, s = self.t.repeat_interleave(2), self.s.repeat_interleave(2)
        return Duels(self.x.flatten(0, 1), self.y.flatten(0, 1), t, s, cond)


class Source(Protocol):
    """Duels, and what the likelihood of each side is."""

    def passes(self, policy: Policy, batch: Prompts, count: int, generator: torch.Generator) -> Iterator[Duels]:
        """All duels of a batch, ``count`` times."""
        ...

    def log_prob(self, policy: Policy, duels: Duels) -> Tensor:
        """(N, 2) nats a dimension, up to a constant; higher is likelier."""
        ...


def best_and_worst(reward: Tensor, group: Tensor, pairs: int = 1) -> Tensor:
    """(P, 2) rows of reward (B,) and group (B,): of each group the best with the worst, the second best with the second
    worst and so on, at most ``pairs``; only where the one is really better. Rows without a score (NaN) are in none."""
    found = []
    for name in dict.fromkeys(group.tolist()):
        rows = ((group == name) & ~reward.isnan()).nonzero().flatten()
        order = rows[reward[rows].argsort(descending=True, stable=True)]
        both = torch.stack([order, order.flip(0)], dim=1)[: min(pairs, len(rows) // 2)]
        found.append(both[reward[both[:, 0]] > reward[both[:, 1]]])
    return torch.cat(found)


@dataclass(frozen=True)
class Moves:
    """Online: every random move of two chains of the model itself, the best and the worst of a prompt by ``reward``."""

    reward: Reward
    pairs_per_prompt: int = 1

    def passes(self, policy: Policy, batch: Prompts, count: int, generator: torch.Generator) -> Iterator[Duels]:
        """One rollout, the same in each pass."""
        cond = policy.model.encode(batch.text)
        generators = row_generators(row_seeds(len(batch.text), generator))
        x = policy.noise(len(generators), generators)
        chains, reward = scored_chains(policy, self.reward, batch, x, cond, generators)
        info = reward_statistics(reward, batch.group)
        both = best_and_worst(reward.cpu(), batch.group, self.pairs_per_prompt)
        random = chains.mask.cpu()[both].all(1)  # (P, K)
        if isinstance(policy.kernel, FlowSDE):
            random[:, -1] = False  # its noise is only ever seen as noise
        pair, move = random.nonzero(as_tuple=True)
        rows, ts = both[pair], chains.ts.to(x.device)
        at, after = chains.xs[rows, move[:, None]], chains.xs[rows, move[:, None] + 1]
        duels = Duels(at, after, ts[move], ts[move + 1], take(cond, rows[:, 0]), info)
        for _ in range(count):
            yield duels

    def log_prob(self, policy: Policy, duels: Duels) -> Tensor:
        """(N, 2) of the moves that were made, the mean over dimensions."""
        each = duels.flat()
        law, _ = policy.kernel(policy.denoiser, each.x, each.t, each.s, each.cond)
        return (law.log_prob(each.y) / law.event_size).reshape(-1, 2)


@dataclass(frozen=True)
class Noised:
    """Offline: ``pictures`` are two of each prompt, the preferred first (``pairs``), or one, preferred to what the
    model draws itself. Both get one noise, at one of the times at which the model moves."""

    pictures: Pictures
    pairs: bool

    def passes(self, policy: Policy, batch: Prompts, count: int, generator: torch.Generator) -> Iterator[Duels]:
        """The same pictures, with fresh noise and times in each pass."""
        x0, cond = self._samples(policy, batch, generator), policy.model.encode(batch.text)
        ts = policy.ts.to(x0.device)
        for _ in range(count):
            move = torch.randint(policy.steps, (len(x0),), generator=generator)
            eps = policy.noise(len(x0), generator)[:, None].expand_as(x0)
            yield Duels(x0, eps, ts[move], ts[move + 1], cond)

    def _samples(self, policy: Policy, batch: Prompts, generator: torch.Generator) -> Tensor:
        """Clean latents (B, 2, ...)."""
        model: Distillable = policy.model  # type: ignore[assignment]  # a method with pictures needs to encode them
        pictures = self.pictures(batch, generator)
        if not self.pairs:
            wanted = model.latents(pictures)
            return torch.stack([wanted, policy.draw(batch.text, generator).to(wanted)], dim=1)
        latents = model.latents(pictures.flatten(0, 1))
        return latents.reshape(-1, 2, *latents.shape[1:])

    def log_prob(self, policy: Policy, duels: Duels) -> Tensor:
        """(N, 2) minus the denoising error, in the network's own target."""
        each = duels.flat()
        return -denoising_error(policy.denoiser, each.x, each.y, each.t, each.cond).reshape(-1, 2)
