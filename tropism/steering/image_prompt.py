"""Image prompts: what is drawn looks like a picture, or takes only its style, or shows the objects of several.

Ye et al. 2023: IP-Adapter (2308.06721). Wang et al. 2024: InstantStyle (2404.02733), ``blocks`` and ``content``. Huang
et al. 2024: MIP-Adapter (2409.17920), ``entities``, with any adapter and no learnt gate. No reward is followed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from tropism import pictures
from tropism.data.images import check_files, read_images
from tropism.steering.settings import SteererSettings
from tropism.steering.task import Task


@dataclass(frozen=True)
class Settings(SteererSettings):
    """Pictures beside the prompt."""

    rewarded: ClassVar[bool] = False

    references: list[str] = field(default_factory=list)
    """Files of the pictures that are shown to the model."""
    ip_adapter: str = ""
    """The adapter, a file in diffusers' format; empty: ip/ip_adapter.safetensors beside the model's own folder."""
    image_encoder: str = ""
    """The folder of the adapter's CLIP; empty: the one that the file names, or image_encoder beside it."""
    scale: float = 1.0
    """How much the pictures count against the prompt, which is 1."""
    blocks: list[str] = field(default_factory=list)
    """Blocks of the network that see the pictures, as NAME or NAME=SCALE, or style or layout where the adapter's file
    says which these are; none: all."""
    content: str = ""
    """What the pictures show and is not wanted, as a prompt; it is taken out of their embeddings."""
    subtract: float = 1.0
    """How many times it is."""
    entities: list[str] = field(default_factory=list)
    """What each reference is called in the prompt, such as "a circle": each then counts where that is; none: all
    everywhere."""

    def check(self) -> None:
        """As every steerer's; there must be pictures, and an entity for each or none."""
        super().check()
        if not self.references:
            raise ValueError("references is empty; wanted the files of one or more pictures")
        for each in self.references:
            check_files([each], "references")
        if self.ip_adapter and not Path(self.ip_adapter).expanduser().is_file():
            raise ValueError(f"ip_adapter is {self.ip_adapter}, which is no file; wanted one in diffusers' format")
        if not math.isfinite(self.scale) or not math.isfinite(self.subtract):
            raise ValueError(f"scale is {self.scale} and subtract {self.subtract}; wanted numbers")
        if self.entities and (len(self.entities) != len(self.references) or not all(map(str.strip, self.entities))):
            raise ValueError(
                f"there are {len(self.references)} references and the entities {self.entities}; wanted a name for each"
            )
        self.scales()

    def scales(self) -> dict[str, float]:
        """``blocks`` by name. Raises ValueError for what is no number."""
        found = {}
        for each in self.blocks:
            name, _, said = each.partition("=")
            try:
                found[name] = float(said or 1)
            except ValueError as error:
                raise ValueError(f"blocks has {each!r}; wanted NAME or NAME=SCALE, such as style=0.5") from error
        return found

    def guide(self, task: Task) -> Task:
        """Raises ValueError for a model that takes no image prompt, and for an adapter that is not for it."""
        make = getattr(task.policy.model, "image_prompted", None)
        if make is None:
            raise ValueError("this model takes no image prompt; take a pipeline of Stable Diffusion, such as scenes-sd")
        shown = [pictures.to_image(read_images([each])[0]) for each in self.references]
        model = make(
            shown,
            Path(self.ip_adapter).expanduser() if self.ip_adapter else None,
            self.scale,
            image_encoder=self.image_encoder or None,
            blocks=self.scales(),
            content=self.content,
            subtract=self.subtract,
            entities=self.entities,
        )
        return task.drawn_by(model)
