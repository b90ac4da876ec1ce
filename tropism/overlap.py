"""Rewards that are computed elsewhere run while the next images are sampled.

A reward says ``concurrent = True`` when it leaves this machine's processors free (``rewards.remote``). Then it is
called for each micro-batch, in a thread of its own, one call after another in the order of sampling: what it is asked,
and so what it says, is what it would be without the thread. Any other reward is called once, for the whole batch,
afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from tropism.base import Cond, Prompts, Reward, pick
from tropism.policy import Chains, Policy, run_chains, score_latents


def scored_chains(
    policy: Policy, reward: Reward, batch: Prompts, x: Tensor, cond: Cond, generators: Sequence[torch.Generator]
) -> tuple[Chains, Tensor]:
    """``run_chains`` from x (B, ...), and the rewards (B,) of where they end."""
    with Scoring(policy, reward, batch) as scores:
        chains = run_chains(policy, x, cond, generators, scores.begin)
        return chains, scores.of(chains.final)


def scored_draw(
    policy: Policy, reward: Reward, batch: Prompts, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """``Policy.draw``, and the rewards (B,) of the latents (B, ...)."""
    with Scoring(policy, reward, batch) as scores:
        latents = policy.draw(batch.text, generator, finished=scores.begin)
        return latents, scores.of(latents)


class Scoring:
    """Scores of one batch of ``prompts``: ``begin`` is told of latents as they are finished, ``of`` waits for all.

    ``threaded`` False makes the same calls without the thread. Gradients are never kept.
    """

    def __init__(self, policy: Policy, reward: Reward, prompts: Prompts, threaded: bool = True) -> None:
        self.policy, self.reward, self.prompts = policy, reward, prompts
        self._early = bool(getattr(reward, "concurrent", False)) and not reward.differentiable
        self._pool = ThreadPoolExecutor(1, "reward") if self._early and threaded else None
        self._parts: list[Future[Tensor]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def begin(self, rows: Tensor, latents: Tensor) -> None:
        """Clean latents (N, ...) of rows (N,), which follow those of the call before. Raises what a reward raised."""
        if not self._early:
            return
        for part in self._parts:
            if part.done():
                part.result()  # there is no use in sampling on
        images, own = self.policy.decode(latents), pick(self.prompts, rows)
        if self._pool is not None:
            self._parts.append(self._pool.submit(self._score, images, own))
        else:
            done = Future[Tensor]()
            done.set_result(self._score(images, own))
            self._parts.append(done)

    @torch.no_grad()
    def _score(self, images: Tensor, prompts: Prompts) -> Tensor:
        return self.reward(images, prompts.text, **prompts.columns)

    def of(self, latents: Tensor) -> Tensor:
        """(B,) rewards of all latents (B, ...), on their device. Raises what the reward raised."""
        if not self._early:
            return score_latents(self.policy, self.reward, latents, self.prompts)
        own, processes = torch.cat([part.result().to(latents.device) for part in self._parts]), self.policy.processes
        return processes.joined(own, processes.share(torch.arange(len(latents))), len(latents))
