"""What ``tropism few-steps`` can be told."""

from __future__ import annotations

from dataclasses import dataclass, field

from tropism.config import BadInput, DeviceSettings, require


@dataclass(frozen=True)
class FewStepsSettings(DeviceSettings):
    """Settings of ``tropism few-steps``."""

    model: str = "scenes"
    """The teacher, drawn with its own solver and guidance; as in training."""
    adapter: list[str] = field(default_factory=list)
    """Students: folders of runs, adapters or checkpoints, or of whole pipelines; none: the teacher alone."""
    reward: list[str] = field(default_factory=list)
    """As in training; none: the model's own."""
    reward_cache: str | None = None
    """As in training."""
    prompts: str | None = None
    """As in training; none: the model's own held-out prompts."""
    images: int = 64
    """Images to score at every count, one a prompt, going round the prompts where there are fewer."""
    counts: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    """Counts of moves."""
    guidance_scale: float | None = None
    """Of the teacher; none: the model's default."""
    seed: int = 0
    """Of the noise that everything starts from."""
    batch_size: int = 16
    """Images that are drawn at once; seconds are measured on so many."""
    rounds: int = 3
    """Of the measurement of seconds, of which the median is told."""
    shown: int = 2
    """Prompts in the picture."""
    out: str | None = None
    """A new or empty folder; none: runs/few-steps-NUMBER."""

    def check(self) -> None:
        """Raises BadInput."""
        super().check()
        require(self.images >= 2, "images", self.images, "at least 2, and 64 for a useful interval")
        for name in ("batch_size", "rounds", "shown"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.seed >= 0, "seed", self.seed, "0 or more")
        scale = self.guidance_scale
        require(scale is None or scale >= 0, "guidance_scale", scale, "0 or more, or none")
        if not self.counts or min(self.counts) < 1 or len(set(self.counts)) < len(self.counts):
            said = " ".join(map(str, self.counts)) or "empty"
            raise BadInput(f"counts is {said}; wanted different whole numbers of at least 1, as in 1 2 4 8")
