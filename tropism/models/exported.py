"""A trained adapter in the formats of other programs: tensors under their names, or a whole pipeline with it inside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import diffusers
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import Tensor, nn

from tropism.models.adapters import LORA_FILE, METADATA, Lora
from tropism.models.few_step import scheduler_lines
from tropism.models.lora_names import Layer, in_kohya
from tropism.models.pipelines import FAMILIES, pipeline_class, read_defaults
from tropism.models.plain_adapters import CONFIG_FILE, PlainLora
from tropism.models.trainable import DEFAULTS_FILE

if TYPE_CHECKING:
    from tropism.models.trainable import Trainable

COMFY_TRANSFORMERS = ("StableDiffusion3Pipeline", "FluxPipeline", "PixArtAlphaPipeline", "PixArtSigmaPipeline")
"""Those whose layers ComfyUI knows by their names in diffusers (comfy/lora.py, model_lora_keys_unet)."""


class Base(NamedTuple):
    """What the files of a pipeline say of it; no weights are read."""

    pipeline: str  # its class
    part: str  # what denoises: unet or transformer
    network: Mapping[str, Any]  # its config
    prediction: str  # epsilon, v_prediction, sample or flow
    resolution: tuple[int, int]  # height and width in pixels


class Drawing(NamedTuple):
    """How what was trained is drawn with, where that is not as its base model."""

    imports: list[str]
    lines: list[str]  # assignments to ``pipe``
    steps: int
    guidance_scale: float


class LoraFile(NamedTuple):
    """What a LoRA file of some format holds."""

    tensors: dict[str, Tensor]
    rank: int
    alpha: float
    metadata: dict[str, str]  # what the format itself asks for in the header
    config: dict[str, Any] | None  # of the JSON file beside it, where there is one


def read_base(name_or_path: str | Path) -> Base:
    """Of a local folder or a hub name. Raises ValueError or OSError."""
    index: Mapping[str, Any] = DiffusionPipeline.load_config(str(name_or_path))
    part = "unet" if "unet" in index else "transformer"
    if part not in index:
        raise ValueError(f"{name_or_path} has neither a unet nor a transformer; wanted a text-to-image pipeline")
    network = UNet2DConditionModel.load_config(str(name_or_path), subfolder=part)
    vae = UNet2DConditionModel.load_config(str(name_or_path), subfolder="vae")
    scheduler = DDIMScheduler.load_config(str(name_or_path), subfolder="scheduler")
    prediction = "flow" if "FlowMatch" in scheduler["_class_name"] else scheduler.get("prediction_type", "epsilon")
    size = network.get("sample_size") or 128
    height, width = (size, size) if isinstance(size, int) else size
    cell = 2 ** (len(vae["block_out_channels"]) - 1)
    return Base(str(index["_class_name"]), part, dict(network), str(prediction), (height * cell, width * cell))


def read_drawing(name_or_path: str | Path, weights: Path) -> Drawing | None:
    """Of a student: the scheduler, steps and guidance that ``weights/tropism.json`` says; None for what is no student.

    Raises ValueError or OSError.
    """
    told = read_defaults(weights)
    if "hops" not in told:
        return None
    index: Mapping[str, Any] = DiffusionPipeline.load_config(str(name_or_path))
    family = FAMILIES[pipeline_class(str(index["_class_name"]), str(name_or_path))]
    own = getattr(diffusers, index["scheduler"][1]).from_pretrained(str(name_or_path), subfolder="scheduler")
    scheduler = family.few_step_scheduler(own, told["hops"], int(told["steps"]))
    return Drawing(*scheduler_lines(scheduler), int(told["steps"]), float(told["guidance_scale"]))


def lora_file(format: str, folder: Path, base: Base, name: str, dtype: torch.dtype) -> LoraFile:
    """The LoRA in ``folder`` as diffusers, peft, kohya or comfyui name it; ``name`` is that of its base model.

    Raises ValueError, in one sentence, when there is no sound LoRA and when the format has no names for its layers.
    """
    weights, config = _read(folder, base)
    _check_plain(weights, config, folder)
    cast = {key: value.to(dtype).contiguous() for key, value in weights.items()}
    if not all(bool(value.isfinite().all()) for value in cast.values()):
        raise ValueError(f"the LoRA in {folder} has weights that are infinite or NaN in {dtype}; use another step")
    rank, alpha = int(config.r), float(config.lora_alpha)
    if format == "diffusers":
        if not (folder / LORA_FILE).is_file():
            raise ValueError(f"no loader of diffusers reads a LoRA of a {base.pipeline}; use peft, or merge")
        with safe_open(str(folder / LORA_FILE), framework="pt") as opened:
            header = {METADATA: str(opened.metadata()[METADATA])}
        return LoraFile({f"{base.part}.{key}": value for key, value in cast.items()}, rank, alpha, header, None)
    if format == "peft":
        plain = {f"base_model.model.{key}": value for key, value in cast.items()}
        return LoraFile(plain, rank, alpha, {}, _peft_config(config, name))
    layers = _layers(cast, alpha)
    if format == "comfyui" and base.part == "transformer":
        return LoraFile(_comfy(layers, base.pipeline), rank, alpha, {}, None)
    resnets = base.network.get("layers_per_block", 2)
    tensors: dict[str, Tensor] = {}
    for key, layer in in_kohya(layers, base.pipeline, resnets if isinstance(resnets, int) else resnets[0]).items():
        tensors |= {f"{key}.lora_down.weight": layer.down, f"{key}.lora_up.weight": layer.up}
        tensors[f"{key}.alpha"] = torch.tensor(layer.alpha)
    return LoraFile(tensors, rank, alpha, {}, None)


def _check_plain(weights: Mapping[str, Tensor], config: LoraConfig, folder: Path) -> None:
    """Raises ValueError unless every layer has an A and a B of the one rank, scaled by alpha / rank."""
    down = {key for key in weights if key.endswith(".lora_A.weight")}
    pairs = [(weights[key], weights.get(key.replace(".lora_A.", ".lora_B."))) for key in down]
    special = config.rank_pattern or config.alpha_pattern or config.use_rslora or config.use_dora
    if special or 2 * len(down) != len(weights) or not down:
        raise ValueError(f"the LoRA in {folder} is not a plain one of pairs A and B; wanted what tropism trains")
    if any(b is None or a.shape[0] != config.r or b.shape[1] != config.r for a, b in pairs):
        raise ValueError(f"the LoRA in {folder} is not of rank {config.r}, as its header says; wanted a sound file")


def _layers(weights: Mapping[str, Tensor], alpha: float) -> dict[str, Layer]:
    down = {key.removesuffix(".lora_A.weight"): value for key, value in weights.items() if ".lora_A." in key}
    return {key: Layer(value, weights[f"{key}.lora_B.weight"], alpha) for key, value in down.items()}


def _comfy(layers: Mapping[str, Layer], pipeline: str) -> dict[str, Tensor]:
    """diffusers' names. ``alpha`` is written where it is not the rank, which is what a file without it means."""
    if pipeline not in COMFY_TRANSFORMERS:
        raise ValueError(f"ComfyUI has no names for the layers of a {pipeline}; use diffusers or peft")
    tensors: dict[str, Tensor] = {}
    for key, (down, up, alpha) in layers.items():
        tensors |= {f"transformer.{key}.lora_A.weight": down, f"transformer.{key}.lora_B.weight": up}
        if alpha != down.shape[0]:
            tensors[f"transformer.{key}.alpha"] = torch.tensor(alpha)
    return tensors


def _peft_config(config: LoraConfig, name: str) -> dict[str, Any]:
    config.base_model_name_or_path, config.inference_mode = name, True
    facts: dict[str, Any] = config.to_dict()  # type: ignore[no-untyped-call]
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in facts.items()}
    return dict(json.loads(json.dumps(plain, default=str)))


def save_merged(model: Trainable, folder: Path, dtype: torch.dtype) -> None:
    """The whole pipeline, what was trained inside its weights, with ``tropism.json``: how it is drawn with here.

    The model is of no use to tropism afterwards: its LoRA is gone.
    """
    _merge(getattr(model.pipe, model.part))
    for module in model.pipe.components.values():
        if isinstance(module, nn.Module) and next(module.parameters()).dtype != dtype:
            module.to(dtype)
    model.pipe.save_pretrained(folder, safe_serialization=True)
    _forget_places(folder)
    (folder / DEFAULTS_FILE).write_text(json.dumps(model.told()), encoding="utf-8")


def _forget_places(folder: Path) -> None:
    """Where each part was loaded from is dropped where it is a folder of this machine; the name of a hub's stays."""
    for file in [folder / "model_index.json", *folder.glob("*/*config.json")]:
        facts = json.loads(file.read_text(encoding="utf-8"))
        if Path(facts.get("_name_or_path") or folder / "none").exists():
            del facts["_name_or_path"]
            file.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _merge(net: Any) -> None:
    """Every layer with a LoRA becomes a layer of its own kind, the product inside its weight."""
    for name, layer in list(net.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            parent, _, last = name.rpartition(".")
            net.get_submodule(parent)._modules[last] = layer.get_base_layer()
    if hasattr(net, "peft_config"):
        del net.peft_config
        net._hf_peft_config_loaded = False


def _read(folder: Path, base: Base) -> tuple[dict[str, Tensor], LoraConfig]:
    """Weights (PEFT names) and config of what a run has saved, for diffusers or for PEFT."""
    reader = PlainLora if (folder / CONFIG_FILE).is_file() else Lora
    return reader.read(folder, base.part)
