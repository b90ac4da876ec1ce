"""Steered samples into a model: what a search finds while it draws becomes what the model draws by itself.

Fine-tuning on the samples of a better sampler: best-of-n distillation (Stiennon et al. 2020, 2009.01325, call the
sampler rejection sampling; RAFT, Dong et al. 2023, 2304.06767, is its iterated form) with any search of
``tropism.steering`` in its place: Feynman-Kac steering (Singhal et al. 2025, 2501.06848), beams, best of n. Where RAFT
ranks finished images within a group and drops the rest, here every image is the best of its own search.

Departure from all of these: prompts are dropped at ``drop`` for classifier-free guidance, as in ``raft``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from tropism.base import Prompts, Reward, TextToImage, pick
from tropism.methods.raft import RAFT
from tropism.methods.settings import MethodSettings
from tropism.policy import score_latents
from tropism.processes import ALONE
from tropism.randomness import row_seeds
from tropism.samplers import solver
from tropism.steering import Search, beam, best_of_n, fk, steer_policy

SEARCHES: Mapping[str, Callable[..., Search]] = {
    "best-of-n": best_of_n.Settings, "fk": fk.Settings, "beam": beam.Settings
}  # fmt: skip


def scored(reward: Tensor, group: Tensor) -> Tensor:
    """1 for every sample that has a score: what was chosen has been chosen within its own search."""
    return (~reward.isnan()).float()


@dataclass
class Steered(RAFT):
    """RAFT on the samples of ``search``."""

    search: Search = field(default_factory=best_of_n.Settings)

    def sampled(self, batch: Prompts) -> tuple[Tensor, Tensor]:
        """One steered sample a row."""
        seeds, processes = row_seeds(len(batch.text), self.generator), self.policy.processes
        mine = processes.share(torch.arange(len(batch.text)))
        alone, own = self.policy.with_(processes=ALONE), pick(batch, mine)
        latents = steer_policy(alone, self.reward, own, [self.search], seeds[mine])[0].latents
        reward = score_latents(alone, self.reward, latents, own).to(latents.device)
        return tuple(processes.joined(each, mine, len(batch.text)) for each in (latents, reward))  # type: ignore[return-value]


@dataclass(frozen=True)
class Settings(MethodSettings):
    """Fine-tuning on samples that a search has steered."""

    images_per_prompt: int = 2
    """Steered images of each prompt in a step."""
    steer: Literal["best-of-n", "fk", "beam"] = "fk"
    """The search that draws what is learnt from."""
    particles: int = 8
    """Chains of each image."""
    scale: float = 10.0
    """Of the reward in the law exp(scale reward) of fk."""
    every: int = 4
    """Moves between decisions of fk and beam."""
    updates: int = 1
    """Optimizer steps of one pass over the samples."""
    epochs: int = 4
    """Passes over the samples of a step."""
    drop: float = 0.1
    """Share of rows trained without their prompt, for classifier-free guidance."""

    def check(self) -> None:
        """As the shared settings, and those of the search."""
        super().check()
        if self.epochs < 1 or self.updates < 1 or not 0 <= self.drop < 1:
            raise ValueError(
                f"epochs is {self.epochs}, updates {self.updates} and drop {self.drop}; wanted 1 or more, 1 or more, "
                "and 0 to below 1"
            )
        self.search().check()

    def search(self) -> Search:
        """As these settings describe it."""
        told: dict[str, Any] = {"particles": self.particles}
        told |= {} if self.steer == "best-of-n" else {"every": self.every}
        return SEARCHES[self.steer](**told | ({"scale": self.scale} if self.steer == "fk" else {}))

    def build(self, model: TextToImage, reward: Reward, generator: torch.Generator) -> Steered:
        """The method on this model. Raises TypeError for a model whose network has no target to regress on."""
        policy, weigh = self.policy(model, solver(model.denoiser)), scored
        return Steered(
            policy, reward, weigh, self.minibatch, self.updates, self.epochs, self.drop, generator, self.search()
        )
