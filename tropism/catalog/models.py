"""Models by name: those of the package, folders, hub names, and functions that make one."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tropism.config import BadInput, one_line
from tropism.plugins import load_function

if TYPE_CHECKING:
    import torch

    from tropism.models.trainable import Trainable

WEIGHTS = Path(__file__).parents[1] / "worlds" / "scenes" / "weights"
SHIPPED: Mapping[str, str] = {
    "scenes": "flow",
    "scenes-sd": "sd",
    "scenes-flow": "flow",
    "scenes-lcm": "lcm",
    "scenes-dmd": "dmd",
    "scenes-clips": "clips",
}
MELODIES = Path(__file__).parents[1] / "worlds" / "melodies" / "weights" / "melodies.safetensors"
BUILT: Mapping[str, str] = {  # names of functions
    "scenes-tokens": "tropism.catalog.models:scenes_tokens",
    "melodies": "tropism.catalog.models:melodies",
}
WORLDS: Mapping[str, str] = {
    **dict.fromkeys([*SHIPPED, "scenes-tokens"], "scenes"),
    "scenes-clips": "moving",
    "melodies": "melodies",
}
ONLY: Mapping[str, str] = {"scenes-tokens": "single"}  # the kind of captions that a model was made for, if not for all


def world_of(model: str) -> str | None:
    """The world that a model of the package draws: its prompts, and its reward, are called so. None for any other."""
    return WORLDS.get(model)


HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def check_model(name: str) -> str | Path:
    """The folder, hub name or function behind a name; a function is imported, not called. Raises BadInput for a folder
    without a pipeline and for an unknown name."""
    name = BUILT.get(name, name)
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
            f"there is no model {name!r}; wanted {', '.join([*SHIPPED, *BUILT])}, a folder, a hub name (owner/model), "
            "or MODULE:FUNCTION"
        )
    return name


def _is_function(name: str) -> bool:
    module, _, function = name.rpartition(":")
    return bool(module) and function.isidentifier() and not Path(name).expanduser().exists()


def melodies() -> Trainable:
    """The model that ships with the melodies world. Raises BadInput where its weights are missing."""
    from tropism.models.melodies import load_melodies
    from tropism.worlds.melodies import FRAMES_A_BEAT, score

    if not MELODIES.is_file():
        raise BadInput(f"the weights of melodies are not in this installation ({MELODIES}); reinstall tropism")
    return load_melodies(MELODIES, lambda text: score(text, FRAMES_A_BEAT))


def scenes_tokens() -> Trainable:
    """The model of image tokens that ships with the scenes world: single objects. Raises BadInput where its weights are
    missing."""
    from tropism.models.token_gpt import load_tokens

    try:
        return load_tokens(WEIGHTS / "tokens")
    except ValueError as error:
        raise BadInput(f"scenes-tokens is not in this installation ({error}); reinstall tropism") from error


def load_model(
    name: str, dtype: torch.dtype, device: torch.device, image_size: tuple[int, int] | None = None
) -> Trainable:
    """The model of that name. Raises ValueError or OSError, in one sentence, when it cannot be loaded."""
    from tropism.models.quiet import quiet_libraries

    quiet_libraries()
    name = BUILT.get(name, name)
    if _is_function(name):
        if image_size is not None:
            raise BadInput(f"image_size is {image_size}, but {name} decides the size itself; leave image_size out")
        return _called(name).to(device, dtype)
    from tropism.models.pipelines import load_pipeline

    return load_pipeline(check_model(name), dtype, device, image_size=image_size)


def wrap(pipe: Any) -> Trainable:
    """A diffusers pipeline that is loaded already, as it is; a model of this library is itself. Raises ValueError for
    an unknown family."""
    from tropism.models.pipelines import wrap_pipeline
    from tropism.models.trainable import Trainable

    return pipe if isinstance(pipe, Trainable) else wrap_pipeline(pipe)


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
    name = BUILT.get(name, name)
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


def told(adapter: Path) -> dict[str, Any]:
    """How an adapter says that it is to be drawn with, if it does. Raises ValueError."""
    from tropism.models.pipelines import read_defaults

    return read_defaults(adapter)


def exporter(model: str) -> Any:
    """The module ``tropism.models.exported``. Raises BadInput for a model that is no pipeline."""
    if _is_function(BUILT.get(model, model)):
        raise BadInput(f"model is {model}, and export knows diffusers' pipelines; its adapter is safetensors as it is")
    from tropism.models.quiet import quiet_libraries

    quiet_libraries()
    return importlib.import_module("tropism.models.exported")
