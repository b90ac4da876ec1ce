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
from tropism.methods.raft import RAFT, best_of_group
from tropism.methods.settings import MethodSettings
from tropism.particles import Particles
from tropism.policy import score_latents
from tropism.processes import ALONE
from tropism.randomness import row_seeds
from tropism.samplers import solver
from tropism.steering import Search, beam, best_of_n, fk, steer_policy

SEARCHES: Mapping[str, Callable[..., Search]] = {
    "best-of-n": best_of_n.Settings, "fk": fk.Settings, "beam": beam.Settings
}  # fmt: skip


@dataclass
class Steered(RAFT):
    """RAFT on the samples of ``search``, which ranks in its stead."""

    search: Search = field(default_factory=best_of_n.Settings)

    def sampled(self, batch: Prompts) -> tuple[Tensor, Tensor, Tensor]:
        """One steered sample a row, of weight 1 where it has a score; of weight 0 all, where no search had a choice."""
        seeds, processes, total = row_seeds(len(batch.text), self.generator), self.policy.processes, len(batch.text)
        mine = processes.share(torch.arange(total))
        alone, own = self.policy.with_(processes=ALONE), pick(batch, mine)
        found = steer_policy(alone, self.reward, own, [self.search], seeds[mine])[0]
        reward = score_latents(alone, self.reward, found.latents, own).to(found.latents.device)
        latents, reward, choice = (
            processes.joined(each, mine, total) for each in (found.latents, reward, chosen(found.particles))
        )
        return latents, reward, (~reward.isnan()).float().cpu() * float(choice.any())


def chosen(particles: Particles | None) -> Tensor:
    """(P,) whether the particles of a sample differ in what they score."""
    assert particles is not None
    reward = particles.reward
    high, low = reward.nan_to_num(-torch.inf).amax(1), reward.nan_to_num(torch.inf).amin(1)
    return high > low


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
        policy = self.policy(model, solver(model.denoiser))
        given = (self.minibatch, self.updates, self.epochs, self.drop, generator, self.search())
        return Steered(policy, reward, best_of_group(), *given)
