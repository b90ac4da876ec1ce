"""AnimateLCM: decoupled consistency learning of clips (Wang et al. 2024, 2402.00769), its second stage.

A clip model is an image model with motion modules between its layers. Distilling both at once lets clips, of which
there are fewer and worse ones, spoil the image model. So the image model is distilled first, alone and on images, into
a LoRA (``lcm`` on the image model: stage 1). Here the motion modules are put between the layers again, that LoRA is
frozen, and consistency distillation (2303.01469, algorithm 2; 2310.04378) trains the motion modules and nothing else.
The teacher is the clip model without the LoRA, guided.

At the start the student's image layers answer in one hop and its motion modules cannot follow. So the average of the
student that judges the nearer state begins without the LoRA, as the teacher is, and the LoRA enters it through the
average alone: after n updates with decay mu it holds W + (1 - mu^n) B A, since B A is constant.

Departures, and what could not be compared:
- the schedule of that start is our reading of the paper, which was not compared line by line, and its training code
  for text to video is not public; ``late_spatial`` false begins with the whole LoRA;
- states come from the teacher's own chains (2406.05768), so that no clips are needed, where theirs are noised videos;
- stage 3, adapting an adapter without a teacher, is consistency training of that adapter and left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from tropism.base import Distillable, Reward
from tropism.distillation import Distillation
from tropism.distillation.pairs import adjacent
from tropism.ema import Ema
from tropism.methods.distilling import DistillationSettings, latent_size


class ClipModel(Protocol):
    """What stage 2 needs of a model besides."""

    has_spatial: bool

    def train_motion(self, spatial: str | Path | None = None) -> None:
        """Trains the motion modules alone, beside the frozen LoRA of the image model in that folder."""
        ...

    def spatial(self, share: float) -> AbstractContextManager[None]:
        """Inside, that LoRA counts for ``share`` of itself."""
        ...

    def parameters(self) -> list[nn.Parameter]: ...


class LateSpatial(Ema):
    """An average of the motion modules that the LoRA of the image model enters as if it were averaged with them."""

    def __init__(self, model: ClipModel, decay: float) -> None:
        super().__init__(model.parameters(), decay)
        self._model = model

    @property
    def share(self) -> float:
        """How much of the LoRA the average holds, 0 to 1."""
        return 1.0 - float(self.decay**self.updates)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the motion modules hold the average, and the LoRA counts for ``share``."""
        with super().swapped(), self._model.spatial(self.share):
            yield


@dataclass(frozen=True)
class Settings(DistillationSettings):
    """Stage 2: the motion modules of a clip model, beside the LoRA into which its image model was distilled."""

    spatial: str | None = None
    """Run of stage 1, lcm on the image model, or its adapter: the LoRA that is frozen here."""
    skip: int = 1
    """Moves of the teacher between the two states of a pair."""
    target_decay: float = 0.95
    """Of the average of the student that judges the nearer state."""
    late_spatial: bool = True
    """That average begins without the LoRA, which enters it as the average moves."""

    def check(self) -> None:
        """As the shared settings, and the ranges above."""
        super().check()
        if not self.spatial:
            raise ValueError("spatial is not given; wanted the run of stage 1: lcm with the image model of this one")
        if not 1 <= self.skip <= self.inference_steps or not 0 <= self.target_decay < 1:
            raise ValueError(
                f"skip is {self.skip} and target_decay {self.target_decay}; wanted 1 to inference_steps, which is "
                f"{self.inference_steps}, and 0 to below 1"
            )

    def prepare(self, model: Any) -> None:
        """Says what is trained: the motion modules. Raises ValueError for a model without any, or without a LoRA."""
        if not hasattr(model, "train_motion"):
            raise ValueError(
                f"{type(model).__name__} draws single images, and animate-lcm trains motion modules; wanted a clip "
                "model (AnimateDiff), and lcm for its image model"
            )
        folder = Path(str(self.spatial)).expanduser()
        model.train_motion(folder / "adapter" if (folder / "adapter").is_dir() else folder)

    def build(self, model: Any, reward: Reward, generator: torch.Generator) -> Distillation:
        """The method on this model; the reward is not learnt from. Raises ValueError unless motion modules are trained
        beside a LoRA of the image model."""
        if not getattr(model, "has_spatial", False):
            raise ValueError(
                "no motion modules are trained beside a LoRA of the image model; wanted a clip model after "
                "train_motion(the run of stage 1), as prepare does"
            )
        clips: Distillable = model
        student = self.student(clips, "consistency")
        average = (
            LateSpatial(model, self.target_decay) if self.late_spatial else Ema(clips.parameters(), self.target_decay)
        )
        return Distillation(
            student,
            self.teacher(clips, student),
            self.chains(adjacent(self.skip), generator),
            generator,
            self.measure(latent_size(student)),
            average,
        )
