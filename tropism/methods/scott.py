"""SCott: Stochastic Consistency Distillation (Liu et al. 2024, 2403.01505).

LCM whose teacher takes noisy steps: the two states of a pair are ``substeps`` moves of a DDIM with ``eta`` apart, and
an adversarial term may make what the student says look like the teacher's own samples.

With a squared distance the noise has a price. The student at a state must equal the mean of what it says at the noisy
states that may follow, so that at eta = 1 it can only say E[x0 | x_t], a blur. An eta above 0.3 is therefore refused
unless the adversarial term is on.

Departures (no code was published): states come from the teacher's own chains, which are noisy as well; DDIM of any eta
is their solver, where the paper's strongest results take ER-SDE-5; the discriminator is a small network of latents and
prompt, theirs the teacher's with a LoRA, and its real samples are the teacher's, so that no data are needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tropism.base import Distillable, Reward
from tropism.distillation import Distillation
from tropism.distillation.adversarial import Adversarial, Discriminator
from tropism.distillation.pairs import adjacent
from tropism.ema import Ema
from tropism.methods.distilling import DistillationSettings, latent_size
from tropism.samplers import DDIM

BLURS = 0.3  # eta above which a distance alone makes the student say a mean


@dataclass(frozen=True)
class Settings(DistillationSettings):
    """Consistency distillation along noisy chains of the teacher."""

    eta: float = 0.1
    """Noise of the teacher's moves: 0 is none, 1 ancestral sampling."""
    substeps: int = 3
    """Moves of the teacher between the two states of a pair."""
    target_decay: float = 0.95
    """Of the average of the student that judges the nearer state; 0: the student itself."""
    adversarial_weight: float = 0.0
    """Of the adversarial term; the paper's is 0.4."""
    discriminator_width: int = 64
    """Channels of its layers."""
    discriminator_rate: float = 1e-3
    """Its learning rate."""

    def check(self) -> None:
        """As the shared settings, and the ranges above."""
        super().check()
        if not 1 <= self.substeps <= self.inference_steps or not 0 <= self.target_decay < 1:
            raise ValueError(
                f"substeps is {self.substeps} and target_decay {self.target_decay}; wanted 1 to inference_steps, which "
                f"is {self.inference_steps}, and 0 to below 1"
            )
        if not 0 <= self.eta <= 1 or self.adversarial_weight < 0:
            raise ValueError(
                f"eta is {self.eta} and adversarial_weight {self.adversarial_weight}; wanted 0 to 1, and 0 or more"
            )
        if self.eta > BLURS and not self.adversarial_weight:
            raise ValueError(
                f"eta is {self.eta} without an adversarial term, which makes the student say a mean of what may come: "
                f"lower eta to {BLURS} or less, or set adversarial_weight, such as 0.4"
            )
        if self.discriminator_width < 1 or not 0 < self.discriminator_rate < 1:
            raise ValueError(
                f"discriminator_width is {self.discriminator_width} and discriminator_rate {self.discriminator_rate}; "
                "wanted at least 1, and a number between 0 and 1"
            )

    def build(self, model: Distillable, reward: Reward, generator: torch.Generator) -> Distillation:
        """The method on this model; the reward is not learnt from."""
        student = self.student(model, "consistency")
        return Distillation(
            student,
            self.teacher(model, student).with_(kernel=DDIM(self.eta)),
            self.chains(adjacent(self.substeps), generator),
            generator,
            self.measure(latent_size(student)),
            Ema(model.parameters(), self.target_decay) if self.target_decay else None,
            terms=[self._adversary(model, generator)] if self.adversarial_weight else (),
        )

    def _adversary(self, model: Distillable, generator: torch.Generator) -> Adversarial:
        """As precise as the student."""
        example = next(iter(model.parameters()))
        net = Discriminator(model.latent_shape, model.null(), self.discriminator_width, generator)
        dtype = torch.promote_types(example.dtype, torch.float32)
        return Adversarial(net.to(example.device), self.adversarial_weight, self.discriminator_rate, dtype)
