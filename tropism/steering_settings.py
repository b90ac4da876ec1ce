"""What ``tropism compare-steering`` can be told, and how settings of steerers are read beside those of a command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from tropism.config import BadInput, PickSettings, one_line, read_config, require

if TYPE_CHECKING:
    from tropism.flags import Setting


@dataclass(frozen=True)
class CompareSteeringSettings(PickSettings):
    """Settings of ``tropism compare-steering``."""

    steer: list[str] = field(default_factory=lambda: ["best-of-n", "fk"])
    """Ways to steer, each NAME or NAME+NAME; drawing without any is always the first row."""
    reward: list[str] = field(default_factory=list)
    """By which the drawing is steered; as in training; none: the model's own."""
    eval_reward: list[str] = field(default_factory=list)
    """Held-out rewards, by which all are judged besides; none: the model's own, where that does not steer."""
    prompts: str | None = None
    """As in training; none: the model's own held-out prompts."""
    images: int = 64
    """Images to score for every way, one a prompt, going round the prompts where there are fewer."""
    tuned: list[str] = field(default_factory=list)
    """Folders of runs, drawn without steering: steer or tune?"""
    shown: int = 3
    """Prompts in the picture."""
    out: str | None = None
    """A new or empty folder; none: runs/compare-steering-NUMBER."""

    def check(self) -> None:
        """Raises BadInput."""
        super().check()
        require(self.images >= 2, "images", self.images, "at least 2, and 64 for a useful interval")
        require(self.shown >= 1, "shown", self.shown, "at least 1")
        if not self.steer or len(set(self.steer)) < len(self.steer):
            raise BadInput(f"steer is {' '.join(self.steer) or 'empty'}; wanted one or more ways, each once")


@dataclass(frozen=True)
class SteerersSettings:
    """Settings of ``tropism steerers``."""

    steer: list[str] = field(default_factory=list)
    """Names; none: all."""


def named_steerers(words: Sequence[str]) -> list[str]:
    """What flags, or else a ``--config`` file, give as ``steer``, before they are read. Raises BadInput."""
    from tropism import flags

    found: list[str] = []
    given = [(name, each) for name, each in flags.words_by_flag(words) if name in ("steer", "config")]
    for _, each in (pair for pair in given if pair[0] == "steer"):
        found += each
    for _, each in (pair for pair in given if pair[0] == "config" and not found):
        value = read_config(each[0]).get("steer") if each else None
        found += value if isinstance(value, list) else [] if value is None else [str(value)]
    return [] if found in (["none"], ["null"]) else found


def steerer_flags(ways: Sequence[str], taken: Sequence[str]) -> list[Setting]:
    """The settings of these ways to steer, each name once, with all defaults that it has. Raises BadInput for an
    unknown steerer, and for one whose setting the command has already."""
    from tropism import catalog, flags

    found: dict[str, Setting] = {}
    for way in ways:
        for kind in catalog.steerer_settings(way):
            for setting in flags.settings_of(kind, f"settings of {way}" if len(ways) == 1 else "settings of steerers"):
                if setting.name in taken:
                    raise BadInput(f"{way} has a setting {setting.name}, which this command has too")
                first = found.setdefault(setting.name, setting)
                if setting.default != first.default:
                    doc = f"{first.doc} ({way}: {flags.shown(setting.default)})"
                    found[setting.name] = replace(first, doc=doc)
    return list(found.values())


def made_steerers(way: str, values: Mapping[str, Any]) -> list[Any]:
    """The steerers of NAME or NAME+NAME with those of ``values`` that they have. Raises BadInput."""
    from tropism import catalog

    made = []
    for kind in catalog.steerer_settings(way):
        own = {each.name for each in fields(kind)}
        try:
            made.append(kind(**{name: value for name, value in values.items() if name in own}))
            made[-1].check()
        except ValueError as error:
            raise error if isinstance(error, BadInput) else BadInput(one_line(error)) from error
    return made
