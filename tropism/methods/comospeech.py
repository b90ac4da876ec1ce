"""CoMoSpeech: One-Step Speech and Singing Voice Synthesis via Consistency Model (Ye et al. 2023, 2305.06908).

Consistency distillation (2303.01469, algorithm 2) of a model whose noise has a mean: x_t = x_0 + t (z + mu), where mu
is what an encoder of the text or score expects (``denoisers.Shifted``). Clean clips are noised to a level of Karras'
grid, one Euler step of the teacher leads to the next, and both states must lead the decoder to one clip; the nearer is
judged by an average of the student (0.95). The distance is a mean square over what the mask of a clip leaves. The
encoder, and with it mu, is not trained.

Departures from zhenye234/CoMoSpeech:
- a clip's mean is over its own frames and all clips weigh the same, where theirs is over the frames of a batch;
- whole clips, where they cut segments of two seconds;
- the lowest level of the grid is 0, where theirs is 0.002, and so is noise that is drawn again not lessened by it;
- ``data`` chains takes states from the teacher's own chains, so that no clips are needed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from tropism.base import Cond, Distillable, Reward
from tropism.denoisers import MASK, has_mean
from tropism.distillation import Distillation, Pictures
from tropism.methods import lcm
from tropism.schedules import EDM


def unmasked(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """A view: x (N, ...) times cond[MASK], scaled so that a mean square over all is that over what the mask leaves.

    Without a mask x itself. Raises ValueError for a mask that does not fit.
    """
    mask = cond.get(MASK)
    if mask is None:
        return x
    fits = mask.ndim == x.ndim and all(m in (1, n) for m, n in zip(mask.shape[1:], x.shape[1:], strict=True))
    if not fits or len(mask) != len(x):
        raise ValueError(
            f"cond has a {MASK} of shape {tuple(mask.shape)} for states {tuple(x.shape)}; wanted as many rows and "
            "dimensions, each of the state's length or 1"
        )
    kept = mask.to(x).expand_as(x)
    share = kept.flatten(1).mean(1).reshape(-1, *[1] * (x.ndim - 1))
    return x * kept / share.where(share > 0, 1.0).sqrt()


@dataclass(frozen=True)
class Settings(lcm.Settings):
    """Consistency distillation with a prior mean, from clips."""

    data: Literal["chains", "pictures"] = "pictures"
    """Where states come from: clips with noise (a column image; those of melodies are played), or the teacher's chains.
    """
    inference_steps: int = 50
    """Moves of the teacher: levels of the grid, of which neighbours make a pair."""
    student_steps: int = 1
    """Moves of the student, for which it is made."""
    distance: Literal["huber", "l2", "pseudo-huber"] = "l2"
    """Between what student and target say, where the mask leaves it."""

    def build(
        self, model: Distillable, reward: Reward, generator: torch.Generator, pictures: Pictures | None = None
    ) -> Distillation:
        """The method on this model; the reward is not learnt from. Raises ValueError for a model whose noise has no
        mean, and for a path that is not EDM's."""
        denoiser = model.denoiser
        if not has_mean(denoiser):
            raise ValueError(
                "the noise of this model has no mean, from which comospeech starts; wanted a model such as melodies "
                "(denoisers.Shifted), or take lcm"
            )
        if not isinstance(denoiser.schedule, EDM):
            raise ValueError(
                f"the schedule of this model is {type(denoiser.schedule).__name__}; comospeech steps on the levels of "
                "EDM: take lcm, or a model on schedules.EDM"
            )
        return replace(super().build(model, reward, generator, pictures), view=unmasked)
