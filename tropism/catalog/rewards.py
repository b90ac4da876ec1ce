"""Rewards by name: those of the package, servers, and functions of the user."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tropism.catalog.models import WEIGHTS, world_of
from tropism.config import BadInput, suggest
from tropism.plugins import load_function

if TYPE_CHECKING:
    import torch

    from tropism.base import Reward

SHIPPED_CLIP = "clip"
CLIP_WORLDS = ("scenes", "moving")  # of whose models it is the reward clip, where none is named
REMOTE = "http://127.0.0.1:8000"


@dataclass(frozen=True)
class RewardSpec:
    """What ``NAME[:SOURCE][=WEIGHT]`` or ``MODULE:FUNCTION[=WEIGHT]`` says."""

    text: str  # without the weight
    name: str  # of a reward in the package, or of the user's function
    source: str | None  # where a packaged reward finds its weights, or the user's module
    weight: float
    packaged: bool
    call: Callable[..., Any] | None = None  # the user's function, once imported

    @property
    def kind(self) -> str:
        """Of a reward in the package, which one it is, whatever it is called."""
        return _kind(self.text)


@dataclass(frozen=True)
class Packaged:
    """A reward of the package: how to build it from (source or None, device)."""

    build: Callable[[str | None, torch.device], Reward]
    doc: str
    takes_source: bool = True
    needs_source: bool = False
    example: str = "FOLDER"  # of a source


def own_rewards(model: str) -> list[str]:
    """The rewards that a model was made for."""
    world = world_of(model)
    return [world] if world else []


def parse_reward(text: str) -> RewardSpec:
    """Raises BadInput for a weight that is no number and for what is neither a name nor MODULE:FUNCTION."""
    body, equals, number = text.rpartition("=")
    if not equals:
        body, number = text, "1"
    try:
        weight = float(number)
    except ValueError:
        raise BadInput(f"the weight of reward {text!r} is {number!r}; wanted a number, as in {body}=0.5") from None
    if not abs(weight) < float("inf"):
        raise BadInput(f"the weight of reward {text!r} is {number}; wanted a finite number")
    name = _kind(body)
    if name in packaged_rewards():
        source = body.partition(":")[2] or None
        if source and not packaged_rewards()[name].takes_source:
            raise BadInput(f"reward is {text!r}; wanted {name} alone: it has no weights to find")
        if source is None and packaged_rewards()[name].needs_source:
            example = packaged_rewards()[name].example
            raise BadInput(f"reward is {text!r}, whose weights have no usual place; wanted {name}:{example}")
        return RewardSpec(body, name, source, weight, True)
    module, colon, function = body.rpartition(":")
    if not colon or not module or not function:
        raise BadInput(f"there is no reward {text!r}; {suggest(body, [*packaged_rewards(), 'MODULE:FUNCTION'])}")
    return RewardSpec(body, function, module, weight, False)


def _kind(text: str) -> str:
    return text.split(":", 1)[0].replace("-", "_")


def check_rewards(texts: Sequence[str]) -> list[RewardSpec]:
    """The rewards that are asked for; functions are imported, models are not loaded. Raises BadInput."""
    specs = [parse_reward(text) for text in texts]
    twice = {spec.text for spec in specs if sum(other.text == spec.text for other in specs) > 1}
    if twice:
        raise BadInput(f"reward {sorted(twice)[0]} is given twice; give it once, with a weight such as =2")
    if not any(spec.weight for spec in specs):
        raise BadInput(f"reward is {' '.join(texts) or 'empty'}; wanted at least one with a weight that is not 0")
    return _told_apart([_checked(spec) for spec in specs])


def check_held_out(texts: Sequence[str], trained: Sequence[str], model: str) -> list[RewardSpec]:
    """Rewards that are only evaluated, with weight 0; none given: the model's own. Raises BadInput."""
    known = [parse_reward(text) for text in trained]
    names, users = ({spec.name for spec in known if spec.packaged}, {spec.text for spec in known if not spec.packaged})
    texts = texts or [name for name in own_rewards(model) if name not in names]
    for text in texts:
        spec = parse_reward(text)
        if spec.text != text:
            raise BadInput(f"eval_reward is {text}; wanted it without a weight: it is never summed")
        if spec.name in names if spec.packaged else spec.text in users:
            raise BadInput(f"eval_reward has {text}, which reward has too; wanted what is not trained on")
    return [replace(spec, weight=0.0) for spec in check_rewards([*trained, *texts])[len(trained) :]]


def _told_apart(specs: list[RewardSpec]) -> list[RewardSpec]:
    """A user's function that shares its name with another reward is called MODULE:FUNCTION; of several servers, each is
    called by its address."""
    names = [spec.name for spec in specs]

    def called(spec: RewardSpec) -> str:
        if names.count(spec.name) < 2 or (spec.packaged and spec.kind != "remote"):
            return spec.name
        return re.sub(r"\W+", "_", spec.text) if spec.packaged else spec.text

    return [replace(spec, name=called(spec)) for spec in specs]


def _checked(spec: RewardSpec) -> RewardSpec:
    if not spec.packaged:
        return replace(spec, call=load_function(str(spec.source), spec.name, "reward"))
    if spec.source and re.match(r"[./~]", spec.source) and not Path(spec.source).expanduser().exists():
        raise BadInput(f"reward is {spec.text}, but there is no {spec.source}; wanted a folder or a hub name")
    return spec


def build_reward(spec: RewardSpec, model: str, device: torch.device) -> Reward:
    """The reward itself. Raises RewardError (a ValueError), in one sentence, when its weights cannot be loaded."""
    if spec.call is not None:
        from tropism.base import Reward
        from tropism.rewards import as_reward

        declared = spec.call.differentiable if isinstance(spec.call, Reward) else None
        return as_reward(spec.call, spec.name, declared)
    made = packaged_rewards()[spec.kind].build(_source(spec, model), device)
    if spec.kind == "remote":
        made.name = spec.name
    return made


def _source(spec: RewardSpec, model: str) -> str | None:
    """Where a packaged reward finds its weights: what was said, or for the scenes models the CLIP that ships."""
    if spec.kind == "clip" and spec.source is None and world_of(model) in CLIP_WORLDS:
        return str(WEIGHTS / SHIPPED_CLIP)
    return spec.source and os.path.expanduser(spec.source)  # of a URL, Path would drop a slash


def reward_version(spec: RewardSpec, reward: Reward, model: str) -> str:
    """A hash of what decides the scores; of a remote reward it is the server's."""
    from tropism.rewards.version import code_of, version_of

    if spec.packaged and spec.kind == "remote":
        return str(reward.version)  # type: ignore[attr-defined]
    if not spec.packaged:
        file = Path(str(spec.source))
        return version_of(spec.text, file if file.suffix == ".py" else code_of(spec.call))
    source = _source(spec, model)
    return version_of(spec.text, code_of(reward), None if source is None else Path(source))


def cached(reward: Reward, spec: RewardSpec, model: str, file: str) -> Reward:
    """The reward with its scores kept in a file. Raises RewardError where that cannot be used."""
    from tropism.rewards.cache import Cached, File

    return Cached(reward, reward_version(spec, reward, model), File(file))


def packaged_rewards() -> dict[str, Packaged]:
    """Every reward that has a name."""
    from tropism.rewards.programmatic import PROGRAMMATIC

    made = {name: Packaged(lambda s, d, make=make: make(), "computed from the pixels", False)  # type: ignore[misc]
            for name, make in PROGRAMMATIC.items()}  # fmt: skip
    clip = "a CLIP by transformers; SOURCE: folder or hub name"
    return made | {
        "scenes": Packaged(_verified("score"), "how much of a scenes caption the picture shows", False),
        "scenes_pass": Packaged(_verified("pass"), "1 where it shows all of a scenes caption, else 0", False),
        "melodies": Packaged(_verified("score", "melodies"), "share of a melody's beats that are heard", False),
        "melodies_pass": Packaged(_verified("pass", "melodies"), "1 where all of a melody is heard, else 0", False),
        "moving": Packaged(_verified_clips("score"), "how much of a moving caption the film strip shows", False),
        "moving_pass": Packaged(_verified_clips("pass"), "1 where it shows all of one, else 0", False),
        "clip": Packaged(_from_pretrained("ClipScore"), f"agreement of picture and prompt; {clip}"),
        "pickscore": Packaged(_from_pretrained("PickScore"), f"human preference; {clip}"),
        "hpsv2": Packaged(_from_pretrained("HPSv2"), f"human preference; {clip}", needs_source=True),
        "aesthetic": Packaged(_from_pretrained("LaionAesthetic"), f"aesthetics, prompts unread; {clip}"),
        "remote": Packaged(_remote, "what a server says (tropism reward serve)", needs_source=True, example=REMOTE),
    }


def sample_pictures(count: int, size: int, seed: int) -> tuple[torch.Tensor, list[str]]:
    """(count, 3, size, size) floats in [0, 1], and captions: drawings that show them, then noise, black and white."""
    import numpy as np
    import torch

    from tropism.worlds.scenes import captions, parse, render_batch

    text, drawn = captions(count, seed), count - 3
    pictures = render_batch([parse(each) for each in text[:drawn]], range(seed, seed + drawn), size)
    shown = torch.from_numpy(pictures.astype(np.float32)).permute(0, 3, 1, 2) / 255
    noise = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return torch.cat([shown, noise, torch.zeros_like(noise), torch.ones_like(noise)]).contiguous(), text


def _verified(mode: Literal["score", "pass"], world: str = "scenes") -> Callable[[str | None, torch.device], Reward]:
    def build(source: str | None, device: torch.device) -> Reward:
        from tropism.rewards import ScenesReward

        return ScenesReward(importlib.import_module(f"tropism.worlds.{world}").verify_batch, mode, world)

    return build


def _verified_clips(mode: Literal["score", "pass"]) -> Callable[[str | None, torch.device], Reward]:
    def build(source: str | None, device: torch.device) -> Reward:
        from tropism.rewards import ScenesReward
        from tropism.worlds.moving import verify_batch

        made = ScenesReward(verify_batch, mode)
        made.name = "moving" if mode == "score" else "moving_pass"
        return made

    return build


def _remote(source: str | None, device: torch.device) -> Reward:
    from tropism.rewards.remote import from_environment

    return from_environment(str(source), os.environ)


def _from_pretrained(kind: str) -> Callable[[str | None, torch.device], Reward]:
    def build(source: str | None, device: torch.device) -> Reward:
        from tropism.models import clip_rewards
        from tropism.models.quiet import quiet_libraries

        quiet_libraries()
        made: Reward = getattr(clip_rewards, kind).from_pretrained(*([] if source is None else [source]), device=device)
        return made

    return build
