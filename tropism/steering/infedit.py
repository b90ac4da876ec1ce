"""InfEdit: change a picture by its caption, without inversion and in few moves.

Xu et al.: Inversion-Free Image Editing with Natural Language, 2023 (2312.04965). ``samplers.ddcm`` has the method and
its departures, ``models.shared_attention`` those of the control of attention, which is for UNets. No reward is
followed; with best-of-n the edit that scores best is shown.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from tropism.data.images import read_images
from tropism.guidance import ROW
from tropism.samplers.ddcm import DDCM, Attending
from tropism.steering.settings import SteererSettings
from tropism.steering.task import Task, encoder_of


@dataclass(frozen=True)
class Settings(SteererSettings):
    """A picture whose caption is changed to the prompt."""

    rewarded: ClassVar[bool] = False

    picture: str = ""
    """The file of the picture, of the model's own size."""
    source: str = ""
    """What the picture shows, as a prompt."""
    edit_strength: float = 1.0
    """Share of the moves that are made; less keeps more of the picture's structure."""
    cross_share: float = 0.0
    """Share of the moves, the first ones, in which words of both captions are attended to as in the picture."""
    self_share: float = 0.0
    """Share of the moves, the first ones, in which places attend to each other as in the picture."""
    blend: float | None = None
    """Nothing moves where words that changed are attended to less than this, from 0 to 1; none: everything may."""

    def check(self) -> None:
        """As every steerer's; there must be a picture."""
        super().check()
        if not self.picture or not Path(self.picture).expanduser().is_file():
            raise ValueError(
                f"picture is {self.picture or 'not given'}, which is no file; wanted the picture to be changed"
            )
        if not self.source:
            raise ValueError("source is not given; wanted what the picture shows, as a prompt")
        if not 0 < self.edit_strength <= 1:
            raise ValueError(f"edit_strength is {self.edit_strength}; wanted above 0, up to 1")
        for name, share in (("cross_share", self.cross_share), ("self_share", self.self_share)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} is {share}; wanted a share of the moves from 0 to 1")
        if self.blend is not None and not 0 < self.blend < 1:
            raise ValueError(f"blend is {self.blend}; wanted above 0, below 1, or none")

    def guide(self, task: Task) -> Task:
        """Raises ValueError for a picture of another size, for a model without an encoder, and for a control of
        attention of a model that is no UNet."""
        clean = encoder_of(task, "the picture")(read_images([self.picture]))
        told = task.policy.model.encode([self.source] * task.count)
        source = clean.expand(task.count, *clean.shape[1:])
        walker = DDCM(source, told, ROW, self.edit_strength, self._attending(task))
        return replace(task, policy=task.policy.with_(walker=walker))

    def _attending(self, task: Task) -> Attending | None:
        if not self.cross_share and not self.self_share and self.blend is None:
            return None
        shared = getattr(task.policy.model, "shared_attention", None)
        if shared is None:
            raise ValueError(
                "cross_share, self_share and blend need a UNet's attention, which this model has not; leave them out"
            )
        prompts = task.prompts.text
        found: Attending = shared([self.source] * task.count, prompts, self.cross_share, self.self_share, self.blend)
        return found
