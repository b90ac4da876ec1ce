"""Prompts by name: sets of the scenes world, and files; and what they show."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from tropism.catalog.models import ONLY, world_of
from tropism.config import BadInput, one_line

if TYPE_CHECKING:
    import torch

    from tropism.base import Prompts
    from tropism.data.prompts import PromptSet
    from tropism.distillation import Pictures

SCENES_PROMPTS = re.compile(r"scenes(?P<held>-held-out)?(?:-(?P<kind>single|count|pair))?(?::(?P<count>\d+))?")
MELODIES_PROMPTS = re.compile(r"melodies(?P<held>-held-out)?(?::(?P<count>\d+))?")
MOVING_PROMPTS = re.compile(r"moving(?P<held>-held-out)?(?::(?P<count>\d+))?")


def own_prompts(model: str, held_out: bool) -> str | None:
    """The name of the prompts that a model was made for; None when there are none."""
    world = world_of(model)
    if world is None:
        return None
    return world + "-held-out" * held_out + (f"-{ONLY[model]}" if model in ONLY else "")


def read_prompt_set(name: str, field: str = "prompts") -> PromptSet:
    """A file of prompts, or a set by name. Raises BadInput.

    The sets are scenes and scenes-held-out; -single, -count or -pair asks for captions of one kind, :N for how many
    (scenes-held-out-pair:16); usual are 512 to train on, and 64 that are held out. moving and moving-held-out are the
    captions of moving scenes, melodies and melodies-held-out are tunes, with :N as well.
    """
    melodies = MELODIES_PROMPTS.fullmatch(name)
    if melodies is not None and not Path(name).is_file():
        return _melodies(bool(melodies["held"]), melodies["count"])
    from tropism.data.prompts import PromptSet, read_prompts
    from tropism.worlds import moving
    from tropism.worlds.scenes import KINDS, captions

    match, clips = SCENES_PROMPTS.fullmatch(name), MOVING_PROMPTS.fullmatch(name)
    try:
        if clips is not None and not Path(name).is_file():
            split, usual = ("held_out", 64) if clips["held"] else ("train", 512)
            return PromptSet(moving.captions(int(clips["count"] or usual), 0, split))  # type: ignore[arg-type]
        if match is None and name.startswith("scenes") and not Path(name).suffix:
            raise ValueError("wanted scenes or scenes-held-out, then -single, -count or -pair, then :N, or a file")
        if match is None or Path(name).is_file():
            return read_prompts(name)
        kinds = (match["kind"],) if match["kind"] else KINDS
        split, usual = ("held_out", 64) if match["held"] else ("train", 512)
        return PromptSet(captions(int(match["count"] or usual), 0, split, kinds))  # type: ignore[arg-type]
    except (ValueError, OSError) as error:
        raise BadInput(f"{field} is {name}: {one_line(error)}") from error


def _melodies(held_out: bool, count: str | None) -> PromptSet:
    from tropism.data.prompts import PromptSet
    from tropism.worlds.melodies import prompts

    split, usual = ("held_out", 64) if held_out else ("train", 512)
    return PromptSet(prompts(int(count or usual), 0, split))  # type: ignore[arg-type]


def pictures(name: str, prompts: PromptSet) -> Pictures:
    """What the prompts show, for methods that learn from data: drawn for captions of scenes and for melodies, else the
    files of a column ``image``. Raises BadInput where there are neither."""
    import torch

    from tropism.data.images import COLUMN, check_files, read_images
    from tropism.worlds import moving
    from tropism.worlds.scenes import parse, render_batch

    if COLUMN in prompts.columns:
        try:
            check_files(prompts.columns[COLUMN])
        except ValueError as error:
            raise BadInput(f"prompts is {name}: {error}") from error
        return lambda batch, generator: read_images([str(path) for path in batch.columns[COLUMN]])
    if MELODIES_PROMPTS.fullmatch(name) is not None:
        return _played
    clips = MOVING_PROMPTS.fullmatch(name) is not None
    if SCENES_PROMPTS.fullmatch(name) is None and not clips:
        raise BadInput(
            f"prompts is {name}, without pictures to learn from; wanted .jsonl rows with a column {COLUMN}, the path "
            "of a picture"
        )

    def shown(batch: Prompts, generator: torch.Generator) -> torch.Tensor:
        seeds = torch.randint(2**31, (len(batch.text),), generator=generator).numpy()
        if clips:
            drawn = moving.strip(moving.render_batch([moving.parse(text) for text in batch.text], seeds))
        else:
            drawn = render_batch([parse(text) for text in batch.text], seeds)
        pixels = torch.from_numpy(drawn)
        return pixels.permute(0, 3, 1, 2).float() / 255

    return shown


def _played(batch: Prompts, generator: torch.Generator) -> torch.Tensor:
    """Spectrograms of melodies, each played anew."""
    import torch

    from tropism.worlds.melodies import parse, render_batch, to_pictures

    seeds = torch.randint(2**31, (len(batch.text),), generator=generator).numpy()
    return torch.from_numpy(to_pictures(render_batch([parse(text) for text in batch.text], seeds)))


def pairs(name: str, prompts: PromptSet) -> Pictures:
    """Two pictures of each prompt, (B, 2, 3, H, W), the preferred first: files of columns jpg_0 and jpg_1, by label_0.
    Raises BadInput where they are missing."""
    from tropism.data.images import check_pairs, read_pairs

    try:
        check_pairs(prompts.columns)
    except ValueError as error:
        raise BadInput(f"prompts is {name}: {error}") from error
    return lambda batch, generator: read_pairs(batch.columns)
