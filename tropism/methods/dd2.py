"""DD2: Distilled Decoding 2, One-step Sampling of Image Auto-regressive Models with Conditional Score Distillation
(Liu et al. 2025, 2510.21003).

A model that draws L tokens one by one is made one that says all of them in one pass, from L noises. With the teacher's
probabilities p of the next token, the score of that token with noise is known exactly (``codebook``):

1. GTS: the student learns, on the teacher's samples q, what the noisy token of each position is in the mean,
   |mean(x_t | q_<i) - m_T(x_t, p(. | q_<i))|^2;
2. a copy of it becomes the fake score, and two losses take turns. The student says q = mean(e_i | e_<i) at t = 1, noise
   in place of what came before, and moves along the difference of scores (CSD),
       0.5 |q_i - sg(q_i - g_i)|^2,   g_i = (m_fake(q_i^t | q_<i) - m_T(q_i^t | q_<i)) / mean|q - m_T|,
   a time t for each position, and no gradient through q_<i; the fake score denoises what the student says (FCS).

No data are needed, and no chain of the teacher after the first stage.

Choices, as no code was published: scores are compared as posterior means, the same up to a weight of t, in DMD's form
(2311.18828, eq. 8) and not SiD's; the teacher reads q_<i as the nearest codes; the network is told which tokens before
are noise. With ``student_steps`` above 1 the student is asked at states of its own, the first parts said and kept.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tropism.base import Distillable, Loss, Prompts, Reward, take
from tropism.distillation import tokens as tok
from tropism.distillation.matching import FakeScore, direction, moved
from tropism.distillation.tokens import Tokens
from tropism.methods.token_settings import TokenDistillationSettings
from tropism.policy import Policy
from tropism.rollout import slices


@dataclass
class DD2:
    """``policy`` is the student, ``teacher`` the token model with its guidance; the first ``init_updates`` are GTS."""

    policy: Policy
    teacher: Policy
    fake: FakeScore
    generator: torch.Generator
    minibatch: int
    updates: int
    passes: int
    fake_updates: int
    init_updates: int
    made: int = 0
    heard: list[tuple[Tokens, Tensor]] = field(default_factory=list)

    @property
    def model(self) -> Any:
        """The student's."""
        return self.policy.model

    @property
    def terms(self) -> Sequence[FakeScore]:
        """For checkpoints."""
        return [self.fake]

    def state_dict(self) -> dict[str, int]:
        """The updates that were made."""
        return {"made": self.made}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continues from ``state_dict()``."""
        self.made = int(state["made"])

    def experience(self, batch: Prompts) -> Iterator[Iterator[Tokens]]:
        """``updates`` slices of a batch a pass, each with fresh noise; the teacher draws at first, once a batch."""
        cond, rows, length = self.model.encode(batch.text), len(batch.text), self.model.latent_shape[0]
        first = tok.samples(self.teacher, batch.text, self.generator) if self.made < self.init_updates else None
        for _ in range(self.passes):
            for part in torch.randperm(rows, generator=self.generator).tensor_split(self.updates):
                own = take(cond, part)
                if first is not None and self.made < self.init_updates:
                    x, drawn = first[part], torch.zeros(len(part), length, dtype=torch.bool)
                else:
                    drawn = tok.first_parts(len(part), length, self.policy.steps, self.generator)
                    x = tok.student_states(self.policy, own, drawn, self.generator)
                made = tok.tokens(self.policy, x, drawn.to(x.device), own, 1 + self.fake_updates, self.generator, None)
                self.heard.clear()
                parts = slices(torch.arange(len(part)), 1, self.minibatch, self.policy.processes)[0]
                yield (made.rows(index) for index in parts)

    def loss(self, rows: Tokens) -> Loss:
        """Of the first stage, or CSD: a sum over rows of means over positions and dimensions."""
        count, noisy = torch.tensor(float(len(rows.x))), rows.noised(rows.x, 0)
        if not bool(rows.drawn.any()):
            apart = tok.believed(self.model, rows.x, noisy, rows, 0) - tok.taught(self.teacher, rows.x, noisy, rows, 0)
            total = apart.square().flatten(1).mean(1).sum()
            return Loss(total, count, {"init_error": total.detach() / count})
        said = torch.where(rows.drawn[..., None], self.model.says(rows.x, rows.drawn, rows.cond), rows.x)
        self.heard.append((rows, said.detach()))
        with torch.no_grad():
            noisy = rows.noised(said, 0)
            real = tok.taught(self.teacher, tok.snapped(said, self.model.codes), noisy, rows, 0)
            fake = tok.believed(self.fake.model, said, noisy, rows, 0)
        step = direction(said.detach(), real, fake) * rows.drawn[..., None]
        metrics = {"disagreement": step.abs().mean(), "fake_error": torch.tensor(self.fake.error)}
        return Loss(moved(said, step).sum(), count, metrics)

    def after_step(self) -> None:
        """The fake score begins as what the first stage made, and then catches up with the student."""
        for draw in range(1, 1 + self.fake_updates) if self.heard else ():
            self.fake.step((self._error(rows, said, draw) for rows, said in self.heard), self.policy.processes)
        self.heard.clear()
        self.made += 1
        if self.made <= self.init_updates:
            for own, value in zip(self.fake.parameters, self.model.parameters(), strict=True):
                own.data.copy_(value.data)

    def _error(self, rows: Tokens, said: Tensor, draw: int) -> Tensor:
        """(N,) FCS."""
        apart = tok.believed(self.fake.model, said, rows.noised(said, draw), rows, draw) - said
        return apart.square().flatten(1).mean(1)


@dataclass(frozen=True)
class Settings(TokenDistillationSettings):
    """A one-step student of a model of image tokens, by the difference of two scores."""

    learning_rate: float = 3e-4
    fake_learning_rate: float = 1e-3
    """Of the fake score."""
    fake_updates: int = 2
    """Of the fake score, after each of the student's."""
    init_updates: int = 500
    """Updates of the first stage, on samples of the teacher."""

    def check(self) -> None:
        """As the shared settings, and the ranges above."""
        super().check()
        if not 0 < self.fake_learning_rate < 1 or self.fake_updates < 1 or self.init_updates < 0:
            raise ValueError(
                f"fake_learning_rate is {self.fake_learning_rate}, fake_updates {self.fake_updates} and init_updates "
                f"{self.init_updates}; wanted between 0 and 1, at least 1, and 0 or more"
            )

    def build(self, model: Distillable, reward: Reward, generator: torch.Generator) -> DD2:
        """The method on this model; the reward is not learnt from. Raises ValueError for a model without tokens."""
        tok.check_tokens(model, "dd2")
        student, fake = self.student(model, "ode"), FakeScore(copy.deepcopy(model), self.fake_learning_rate)
        own = (self.minibatch, self.updates, self.passes, self.fake_updates, self.init_updates)
        return DD2(student, self.teacher(model), fake, generator, *own)
