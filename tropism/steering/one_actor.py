"""OneActor: the same character in every picture, from an offset to one word that was tuned on one picture.

Wang et al.: OneActor: Consistent Character Generation via Cluster-Conditioned Guidance, 2024 (2404.10267).
``tropism.one_actor.tune`` makes the file, ``guidance.cluster`` has the formula and both the departures. No reward is
followed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from tropism.base import WORDS
from tropism.guidance.cluster import Clustered
from tropism.one_actor import Actor
from tropism.steering.settings import SteererSettings, check_times
from tropism.steering.task import Task


@dataclass(frozen=True)
class Settings(SteererSettings):
    """A word that means one character."""

    rewarded: ClassVar[bool] = False

    actor: str = ""
    """The file that tropism.one_actor.tune made."""
    likeness: float = 0.8
    """How far the word moves from what it meant (0) to the character (1)."""
    exclude: float = 0.0
    """Strength with which the mean of other characters is avoided; above 0 the network is asked once more a move."""
    times: tuple[float, float] = (0.33, 1.0)
    """Times (1 is noise, 0 is clean) between which is guided."""

    def check(self) -> None:
        """As every steerer's; there must be an actor."""
        super().check()
        check_times(self.times)
        if not self.actor or not Path(self.actor).expanduser().is_file():
            raise ValueError(
                f"actor is {self.actor or 'not given'}, which is no file; wanted what tropism.one_actor.tune made"
            )
        if self.likeness < 0 or self.exclude < 0:
            raise ValueError(f"likeness is {self.likeness} and exclude {self.exclude}; wanted 0 or more")

    def guide(self, task: Task) -> Task:
        """Raises ValueError for a prompt without the word, and for an actor of another model."""
        actor = Actor.load(self.actor)
        find = getattr(task.policy.model, "word_places", None)
        if find is None:
            raise ValueError("this model does not say where a word of its prompts is; take a pipeline")
        places = find(task.prompts.text, actor.word)
        width = int(task.policy.model.null()[WORDS].shape[2])
        if len(actor.target) != width:
            raise ValueError(
                f"{self.actor} was tuned for words of {len(actor.target)} numbers and this model's have {width}; tune "
                "one on this model"
            )
        low, high = self.times
        return task.guided(
            lambda inner: Clustered(inner, actor.target, actor.others, places, self.likeness, self.exclude, low, high)
        )
