"""Names for things, and the things themselves: methods, models, rewards, prompts. The only file that wires them.

Methods are found, not registered: every module of ``tropism.methods`` with a ``Settings`` class is one. Functions that
are called ``check_...`` load nothing; what they accept can still fail to load, with a sentence of its own.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tropism.config import BadInput, one_line, suggest
from tropism.plugins import load_function

if TYPE_CHECKING:
    import torch

    from tropism.base import Reward
    from tropism.data.prompts import PromptSet
    from tropism.models.trainable import Trainable

PACKAGE = Path(__file__).parent
WEIGHTS = PACKAGE / "worlds" / "scenes" / "weights"
SHIPPED: Mapping[str, str] = {"scenes": "flow", "scenes-sd": "sd", "scenes-flow": "flow"}
SHIPPED_CLIP = "clip"
REMOTE = "http://127.0.0.1:8000"
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
SCENES_PROMPTS = re.compile(r"scenes(?P<held>-held-out)?(?:-(?P<kind>single|count|pair))?(?::(?P<count>\d+))?")


# Methods.


def method_names() -> dict[str, str]:
    """Every method, as it is typed, with the first line of its file; nothing is imported."""
    found = {}
    for file in sorted((PACKAGE / "methods").glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.ClassDef) and node.name == "Settings" for node in tree.body):
            found[file.stem.replace("_", "-")] = (ast.get_docstring(tree) or "").split("\n")[0]
    return found


def method_settings(name: str) -> type[Any]:
    """The settings class of a method; dashes and underscores are the same. Raises BadInput for an unknown name."""
    known = method_names()
    if name.replace("_", "-") not in known:
        raise BadInput(f"there is no method {name!r}; {suggest(name, known)}")
    settings: type[Any] = importlib.import_module(f"tropism.methods.{name.replace('-', '_')}").Settings
    return settings


# Models.


def check_model(name: str) -> str | Path:
    """The folder, hub name or function behind a name; a function is imported, not called. Raises BadInput for a folder
    without a pipeline and for an unknown name."""
    if _is_function(name):
        module, _, function = name.rpartition(":")
        load_function(module, function, "model")
        return name
    if name in SHIPPED:
        folder = WEIGHTS / SHIPPED[name]
        if not (folder / "model_index.json").is_file():
            raise BadInput(f"the weights of {name} are not in this installation ({folder}); reinstall tropism")
        return folder
    folder = Path(name).expanduser()
    if folder.exists():
        if not (folder / "model_index.json").is_file():
            raise BadInput(f"model is {name}, which has no model_index.json; wanted the folder of a diffusers pipeline")
        return folder
    if not HUB_NAME.fullmatch(name) or name.startswith((".", "/", "~")):
        raise BadInput(
            f"there is no model {name!r}; wanted {', '.join(SHIPPED)}, a folder, a hub name (owner/model), or "
            "MODULE:FUNCTION"
        )
    return name


def _is_function(name: str) -> bool:
    module, _, function = name.rpartition(":")
    return bool(module) and function.isidentifier() and not Path(name).expanduser().exists()


def load_model(
    name: str, dtype: torch.dtype, device: torch.device, image_size: tuple[int, int] | None = None
) -> Trainable:
    """The model of that name. Raises ValueError or OSError, in one sentence, when it cannot be loaded."""
    from tropism.models.quiet import quiet_libraries

    quiet_libraries()
    if _is_function(name):
        if image_size is not None:
            raise BadInput(f"image_size is {image_size}, but {name} decides the size itself; leave image_size out")
        return _called(name).to(device, dtype)
    from tropism.models.pipelines import load_pipeline

    return load_pipeline(check_model(name), dtype, device, image_size=image_size)


def families() -> list[tuple[str, ...]]:
    """The table of model families, its head first."""
    from tropism.models.quiet import quiet_libraries

    quiet_libraries()
    from tropism.models.describe import rows

    return rows()


def describe_model(name: str) -> dict[str, str]:
    """What a model is, without its weights. Raises ValueError or OSError, in one sentence, for none and for what is
    not supported."""
    from tropism.models.quiet import quiet_libraries

    quiet_libraries()
    from tropism.models.describe import describe, described
    from tropism.models.pipelines import hub_index

    found = check_model(name)
    if _is_function(name):
        return described(_called(name))
    return describe(found) if isinstance(found, Path) else describe(found, hub_index(found))


def _called(name: str) -> Trainable:
    """What the user's function returns. Raises BadInput when it fails, or returns anything but a model."""
    from tropism.models.trainable import Trainable

    module, _, function = name.rpartition(":")
    call = load_function(module, function, "model")
    try:
        made = call()
    except Exception as error:
        raise BadInput(f"model is {name}, which raised {type(error).__name__}: {one_line(error)}") from error
    if not isinstance(made, Trainable):
        raise BadInput(f"model is {name}, which returned a {type(made).__name__}; wanted an OwnModel or a pipeline")
    return made


def exporter(model: str) -> Any:
    """The module ``tropism.models.exported``. Raises BadInput for a model that is no pipeline."""
    if _is_function(model):
        raise BadInput(f"model is {model}, and export knows diffusers' pipelines; its adapter is safetensors as it is")
    from tropism.models.quiet import quiet_libraries

    quiet_libraries()
    return importlib.import_module("tropism.models.exported")


# Prompts.


def own_prompts(model: str, held_out: bool) -> str | None:
    """The name of the prompts that a model was made for; None when there are none."""
    return ("scenes-held-out" if held_out else "scenes") if model in SHIPPED else None


def read_prompt_set(name: str, field: str = "prompts") -> PromptSet:
    """A file of prompts, or a set by name. Raises BadInput.

    The sets are scenes and scenes-held-out; -single, -count or -pair asks for captions of one kind, :N for how many
    (scenes-held-out-pair:16); usual are 512 to train on, and 64 that are held out.
    """
    from tropism.data.prompts import PromptSet, read_prompts
    from tropism.worlds.scenes import KINDS, captions

    match = SCENES_PROMPTS.fullmatch(name)
    try:
        if match is None and name.startswith("scenes") and not Path(name).suffix:
            raise ValueError("wanted scenes or scenes-held-out, then -single, -count or -pair, then :N, or a file")
        if match is None or Path(name).is_file():
            return read_prompts(name)
        kinds = (match["kind"],) if match["kind"] else KINDS
        split, usual = ("held_out", 64) if match["held"] else ("train", 512)
        return PromptSet(captions(int(match["count"] or usual), 0, split, kinds))  # type: ignore[arg-type]
    except (ValueError, OSError) as error:
        raise BadInput(f"{field} is {name}: {one_line(error)}") from error


# Rewards.


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
    return ["scenes"] if model in SHIPPED else []


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
    if spec.kind == "clip" and spec.source is None and model in SHIPPED:
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


def _verified(mode: Literal["score", "pass"]) -> Callable[[str | None, torch.device], Reward]:
    def build(source: str | None, device: torch.device) -> Reward:
        from tropism.rewards import ScenesReward
        from tropism.worlds.scenes import verify_batch

        return ScenesReward(verify_batch, mode)

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
