"""PSO: Tuning Timestep-Distilled Diffusion Model Using Pairwise Sample Optimization (Miao et al. 2024, 2410.03190).

Of two samples of one prompt, one is preferred. A few-step model learns to make it likelier than the other, each
measured against the model before training: -log sigmoid(beta (u_w - u_l)), u = log p - log p_before. Nothing is
regressed on alone, which is what blurs a model of few steps.

Online: the best and the worst of what the model itself draws of a prompt; u of every random move of the two chains,
each cell (pair, move) a term of its own, with u_w at most log(1 + ``ratio_range``) and u_l at least
log(1 - ``ratio_range``). The last hop, which is deterministic, has no density and is left out. Offline: two pictures
that are at hand (``pairs``), or one at hand against one that the model draws (``targets``); u is by how much the
denoising error has fallen, both noised alike to one of the times at which the model moves, that of the last hop too.

Departures from ZichenMiao/Pairwise_Sample_Optimization:
- theirs draws one noise for all rows of a batch, here every row has its own;
- their u is bounded on both sides, so that a winner that has become too unlikely, or a loser too likely, has no
  gradient that would bring it back: on the toy that runs away;
- pairs of equal reward are left out, theirs train on them;
- the denoising error is that of the network's own target. Theirs is of x_0 with weight alpha^2 / sigma^2, which is the
  error of eps, and says nothing about a flow at its first time;
- their variant for one concept, a hinge without reference and a regression on losers, is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch

from tropism.base import Loss, Prompts, Reward, TextToImage
from tropism.distillation import Pictures
from tropism.duels import Duels, Moves, Noised, Source
from tropism.losses.preference import logistic
from tropism.methods.settings import MethodSettings
from tropism.policy import Policy
from tropism.rollout import slices
from tropism.samplers import solver, stochastic_solver

BETA = {"online": 50.0, "pairs": 5.0, "targets": 5.0}


@dataclass
class PSO:
    """``epochs`` passes over the duels of a batch, ``updates`` optimizer steps a pass. A winner counts as at most
    log(1 + ``ratio_range``) likelier than before, a loser as at most log(1 - ``ratio_range``); 0 is no such bound."""

    policy: Policy
    source: Source
    beta: float = 50.0
    ratio_range: float = 0.1
    smoothing: float = 0.0
    minibatch: int = 64
    updates: int = 1
    epochs: int = 1
    generator: torch.Generator = field(default_factory=torch.Generator)

    def experience(self, batch: Prompts) -> Iterator[Iterator[Duels]]:
        """The duels of a batch, shuffled, in ``updates`` slices a pass."""
        for duels in self.source.passes(self.policy, batch, self.epochs, self.generator):
            order = torch.randperm(len(duels.t), generator=self.generator)
            for parts in slices(order, self.updates, self.minibatch, self.policy.processes):
                yield (duels.rows(i) for i in parts)

    def loss(self, duels: Duels) -> Loss:
        """The logistic loss of the margins, summed over duels."""
        with torch.no_grad(), self.policy.model.reference():
            before = self.source.log_prob(self.policy, duels)
        now = self.source.log_prob(self.policy, duels)
        gain = now - before
        best, worst = gain[:, 0], gain[:, 1]
        if self.ratio_range:
            best, worst = best.clamp(max=math.log1p(self.ratio_range)), worst.clamp(min=math.log1p(-self.ratio_range))
        margin = self.beta * (best - worst)
        total = logistic(margin, self.smoothing).sum()
        gain_best, gain_worst = gain.detach().mean(0)
        metrics = {
            "pair_accuracy": (gain[:, 0] > gain[:, 1]).float().mean(),
            "margin": margin.detach().mean(),
            "gain_best": gain_best,
            "gain_worst": gain_worst,
        }
        return Loss(total, torch.tensor(float(len(margin))), metrics)

    def after_step(self) -> None:
        """Nothing moves but the parameters."""


@dataclass(frozen=True)
class Settings(MethodSettings):
    """Pairs of samples, for models of few steps."""

    source: Literal["online", "pairs", "targets"] = "online"
    """Of what is compared: the best and worst images of each prompt by reward; pairs of pictures from columns jpg_0,
    jpg_1 and label_0 of the prompts file; or a column image (drawn for captions of scenes) against the model's own."""
    inference_steps: int = 4
    """Moves of a chain: those for which the model was made."""
    pairs_per_prompt: int = 1
    """Online: at most so many pairs of each prompt's images: best with worst, second best with second worst, and on."""
    beta: float | None = None
    """How fast a margin saturates; none: 50 online, else 5."""
    ratio_range: float = 0.1
    """Online: a pair's ratios to the model before training count up to 1 + this and down to 1 - this; 0: no bound."""
    smoothing: float = 0.0
    """Chance that a preference is wrong."""
    eta: float = 1.0
    """Online: noise of the DDIM kernel, for a model without hops that draw noise."""
    updates: int = 1
    """Optimizer steps of one pass over a step's pairs."""
    epochs: int = 1
    """Passes over a step's pairs."""

    @property
    def needs_pictures(self) -> bool:
        """One for each prompt."""
        return self.source == "targets"

    @property
    def needs_pairs(self) -> bool:
        """Two for each prompt."""
        return self.source == "pairs"

    def check(self) -> None:
        """As the shared settings, and the ranges above."""
        super().check()
        for name in ("updates", "epochs", "pairs_per_prompt"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; wanted a whole number of at least 1")
        if not 0 <= self.ratio_range < 1 or not 0 <= self.smoothing < 0.5:
            raise ValueError(
                f"ratio_range is {self.ratio_range} and smoothing {self.smoothing}; wanted 0 to below 1, and 0 to "
                "below 0.5"
            )
        if (self.beta is not None and self.beta <= 0) or not 0 < self.eta <= 1:
            raise ValueError(f"beta is {self.beta} and eta {self.eta}; wanted above 0, and above 0 up to 1")
        if self.source == "online" and min(self.inference_steps, self.images_per_prompt) < 2:
            raise ValueError(
                f"inference_steps is {self.inference_steps} and images_per_prompt {self.images_per_prompt}; wanted at "
                "least 2 of each: the last move has no noise to learn from, and a pair is two"
            )

    def build(
        self,
        model: TextToImage,
        reward: Reward,
        generator: torch.Generator,
        pictures: Pictures | None = None,
        pairs: Pictures | None = None,
    ) -> PSO:
        """The method on this model; offline the reward is not learnt from."""
        if self.source == "online":
            policy = self.policy(model, stochastic_solver(model.denoiser, self.eta))
            source: Source = Moves(reward, self.pairs_per_prompt)
        else:
            given = pictures if pairs is None else pairs
            assert given is not None
            policy, source = self.policy(model, solver(model.denoiser)), Noised(given, pairs is not None)
        return PSO(
            policy,
            source,
            beta=BETA[self.source] if self.beta is None else self.beta,
            ratio_range=self.ratio_range if self.source == "online" else 0.0,
            smoothing=self.smoothing,
            minibatch=self.minibatch,
            updates=self.updates,
            epochs=self.epochs,
            generator=generator,
        )
