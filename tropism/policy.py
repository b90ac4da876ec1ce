"""A model together with how one draws from it: what reinforcement learning calls the policy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tropism.base import Cond, Denoiser, Kernel, Prompts, Reward, TextToImage, pick, take
from tropism.denoisers import TOLD, takes_guidance
from tropism.guidance.cfg import Guided, Scale
from tropism.guidance.told import Told, interpolated
from tropism.processes import ALONE, Processes
from tropism.randomness import Randomness, each_row, normal
from tropism.samplers.chain import Move, Walk, walk

Guide = Callable[[Denoiser], Denoiser]
"""A belief that is steered: a denoiser around a denoiser."""
Finished = Callable[[Tensor, Tensor], None]
"""finished(rows (N,), their clean latents (N, ...)): told of every micro-batch, in order."""


@dataclass(frozen=True)
class Policy:
    """``steps`` moves of ``kernel`` through the guided ``model``, from noise to a clean latent.

    ``guidance`` is a number, a ``Scale``, or None for the model's default; ``guide`` goes around the guided denoiser,
    and ``walker`` is how the grid is walked. ``detach_null`` keeps gradients out of the unconditional branch.
    ``microbatch`` bounds how many chains run at once; it never changes what they are, because every chain has its own
    noise. ``nu`` weighs what a network that is told its guidance says with the prompt against what it says without
    (``guidance.interpolated``); 1 asks only with it. Several ``processes`` share the chains of a
    batch, and each ends up with all of them.
    """

    model: TextToImage
    kernel: Kernel
    steps: int
    guidance: float | Scale | None = None
    detach_null: bool = False
    microbatch: int = 64
    processes: Processes = ALONE
    guide: Guide | None = None
    walker: Walk = walk
    nu: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1; got {self.steps}")
        if self.microbatch < 1:
            raise ValueError(f"microbatch must be at least 1; got {self.microbatch}")

    @property
    def denoiser(self) -> Denoiser:
        """Guided."""
        scale = self.model.guidance_scale if self.guidance is None else self.guidance
        if takes_guidance(self.model.denoiser):
            guided: Denoiser = Told(self.model.denoiser, scale)
            if self.nu != 1:
                guided = interpolated(self.model.denoiser, self.model.null(), scale, self.nu)
        elif self.nu != 1:
            raise ValueError(f"nu is {self.nu:g}, but this network is not told its guidance; give guidance instead")
        else:
            guided = Guided(self.model.denoiser, self.model.null(), scale, self.detach_null)
        return guided if self.guide is None else self.guide(guided)

    def told(self, cond: Cond) -> Cond:
        """cond (B rows) as the unguided denoiser wants it: with the guidance, if its network takes one number of it."""
        scale = self.model.guidance_scale if self.guidance is None else self.guidance
        if callable(scale) or not takes_guidance(self.model.denoiser):
            return cond
        some = next(iter(cond.values()))
        return {**cond, TOLD: torch.full((len(some),), float(scale), device=some.device)}

    @property
    def ts(self) -> Tensor:
        """(steps + 1,) the model's own grid."""
        return self.model.grid(self.steps)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(iter(self.model.null().values())).device

    def noise(self, count: int, generator: Randomness = None) -> Tensor:
        """(count, ...) standard normal, drawn where its generators live."""
        return normal((count, *self.model.latent_shape), generator, self.device)

    def chain(self, x: Tensor, cond: Cond, generator: Randomness = None) -> Iterator[Move]:
        """The moves from x (B, ...); gradients are kept or not by the caller's context."""
        return self.walker(self.kernel, self.denoiser, x, self.ts, cond, generator)

    @torch.no_grad()
    def draw(
        self,
        prompts: Sequence[str],
        generator: Randomness = None,
        x: Tensor | None = None,
        finished: Finished | None = None,
    ) -> Tensor:
        """Clean latents (B, ...), from x (B, ...) or fresh noise. One generator seeds every row's own."""
        generator = each_row(generator, len(prompts))
        x = self.noise(len(prompts), generator) if x is None else x
        cond = self.model.encode(prompts)
        ends, mine = [], self.processes.share(torch.arange(len(prompts)))
        for rows in mine.split(self.microbatch):
            *_, last = self.chain(x[rows], take(cond, rows), [generator[row] for row in rows])
            ends.append(last.x_next)
            if finished is not None:
                finished(rows, ends[-1])
        return self.processes.joined(torch.cat(ends), mine, len(prompts))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], decoded by micro-batches."""
        return torch.cat([self.model.decode(part) for part in latents.split(self.microbatch)])

    def images(self, prompts: Sequence[str], generator: Randomness = None, x: Tensor | None = None) -> Tensor:
        """``draw``, decoded."""
        return self.decode(self.draw(prompts, generator, x))

    def with_(self, **changes: Any) -> Policy:
        """The same policy but for some fields."""
        return replace(self, **changes)


@dataclass(frozen=True)
class Chains:
    """Finished chains: every state, and the log-probability of every random move."""

    xs: Tensor  # (B, K+1, ...)
    ts: Tensor  # (K+1,)
    log_prob: Tensor  # (B, K) float32, summed over dimensions
    mask: Tensor  # (B, K) False where a move was deterministic
    final: Tensor  # (B, ...) what is decoded


@torch.no_grad()
def run_chains(
    policy: Policy,
    x: Tensor,
    cond: Cond,
    generators: Sequence[torch.Generator],
    finished: Finished | None = None,
) -> Chains:
    """Chains from x (B, ...) under ``cond`` (B rows), by micro-batches, each with its own generator (B)."""
    parts, mine = [], policy.processes.share(torch.arange(len(x)))
    for rows in mine.split(policy.microbatch):
        parts.append(_run(policy, x[rows], take(cond, rows), [generators[row] for row in rows]))
        if finished is not None:
            finished(rows, parts[-1][0][:, -1])
    own = (torch.cat(values) for values in zip(*parts, strict=True))
    xs, log_prob, mask = (policy.processes.joined(values, mine, len(x)) for values in own)
    return Chains(xs, policy.ts, log_prob, mask, xs[:, -1])


def _run(policy: Policy, x: Tensor, cond: Cond, generator: Randomness) -> tuple[Tensor, Tensor, Tensor]:
    moves = [
        (move.x_next, move.transition.log_prob(move.x_next), move.transition.is_random)
        for move in policy.chain(x, cond, generator)
    ]
    states, log_prob, mask = (torch.stack(values, dim=1) for values in zip(*moves, strict=True))
    return torch.cat([x[:, None].float(), states], dim=1), log_prob, mask


@torch.no_grad()
def score_latents(policy: Policy, reward: Reward, latents: Tensor, prompts: Prompts) -> Tensor:
    """Rewards (B,) of decoded latents; the columns of ``prompts`` reach the reward by name. Without gradients."""
    mine = policy.processes.share(torch.arange(len(latents)))
    own = pick(prompts, mine)
    scores = reward(policy.decode(latents[mine]), own.text, **own.columns).to(latents.device)
    return policy.processes.joined(scores, mine, len(latents))


def reward_statistics(reward: Tensor, group: Tensor) -> dict[str, float]:
    """What is logged of a batch of rewards (B,): mean and population std of those present, how many are missing, and
    the share of groups (with at least two scores) in which all scores are equal, so that nothing can be learnt."""
    present = ~reward.isnan()
    values = reward[present].double()
    flat = same = 0
    for name in set(group.tolist()):
        members = reward[present & (group == name).to(reward.device)]
        if members.numel() > 1:
            flat += 1
            same += int(members.max() == members.min())
    return {
        "reward_mean": float(values.mean()) if len(values) else math.nan,
        "reward_std": float(values.std(correction=0)) if len(values) else math.nan,
        "reward_missing": float((~present).sum()),
        "zero_std_ratio": same / flat if flat else 0.0,
    }
