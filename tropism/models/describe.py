"""The table of families, and what a pipeline is without loading its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tropism.models.latent_consistency import LatentConsistency
from tropism.models.latent_pipeline import CONSISTENCY, LatentPipeline
from tropism.models.pipelines import DISTILLED, FAMILIES, pipeline_class, read_base, read_defaults, read_index
from tropism.models.sketch import sketch
from tropism.models.trainable import Trainable

HEAD = ("family", "pipelines", "the network says", "guidance", "steps", "LoRA for", "methods")
OWN = (
    "a network of one's own",
    "MODULE:FUNCTION",
    "eps, v, x0 or flow",
    "classifier-free",
    "any",
    "PEFT",
    "all; flow-grpo and scm on a flow",
)
OPTIONS = ("prediction_type", "timestep_spacing", "shift", "use_dynamic_shifting")  # of a scheduler, worth a line


def rows() -> list[tuple[str, ...]]:
    """The table, its head first."""
    found: dict[type[Any], list[str]] = {}
    for pipeline, family in FAMILIES.items():
        found.setdefault(family, []).append(pipeline.__name__)
    body = [
        (about.title, ", ".join(names), about.says, about.guidance, about.steps, about.adapter, about.methods)
        for about, names in ((family.about, names) for family, names in found.items())
    ]
    return [HEAD, *body, OWN]


def describe(source: str | Path, index: Mapping[str, Any] | None = None) -> dict[str, str]:
    """What the pipeline in a folder is; of a hub name, by its index alone. Raises ValueError for the unsupported."""
    folder = Path(source)
    index = read_index(folder) if index is None else index
    pipeline = pipeline_class(str(index.get("_class_name")), str(source))
    family = FAMILIES[pipeline]
    looked = _looked_at(folder, index, family) if folder.is_dir() else _known(str(source), family)
    about = LatentConsistency.about if looked.get("scheduler", "").startswith(CONSISTENCY[0]) else family.about
    return {
        "family": about.title,
        "pipeline": pipeline.__name__,
        "the network says": about.says,
        **looked,
        "LoRA": f"in {family.part} on {', '.join(family.attention_targets)}; saved for {about.adapter}",
        "methods": about.methods,
    }


def _looked_at(folder: Path, index: Mapping[str, Any], family: type[LatentPipeline]) -> dict[str, str]:
    pipe = sketch(folder, index, read_base(folder))
    family.check(pipe)
    (guidance, steps), given = family.defaults(pipe), read_defaults(folder)
    config = pipe.scheduler.config
    options = [f"{name} {config[name]}" for name in OPTIONS if config.get(name) is not None]
    return {
        "scheduler": ", ".join([type(pipe.scheduler).__name__, *options]),
        "guidance": "an input of the network" if family.takes_guidance(pipe) else "classifier-free",
        "defaults": _defaults(given.get("guidance_scale", guidance), given.get("steps", steps)),
    }


def _known(name: str, family: type[LatentPipeline]) -> dict[str, str]:
    said = {"guidance_scale": family.default_guidance, "steps": family.default_steps, **DISTILLED.get(name, {})}
    return {"guidance": family.about.guidance, "defaults": _defaults(said["guidance_scale"], said["steps"])}


def _defaults(guidance: float, steps: float) -> str:
    return f"{steps:g} steps, guidance {guidance:g}"


def described(model: Trainable) -> dict[str, str]:
    """The same of a model that a function made."""
    network = type(getattr(model.pipe, model.part)).__name__
    return {
        "family": f"{type(model).__name__} of {network}",
        "the network says": str(getattr(model.denoiser, "target", "the clean sample")),
        "latents": " x ".join(map(str, model.latent_shape)),
        "defaults": _defaults(model.guidance_scale, model.steps),
        "LoRA": f"on {len(model.attention_targets)} layers",
    }
