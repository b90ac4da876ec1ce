"""Safe denoising: draw away from pictures that are not wanted.

Kim et al.: Training-Free Safe Denoisers for Safe Use of Diffusion Models, 2025 (2502.08011). The negation set is a
folder of pictures; no reward is followed. ``guidance.safe`` has the formula and the departures.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from tropism.base import Schedule
from tropism.data.images import read_images
from tropism.guidance import KernelOdds, Odds, Safe
from tropism.steering.settings import SteererSettings, check_times
from tropism.steering.task import Task, encoder_of

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


@dataclass(frozen=True)
class Settings(SteererSettings):
    """A negation set of pictures."""

    rewarded: ClassVar[bool] = False

    avoid: str = ""
    """A folder of pictures of what is not wanted, of the model's own size."""
    keep: str = ""
    """A folder of pictures of what is wanted, with which those are compared; empty: by distance alone."""
    strength: float = 1.0
    """Odds of a state that is just one of those to avoid with noise, where there is nothing to compare with."""
    prior: float = 0.5
    """Share of what is drawn that would be like those to avoid, where there is something to compare with."""
    bandwidth: float = 0.2
    """How far around each picture's latent its likes are thought to lie."""
    most: float = 5.0
    """Most that these odds are taken for."""
    least: float = 0.0
    """Where the odds are less, nothing is done."""
    reach: float | None = None
    """Nothing is done where the belief is further from those pictures (root mean square); none: always."""
    times: tuple[float, float] = (0.0, 1.0)
    """Times (1 is noise, 0 is clean) between which is guided."""

    def check(self) -> None:
        """As every steerer's; there must be pictures."""
        super().check()
        check_times(self.times)
        if not self.strength > 0 or not self.bandwidth >= 0 or not self.most > 0 or not self.least >= 0:
            raise ValueError(
                f"strength is {self.strength}, bandwidth {self.bandwidth}, most {self.most} and least {self.least}; "
                "wanted above 0, 0 or more, above 0, and 0 or more"
            )
        if self.reach is not None and not self.reach > 0:
            raise ValueError(f"reach is {self.reach}; wanted above 0, or none")
        if not 0 < self.prior < 1:
            raise ValueError(f"prior is {self.prior}; wanted a share between 0 and 1")
        for name, folder in {"avoid": self.avoid, **({"keep": self.keep} if self.keep else {})}.items():
            if not pictures_in(folder):
                said = folder or "not given"
                raise ValueError(f"{name} is {said}, without pictures; wanted a folder with .png or .jpg files")

    def guide(self, task: Task) -> Task:
        """Raises ValueError for pictures of another size, and for a model without an encoder."""
        encode = encoder_of(task, "pictures to avoid")
        unsafe, kept = (pictures_in(folder) for folder in (self.avoid, self.keep))
        safe = encode(read_images(kept)) if kept else None
        odds: Odds = KernelOdds(encode(read_images(unsafe)), safe, self.prior, self.strength, self.bandwidth)
        if safe is None:
            odds = Typical(odds)
        low, high = self.times
        return task.guided(lambda inner: Safe(inner, odds, self.most, self.least, low, high, self.reach))


@dataclass(frozen=True, eq=False)
class Typical:
    """``inner`` in units in which what is noise away from an example has the odds 1: D / 2 nats more, as noise of D
    dimensions is sqrt(D) long. The paper's form has a normaliser that is unknown, and sinks with D without it."""

    inner: Odds

    def __call__(self, schedule: Schedule, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """As ``Odds``."""
        unsafe, odds = self.inner(schedule, x, t)
        return unsafe, odds + x[0].numel() / 2


def pictures_in(folder: str) -> list[str]:
    """The pictures in a folder, by name; none where there is no such folder."""
    place = Path(folder).expanduser()
    files = place.iterdir() if folder and place.is_dir() else ()
    return sorted(str(file) for file in files if file.suffix.lower() in PICTURES)
