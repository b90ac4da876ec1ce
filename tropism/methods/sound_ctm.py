"""SoundCTM: score-based and consistency models of text to sound in one (Saito et al. 2024, 2405.18503), distilled.

CTM (``methods.ctm``) without networks besides the teacher: two states of a guided chain must lead to one state at a
drawn s, and are compared there by the teacher's own features,

    d(G(x, t, s, omega), G-(y, u, s, omega)) + weight |g(x, t, t, omega) - D_omega(x, t)|^2 (1 / 0.5^2 + 1 / level^2),

with G- an average of the student, without a gradient, and d of ``distillation.features``. Every chain has a scale omega
of its own, which its teacher is guided by (null + omega (cond - null)) and the student is told; a share of the chains
has no prompt. Drawn is nu G(cond, omega) + (1 - nu) G(null, omega) (``guidance.interpolated``, ``Policy.nu``).

Departures from sony/soundctm, besides those of ``ctm`` (states of the teacher's chains, no data; what the teacher
believes instead of denoising score matching, with a fixed weight):
- the squared difference of features is summed over channels and averaged over positions; theirs averages over channels
  too, so that blocks with many channels count less;
- how the network embeds omega is its own affair (theirs adds sines of 1000 omega to the embedding of time).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from tropism.base import Distillable, Reward
from tropism.distillation import Chains, Distillation
from tropism.distillation.features import Features, blocks_of
from tropism.distillation.pairs import Places, anywhere
from tropism.distillation.recipe import as_is
from tropism.ema import Ema
from tropism.losses.consistency import SquaredNorm
from tropism.methods import ctm
from tropism.methods.distilling import ToldSettings, latent_size
from tropism.samplers import Heun


@dataclass(frozen=True)
class Settings(ToldSettings, ctm.Settings):
    """Jumps from any time to any other, of a teacher whose guidance the student is told."""

    told: tuple[float, float] | None = (2.0, 5.0)
    """Range of guidance scales: each chain has one of its own, of which the student is told; guidance_scale is then
    what it is drawn with. None: one scale, folded into the student."""
    drop: float = 0.1
    """Share of the chains that have no prompt."""
    compared: Literal["features", "states"] = "features"
    """What is compared at s: what the teacher's network sees in the states, or the states, by ``distance``."""
    feature_blocks: list[str] | None = None
    """Modules of the teacher's network whose outputs are its features; none: the members of its lists of blocks."""
    channels_last: bool = True
    """Where features of three dimensions have their channels: last, as tokens; no: second, as 1-D convolutions."""

    def check(self) -> None:
        """As the settings of CTM, and the ranges above."""
        super().check()
        if not 0 <= self.drop < 1:
            raise ValueError(f"drop is {self.drop:g}; wanted a share from 0 to below 1")
        if self.feature_blocks is not None and (self.compared == "states" or not self.feature_blocks):
            raise ValueError("feature_blocks is given without features to compare or is empty; leave it out")

    def chains(self, places: Places, generator: torch.Generator) -> Chains:
        """As of any told distillation; some without prompt."""
        return replace(super().chains(places, generator), drop=self.drop)

    def features(self, model: Any) -> Features:
        """What the teacher's network sees. Raises ValueError for a model that has none, and for unknown blocks."""
        if not hasattr(model, "network"):
            raise ValueError(
                f"the teacher of a {type(model).__name__} is no network, and has no features; compare states"
            )
        return Features(model, self.feature_blocks or blocks_of(model.network), self.channels_last)

    def build(self, model: Distillable, reward: Reward, generator: torch.Generator) -> Distillation:  # type: ignore[override]
        """The method on this model; the reward is not learnt from. Raises ValueError for a network that cannot be told
        two times, or its guidance."""
        student = self.student(model, "jump")
        teacher, seen = self.teacher(model, student), self.compared == "features"
        return Distillation(
            student,
            teacher.with_(kernel=Heun()) if self.solver == "heun" else teacher,
            self.chains(anywhere(self.most or self.inference_steps - 1), generator),
            generator,
            SquaredNorm() if seen else self.measure(latent_size(student)),
            Ema(model.parameters(), self.target_decay) if self.target_decay else None,
            view=self.features(model) if seen else as_is,
            terms=[ctm.Staying(self.denoiser_weight)] if self.denoiser_weight else (),
        )
