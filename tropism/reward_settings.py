"""What ``tropism reward test`` and ``tropism reward serve`` can be told."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from tropism.config import BadInput, PlaceSettings, require

SMALLEST, LARGEST = 16, 4096  # pixels of a side


@dataclass(frozen=True)
class RewardTestSettings(PlaceSettings):
    """Settings of ``tropism reward test``."""

    reward: list[str] = field(default_factory=list)
    """One or more of NAME, NAME:SOURCE or MODULE:FUNCTION."""
    prompts: str | None = None
    """A .txt or .jsonl file, whose columns the reward gets, or a set by name; none: captions of what is shown."""
    images: int = 16
    """Pictures to show: drawings of the scenes world, and one each of noise, black and white."""
    size: int = 64
    """Height and width of the pictures in pixels."""
    seed: int = 0
    """Of the drawings and the noise."""
    model: str = "scenes"
    """The model to be trained with it: for a scenes model, clip is the small one that ships with it."""

    def check(self) -> None:
        """Raises BadInput."""
        super().check()
        if not self.reward:
            raise BadInput("reward is not given; wanted tropism reward test NAME, or MODULE:FUNCTION")
        require(self.images >= 4, "images", self.images, "at least 4: a drawing, noise, black and white")
        require(SMALLEST <= self.size <= LARGEST, "size", self.size, f"{SMALLEST} to {LARGEST}")
        require(self.seed >= 0, "seed", self.seed, "0 or more")


@dataclass(frozen=True)
class RewardServeSettings(PlaceSettings):
    """Settings of ``tropism reward serve``."""

    reward: list[str] = field(default_factory=list)
    """NAME, NAME:SOURCE or MODULE:FUNCTION."""
    host: str = "127.0.0.1"
    """The address to listen at; others than this machine can only call with a token."""
    port: int = 8000
    """0: one that is free."""
    token_file: str | None = None
    """A file with the token that callers must show; none: TROPISM_REWARD_TOKEN, and if that is not set, no token."""
    max_megabytes: int = 256
    """Of one call (1 is 1,048,576 bytes), also unpacked."""
    max_images: int = 256
    """Of one call."""
    max_pixels: int = 4_194_304
    """Of one picture, height times width."""
    parallel: int = 1
    """Calls that are scored at once; more than 1 only for a reward that is made for several threads."""
    model: str = "scenes"
    """The model to be trained with it: for a scenes model, clip is the small one that ships with it."""

    def check(self) -> None:
        """Raises BadInput."""
        super().check()
        if len(self.reward) != 1:
            raise BadInput(f"reward is {' '.join(self.reward) or 'not given'}; wanted one: a server has one reward")
        if "=" in self.reward[0].rpartition(":")[2]:
            raise BadInput(f"reward is {self.reward[0]}; wanted it without a weight, which is the caller's business")
        require(0 <= self.port <= 65535, "port", self.port, "0 to 65535")
        for name in ("max_megabytes", "max_images", "max_pixels", "parallel"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")

    def check_reach(self, token: str | None) -> None:
        """Raises BadInput where everyone who can reach the machine could call."""
        if token is None and not is_loopback(self.host):
            raise BadInput(
                f"host is {self.host} and there is no token; wanted token_file (or TROPISM_REWARD_TOKEN), or 127.0.0.1"
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
