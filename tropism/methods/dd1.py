"""DD1: Distilled Decoding 1, One-step Sampling of Image Auto-regressive Models with Flow Matching (Liu et al. 2024,
2412.17153).

Drawing a token from the teacher's probabilities p is the end of a flow from noise to a code, whose velocity is known
exactly (``codebook``): one noise leads to one code, and over noises the codes have the law p. Position after position
this maps L noises to the L tokens of a picture. The student learns the map, all tokens in one pass:

    cross-entropy of its logits with the codes + regression_weight |its mean - the codes|^2

With ``student_steps`` above 1 it is also asked at the starts of later parts, the tokens before being the map's (section
4.3).

Departures from microsoft/distilled_decoding, of which drawing is published and training is not: the flow is walked by
Heun's method; the regression is a mean square in code space, where theirs is LPIPS on what is decoded; both heads see
the position's own noise; a student always shows its mean, as the nearest code, where theirs shows the likeliest code up
to a position that is chosen by hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tropism.base import Distillable, Loss, Prompts, Reward, take
from tropism.distillation.tokens import Tokens, check_tokens, first_parts, mapped, tokens
from tropism.methods.token_settings import TokenDistillationSettings
from tropism.policy import Policy
from tropism.rollout import slices


@dataclass
class DD1:
    """``policy`` is the student, ``teacher`` the token model with its guidance."""

    policy: Policy
    teacher: Policy
    generator: torch.Generator
    minibatch: int
    updates: int
    passes: int
    flow_steps: int
    regression_weight: float

    def experience(self, batch: Prompts) -> Iterator[Iterator[Tokens]]:
        """Noises and what they become, of a batch once; ``updates`` slices of them a pass."""
        model: Any = self.policy.model
        cond, rows, length = model.encode(batch.text), len(batch.text), model.latent_shape[0]
        noise = self.policy.noise(rows, self.generator)
        parts = torch.arange(rows).split(self.policy.microbatch)
        found = [mapped(self.teacher, noise[i], take(cond, i), model.codes, self.flow_steps) for i in parts]
        wanted = torch.cat(found)
        codes = model.codes.to(noise)[wanted]
        for _ in range(self.passes):
            drawn = first_parts(rows, length, self.policy.steps, self.generator).to(noise.device)
            x = torch.where(drawn[..., None], noise, codes)
            made = tokens(self.policy, x, drawn, cond, 0, self.generator, wanted)
            order = torch.randperm(rows, generator=self.generator)
            for minibatches in slices(order, self.updates, self.minibatch, self.policy.processes):
                yield (made.rows(index) for index in minibatches)

    def loss(self, rows: Tokens) -> Loss:
        """A sum over rows of means over the positions that are asked for."""
        model: Any = self.policy.model
        mean, logits = model.flow(rows.x, rows.drawn, rows.x, rows.drawn.to(rows.x), rows.cond)
        asked, share = rows.drawn.to(mean), rows.drawn.sum(1)
        entropy = nn.functional.cross_entropy(logits.mT, rows.wanted, reduction="none")
        error = (mean - model.codes.to(mean)[rows.wanted]).square().mean(-1)
        entropy, error = ((value * asked).sum(1) / share for value in (entropy, error))
        metrics = {"cross_entropy": entropy.detach().mean(), "code_error": error.detach().mean()}
        total = (entropy + self.regression_weight * error).sum()
        return Loss(total, torch.tensor(float(len(mean))), metrics)

    def after_step(self) -> None:
        """Nothing moves."""


@dataclass(frozen=True)
class Settings(TokenDistillationSettings):
    """A one-step student of a model of image tokens, by a flow from noise to tokens."""

    flow_steps: int = 20
    """Steps of the flow from noise to a code."""
    regression_weight: float = 1.0
    """Of the mean square error of the codes, beside the cross-entropy."""

    def check(self) -> None:
        """As the shared settings, and the ranges above."""
        super().check()
        if self.flow_steps < 2 or self.regression_weight < 0:
            raise ValueError(
                f"flow_steps is {self.flow_steps} and regression_weight {self.regression_weight}; wanted at least 2, "
                "and 0 or more"
            )

    def build(self, model: Distillable, reward: Reward, generator: torch.Generator) -> DD1:
        """The method on this model; the reward is not learnt from. Raises ValueError for a model without tokens."""
        check_tokens(model, "dd1")
        student = self.student(model, "ode")
        own_settings = (self.minibatch, self.updates, self.passes, self.flow_steps, self.regression_weight)
        return DD1(student, self.teacher(model), generator, *own_settings)
