"""diffusers pipelines by name or local folder. What can be wrong with a folder is said before its weights load."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import diffusers
import torch
import transformers
from diffusers import (
    AnimateDiffPipeline,
    DiffusionPipeline,
    FluxPipeline,
    LatentConsistencyModelPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from safetensors import SafetensorError, safe_open

from tropism.base import Hops
from tropism.models.animatediff import AnimateDiff
from tropism.models.flux import Flux
from tropism.models.latent_consistency import LatentConsistency
from tropism.models.latent_pipeline import LatentPipeline
from tropism.models.pixart import PixArt
from tropism.models.sketch import sketch
from tropism.models.stable_diffusion import StableDiffusion
from tropism.models.stable_diffusion_3 import StableDiffusion3
from tropism.models.stable_diffusion_xl import StableDiffusionXL
from tropism.models.trainable import DEFAULTS_FILE

FAMILIES: Mapping[type[Any], type[LatentPipeline]] = {
    StableDiffusionPipeline: StableDiffusion,
    LatentConsistencyModelPipeline: LatentConsistency,
    StableDiffusionXLPipeline: StableDiffusionXL,
    StableDiffusion3Pipeline: StableDiffusion3,
    FluxPipeline: Flux,
    PixArtAlphaPipeline: PixArt,
    PixArtSigmaPipeline: PixArt,
    AnimateDiffPipeline: AnimateDiff,
}
DISTILLED: Mapping[str, Mapping[str, Any]] = {  # on the hub, where no file says so
    "stabilityai/sd-turbo": {"guidance_scale": 1.0, "steps": 1},
    "stabilityai/sdxl-turbo": {"guidance_scale": 1.0, "steps": 1},
}
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
BASE = "base"  # the entry of tropism.json that says from which folder a pipeline takes the parts it lacks
WEIGHTLESS = ("scheduler", "tokenizer", "feature_extractor")


def load_pipeline(
    name_or_path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    *,
    guidance_scale: float | None = None,
    steps: int | None = None,
    negative_prompt: str = "",
    image_size: tuple[int, int] | None = None,
    onednn: bool = True,
    **from_pretrained: Any,
) -> LatentPipeline:
    """A pipeline from a local folder (as ``pipe.save_pretrained`` writes it) or, when there is none, a hub name.

    Default guidance and steps are the pipeline class's, unless the folder has a ``tropism.json`` such as
    {"guidance_scale": 3.0, "steps": 20}, unless given here; "hops" there marks a student. ``from_pretrained`` takes
    diffusers' own arguments (``variant="fp16"``, ``safety_checker=None``, ``text_encoder_3=None``). Weights are read
    from safetensors only.
    Raises ValueError, in one sentence and before any weights load, for a missing folder, unknown family or wrong file.
    """
    folder = Path(name_or_path)
    local = folder.exists()
    if local:
        index = read_index(folder)
    elif HUB_NAME.fullmatch(str(name_or_path)):
        index = hub_index(str(name_or_path))
    else:
        raise ValueError(
            f"there is no folder {name_or_path}; give a folder with a model_index.json or a hub name (owner/model)"
        )
    kind = pipeline_class(str(index.get("_class_name")), str(name_or_path))
    absent = {name: None for name, value in index.items() if isinstance(value, list) and value[0] is None}
    options = {**absent, **from_pretrained}
    defaults = read_defaults(folder) if local else DISTILLED.get(str(name_or_path), {})
    borrowed: Path | None = None
    if local:
        parts = {name: value for name, value in index.items() if name not in options}
        borrowed = read_base(folder)
        _check_parts(folder, parts, borrowed)
        if not from_pretrained:
            FAMILIES[kind].check(sketch(folder, index, borrowed))
        options |= _borrow(folder, parts, borrowed, dtype)
    pipe = kind.from_pretrained(str(name_or_path), dtype=dtype, use_safetensors=True, local_files_only=local, **options)
    model = wrap_pipeline(
        pipe.to(device),
        guidance_scale=defaults.get("guidance_scale") if guidance_scale is None else guidance_scale,
        steps=int(defaults["steps"]) if steps is None and "steps" in defaults else steps,
        negative_prompt=negative_prompt,
        image_size=image_size,
        onednn=onednn,
    )
    model.hops, model.borrows = defaults.get("hops"), borrowed is not None
    return model


def wrap_pipeline(
    pipe: Any,
    *,
    guidance_scale: float | None = None,
    steps: int | None = None,
    negative_prompt: str = "",
    image_size: tuple[int, int] | None = None,
    onednn: bool = True,
) -> LatentPipeline:
    """The same for a pipeline that is loaded already; it becomes ``.pipe``. Raises ValueError for an unknown family."""
    kind = FAMILIES[pipeline_class(type(pipe).__name__, "this pipeline")]
    return kind(
        pipe,
        guidance_scale=guidance_scale,
        steps=steps,
        negative_prompt=negative_prompt,
        image_size=image_size,
        onednn=onednn,
    )


def read_defaults(folder: Path) -> dict[str, Any]:
    """``guidance_scale``, ``steps``, and of what was distilled ``hops`` and whether it is ``told`` its guidance, of
    ``folder/tropism.json``, or {}.

    Raises ValueError for any other content.
    """
    file = folder / DEFAULTS_FILE
    if not file.is_file():
        return {}
    content = read_json(file)
    wrong = sorted(set(content) - {"guidance_scale", "steps", "hops", "told", BASE})
    if wrong:
        raise ValueError(f"{file} has the entries {wrong}; wanted guidance_scale, steps, hops, told and base only")
    if not isinstance(content.get("told", False), bool):
        raise ValueError(f"{file} gives told as {content['told']!r}; wanted true or false")
    if content.get("hops", "ode") not in get_args(Hops):
        raise ValueError(f"{file} gives hops as {content['hops']!r}; wanted one of {', '.join(get_args(Hops))}")
    for name, value in content.items():
        if name in ("hops", "told", BASE):
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise ValueError(f"{file} gives {name} as {value!r}; wanted a positive number")
        if name == "steps" and value != int(value):
            raise ValueError(f"{file} gives steps as {value!r}; wanted a whole number")
    return content


def read_base(folder: Path) -> Path | None:
    """The folder, named in ``tropism.json`` from here, whose parts complete this one; None where it stands alone.

    Raises ValueError for one that is not there.
    """
    named = read_defaults(folder).get(BASE)
    if named is None:
        return None
    base = folder / str(named)
    if not (base / "model_index.json").is_file():
        raise ValueError(f"{folder / DEFAULTS_FILE} gives base as {named!r}, which is no pipeline; wanted its folder")
    return base


def _borrow(folder: Path, index: Mapping[str, Any], base: Path | None, dtype: torch.dtype) -> dict[str, Any]:
    """The parts that only the base has, loaded."""
    loaded: dict[str, Any] = {}
    for name, value in index.items():
        if base is None or not isinstance(value, list) or (folder / name).exists():
            continue
        kind = getattr({"diffusers": diffusers, "transformers": transformers}[value[0]], value[1])
        how = {} if name.startswith(WEIGHTLESS) else {"torch_dtype" if value[0] == "diffusers" else "dtype": dtype}
        loaded[name] = kind.from_pretrained(str(base / name), **how)
    return loaded


def pipeline_class(name: str, where: str) -> type[Any]:
    """The class of diffusers that is called so. Raises ValueError for one that is of no family."""
    for kind in FAMILIES:
        if kind.__name__ == name:
            return kind
    known = ", ".join(kind.__name__ for kind in FAMILIES)
    raise ValueError(f"{where} is a {name}; wanted one of {known} (another family needs a file in tropism/models)")


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError for anything else."""
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); restore it from where the model came") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}; wanted a JSON object")
    return content


def read_index(folder: Path) -> dict[str, Any]:
    """What ``model_index.json`` says. Raises ValueError where there is none."""
    if folder.is_file():
        raise ValueError(f"{folder} is a file; wanted a folder: convert it by from_single_file and save_pretrained")
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} has no model_index.json; wanted what a diffusers pipeline's save_pretrained writes")
    return read_json(folder / "model_index.json")


def hub_index(name: str) -> dict[str, Any]:
    """The model_index.json of a hub name. Raises ValueError where there is none."""
    try:
        return dict(DiffusionPipeline.load_config(name))
    except (OSError, ValueError) as error:
        raise ValueError(f"no folder {name} and no such model on the hub or in its cache; check the name") from error


def _check_parts(folder: Path, index: Mapping[str, Any], base: Path | None = None) -> None:
    """Every part that the index names has its folder, and every network a safetensors file whose header is sound."""
    for name, value in index.items():
        if not isinstance(value, list):
            continue
        part = folder / name if base is None or (folder / name).is_dir() else base / name
        if not part.is_dir():
            raise ValueError(f"{folder} has no {name} although its model_index.json names one; copy the whole folder")
        if name.startswith(WEIGHTLESS):
            continue
        files = sorted(part.glob("*.safetensors"))
        if not files:
            found = ", ".join(sorted(file.name for file in part.iterdir())) or "nothing"
            raise ValueError(f"{part} has no .safetensors file, only {found}; save with safe_serialization=True")
        for file in files:
            _check_header(file)


def _check_header(file: Path) -> None:
    try:
        with safe_open(str(file), framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} ({file.stat().st_size} bytes) is not a sound safetensors file ({error}); download it again, "
            "a file of about 130 bytes is a git-lfs pointer"
        ) from error
