"""What the distillation methods share: their settings, and the student and teacher that these describe."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from tropism.base import Distillable, Hops
from tropism.distillation import Before, Chains
from tropism.distillation.pairs import Places
from tropism.guidance import by_row
from tropism.losses.consistency import Distance, Huber, MeanSquare, PseudoHuber
from tropism.methods.settings import MethodSettings
from tropism.policy import Policy
from tropism.samplers import solver


@dataclass(frozen=True)
class StudentSettings(MethodSettings):
    """Flags and YAML keys of every method that makes a model for few steps."""

    distils: ClassVar[bool] = True

    student_steps: int = 4
    """Moves of the student, for which it is made."""
    prompts_per_step: int = 64
    """Prompts of a step, each the start of a chain of the teacher (on all processes together)."""
    images_per_prompt: int = 1
    """Chains of each prompt."""
    updates: int = 20
    """Optimizer steps of one pass over a step's pairs."""
    passes: int = 1
    """Passes over the pairs of a step."""
    learning_rate: float = 1e-3
    lr_schedule: Literal["constant", "cosine"] = "cosine"
    """Of the learning rate; cosine: falling to 0 over the run."""
    weight_decay: float = 0.0

    def check(self) -> None:
        """As MethodSettings, and the ranges above."""
        super().check()
        for name in ("student_steps", "updates", "passes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; wanted a whole number of at least 1")

    def student(self, model: Distillable, hops: Hops, guidance: float | None = None) -> Policy:
        """The student as it is sampled; with ``guidance`` its network is told a scale. Raises ValueError for a model
        that is made for few steps already, and as ``few_step``."""
        view = model.few_step(hops, self.student_steps, guidance)
        return Policy(view, solver(view.denoiser), self.student_steps, microbatch=self.sample_batch)


@dataclass(frozen=True)
class DistillationSettings(StudentSettings):
    """Flags and YAML keys of every distillation. The teacher is the model as it was before training."""

    inference_steps: int = 20
    """Moves of the teacher's chains, whose states the student learns from."""
    pairs_per_chain: int | None = None
    """Pairs of each chain in a pass; none: as many as it has moves."""
    distance: Literal["huber", "l2", "pseudo-huber"] = "huber"
    """Between what student and target say."""
    huber_c: float = 0.01
    """Where huber turns from a square into an absolute value, per dimension; pseudo-huber scales it by their number."""

    def check(self) -> None:
        """As the settings of a student, and the ranges above."""
        super().check()
        if self.student_steps >= self.inference_steps:
            raise ValueError(
                f"student_steps is {self.student_steps}; wanted fewer than inference_steps, the teacher's "
                f"{self.inference_steps}"
            )
        if self.pairs_per_chain is not None and self.pairs_per_chain < 1:
            raise ValueError(f"pairs_per_chain is {self.pairs_per_chain}; wanted at least 1, or none")
        if self.huber_c <= 0:
            raise ValueError(f"huber_c is {self.huber_c}; wanted above 0")

    def measure(self, size: int) -> Distance:
        """The distance, for states of ``size`` dimensions."""
        if self.distance == "l2":
            return MeanSquare()
        return Huber(self.huber_c) if self.distance == "huber" else PseudoHuber(self.huber_c * size**0.5)

    def teacher(self, model: Distillable, student: Policy) -> Policy:
        """The model as it was, on as many times as ``inference_steps``, of which the student's are some."""
        was = Before(model, student.model.grid)
        return Policy(
            was, solver(model.denoiser), self.inference_steps, self.guidance_scale, microbatch=self.sample_batch
        )

    def chains(self, places: Places, generator: torch.Generator) -> Chains:
        """Pairs along the teacher's chains."""
        return Chains(places, self.minibatch, self.updates, self.passes, generator, self.pairs_per_chain)


@dataclass(frozen=True)
class ToldSettings(DistillationSettings):
    """Flags and YAML keys of a distillation whose student may be told the guidance of its teacher."""

    told: tuple[float, float] | None = None
    """Range of guidance scales: each row has one of its own, of which the student is told; guidance_scale is then what
    it is drawn with. None: one scale, folded into the student."""

    def check(self) -> None:
        """As the settings of a distillation, and the ranges above."""
        super().check()
        if self.told is None:
            return
        low, high = self.told
        if not 0 <= low < high < math.inf:
            raise ValueError(f"told is {low:g} {high:g}; wanted two scales of at least 0, the smaller first, as 1 8")
        if self.guidance_scale is not None and not low <= self.guidance_scale <= high:
            raise ValueError(
                f"guidance_scale is {self.guidance_scale:g}; wanted one of those told, {low:g} to {high:g}"
            )

    def student(self, model: Distillable, hops: Hops, guidance: float | None = None) -> Policy:
        """As of any distillation; told the scale it is drawn with, the nearest in its range to the model's own unless
        another was given. Raises ValueError for a network that cannot be told."""
        if self.told is not None and guidance is None:
            scale = model.guidance_scale if self.guidance_scale is None else self.guidance_scale
            guidance = min(max(scale, self.told[0]), self.told[1])
        return super().student(model, hops, guidance)

    def teacher(self, model: Distillable, student: Policy) -> Policy:
        """As of any distillation; guided by each row's own scale."""
        plain = super().teacher(model, student)
        return plain if self.told is None else plain.with_(guidance=by_row)

    def chains(self, places: Places, generator: torch.Generator) -> Chains:
        """As of any distillation; each chain with its scale."""
        return replace(super().chains(places, generator), told=self.told)


@dataclass(frozen=True)
class DirectDistillationSettings(DistillationSettings):
    """Flags and YAML keys of a distillation that may also compare with the teacher's own chain."""

    direct: bool = False
    """Compare with the teacher's own state at the end (of the chain, or of its segment) instead of with what the
    student says of the nearer state."""
    asked: float = 0.0
    """With direct: share of the pairs at the times at which the student will be asked."""

    def check(self) -> None:
        """As the settings of a distillation, and the ranges above."""
        super().check()
        if not 0 <= self.asked <= 1 or (self.asked and not self.direct):
            raise ValueError(f"asked is {self.asked}; wanted a share from 0 to 1, and direct with it")


def latent_size(policy: Policy) -> int:
    """Dimensions of a state."""
    return int(torch.Size(policy.model.latent_shape).numel())
