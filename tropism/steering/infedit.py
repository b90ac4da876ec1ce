"""InfEdit: change a picture by its caption, without inversion and in few moves.

Xu et al.: Inversion-Free Image Editing with Natural Language, 2023 (2312.04965). ``samplers.ddcm`` has the method and
its departures. No reward is followed; with best-of-n the edit that scores best is shown.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from tropism.data.images import read_images
from tropism.guidance import ROW
from tropism.samplers.ddcm import DDCM
from tropism.steering.settings import SteererSettings
from tropism.steering.task import Task, encoder_of


@dataclass(frozen=True)
class Settings(SteererSettings):
    """A picture whose caption is changed to the prompt."""

    picture: str = ""
    """The file of the picture, of the model's own size."""
    source: str = ""
    """What the picture shows, as a prompt."""
    edit_strength: float = 1.0
    """Share of the moves that are made; less keeps more of the picture's structure."""

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

    def guide(self, task: Task) -> Task:
        """Raises ValueError for a picture of another size, and for a model without an encoder."""
        clean = encoder_of(task, "the picture")(read_images([self.picture]))
        told = task.policy.model.encode([self.source] * task.count)
        walker = DDCM(clean.expand(task.count, *clean.shape[1:]), told, ROW, self.edit_strength)
        return replace(task, policy=task.policy.with_(walker=walker))
