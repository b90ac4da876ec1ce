"""The settings that methods share: how to sample, how much, how fast. A method file extends them and builds itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from tropism.base import Kernel, TextToImage
from tropism.explore import Exploration
from tropism.guidance.cfg import Scale
from tropism.policy import Policy

COUNTS = ("inference_steps", "prompts_per_step", "images_per_prompt", "minibatch", "sample_batch")


@dataclass(frozen=True)
class MethodSettings:
    """Flags and YAML keys of every method."""

    inference_steps: int = 20
    """Moves of a chain while training."""
    guidance_scale: float | None = None
    """Classifier-free guidance while training; none: the model's default; 1 is no guidance."""
    prompts_per_step: int = 8
    """Different prompts in a step (on all processes together)."""
    images_per_prompt: int = 8
    """Images of each prompt in a step: the group size."""
    minibatch: int = 64
    """Rows of one backward pass; bounds memory, never changes what an update is but for rounding."""
    sample_batch: int = 64
    """Chains that run at once; bounds memory, never changes what is sampled."""
    learning_rate: float = 3e-4
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """Of the learning rate; cosine: falling to 0 over the run."""
    lr_warmup: int = 0
    """Steps over which the learning rate rises to its value."""
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0 does not clip."""

    def check(self) -> None:
        """Raises ValueError in one sentence that names the field, the value and what was expected."""
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; wanted a whole number of at least 1")
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"learning_rate is {self.learning_rate}; wanted a number between 0 and 1, such as 3e-4")
        if self.lr_warmup < 0:
            raise ValueError(f"lr_warmup is {self.lr_warmup}; wanted 0 or more steps")
        if self.weight_decay < 0 or self.max_grad_norm < 0:
            raise ValueError(
                f"weight_decay is {self.weight_decay} and max_grad_norm {self.max_grad_norm}; wanted 0 or more"
            )
        if self.guidance_scale is not None and self.guidance_scale < 0:
            raise ValueError(f"guidance_scale is {self.guidance_scale}; wanted 0 or more (1 is no guidance)")

    def rate(self, step: int, steps: int) -> float:
        """By what the learning rate is multiplied in step 1 to ``steps``."""
        rising = min(1.0, step / (self.lr_warmup + 1))
        return rising * (0.5 + 0.5 * math.cos(math.pi * (step - 1) / steps) if self.lr_schedule == "cosine" else 1.0)

    def policy(
        self, model: TextToImage, kernel: Kernel, explore: Exploration | None = None, detach_null: bool = False
    ) -> Policy:
        """The policy that these settings describe."""
        guidance: float | Scale = model.guidance_scale if self.guidance_scale is None else self.guidance_scale
        if explore is not None:
            guidance = explore.guidance(float(guidance))  # type: ignore[arg-type]
        return Policy(model, kernel, self.inference_steps, guidance, detach_null, self.sample_batch)


@dataclass(frozen=True)
class ExploreSettings(MethodSettings):
    """DiffExp's knobs (2502.14070); all off by default."""

    explore_guidance: float | None = None
    """Guidance early in the chain, instead of the normal one; none: not explored."""
    explore_until: float = 0.2
    """The time (1 is noise, 0 is clean) at which guidance becomes normal again."""
    explore_weights: tuple[float, float] = (1.0, 1.0)
    """Range of the random weights of a prompt's phrases; 1 1: not explored."""
    explore_probability: float = 1.0
    """Share of the images that are perturbed."""

    def exploration(self) -> Exploration | None:
        """None when every knob is off. Raises ValueError for ranges that make no sense."""
        if self.explore_guidance is None and self.explore_weights == (1.0, 1.0):
            return None
        low, high = self.explore_weights
        return Exploration(self.explore_guidance, self.explore_until, (low, high), self.explore_probability)

    def check(self) -> None:
        """As MethodSettings, and the exploration's own ranges."""
        super().check()
        low, high = self.explore_weights
        if not 0 <= low <= high:
            raise ValueError(f"explore_weights is {low} {high}; wanted two numbers of at least 0, the smaller first")
        for name in ("explore_until", "explore_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; wanted a number from 0 to 1")


@dataclass(frozen=True)
class PolicyGradientSettings(ExploreSettings):
    """What the policy-gradient methods share."""

    clip: float = 1e-4
    """Range of the ratio; 0 is the score-function variant (DDPO-SF)."""
    updates: int = 2
    """Optimizer steps of one pass over a rollout, each on a slice of its cells."""
    inner_epochs: int = 1
    """Passes over one rollout."""
    kl_weight: float = 0.0
    """Weight of the KL to the model before training (DPOK)."""
    move_fraction: float = 1.0
    """Share of each chain's random moves that are trained on."""
    noise_until: float = 0.0
    """The time (1 is noise, 0 is clean) from which moves are deterministic, hence not trained on."""
    noise_weighting: bool = False
    """Weigh every move by its noise, so that late moves do not drown the early ones, which decide the layout."""
    group_relative: bool = False
    """Advantages within the group of this step instead of running per-prompt statistics."""

    def check(self) -> None:
        """As ExploreSettings, and the ranges above."""
        super().check()
        if self.inference_steps < 2:
            raise ValueError("inference_steps is 1; wanted at least 2: the last move has no noise to learn from")
        if self.clip < 0 or self.kl_weight < 0:
            raise ValueError(f"clip is {self.clip} and kl_weight {self.kl_weight}; wanted 0 or more")
        if self.inner_epochs < 1 or self.updates < 1:
            raise ValueError(
                f"inner_epochs is {self.inner_epochs} and updates {self.updates}; wanted at least 1 of each"
            )
        if self.clip == 0 and self.inner_epochs * self.updates > 1:
            raise ValueError(
                f"updates is {self.updates} and inner_epochs {self.inner_epochs}; wanted 1 of each with clip 0: the "
                "score-function variant is on-policy only"
            )
        if not 0 < self.move_fraction <= 1:
            raise ValueError(f"move_fraction is {self.move_fraction}; wanted above 0, up to 1")
        if not 0 <= self.noise_until < 1:
            raise ValueError(f"noise_until is {self.noise_until}; wanted 0 to below 1: a policy needs a random move")
        if self.group_relative and self.images_per_prompt < 2:
            raise ValueError(
                f"images_per_prompt is {self.images_per_prompt}; wanted at least 2 with group_relative: a group of one "
                "has no advantage"
            )
