"""What the header of an exported LoRA file says: of tropism, of Stability's ModelSpec, and as kohya's scripts write it.

Keys and hashes are those of github.com/Stability-AI/ModelSpec 1.0.1 (``modelspec.``) and of sd-scripts (``ss_`` and
``sshs_``: library/train_util.py, precalculate_safetensors_hashes). Programs show them, and know a file by its hashes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from safetensors.torch import save

from tropism import __version__

if TYPE_CHECKING:
    from tropism.models.exported import Base, LoraFile

LEGACY = range(0x100000, 0x110000)  # the bytes that the old hash of WebUIs looks at


class Facts(NamedTuple):
    """Where the weights come from."""

    model: str
    method: str
    rewards: str
    step: int | None
    seed: int | None
    date: str  # ISO 8601, of the weights

    @property
    def title(self) -> str:
        """In a few words."""
        return f"{self.method} on {self.model}"


def header(file: LoraFile, base: Base, facts: Facts, format: str) -> dict[str, str]:
    """Everything, as text."""
    kohya = _kohya(file, base, facts) if format in ("kohya", "comfyui") else {}
    written = {"format": "pt", **file.metadata, **_own(facts), **kohya, **_modelspec(base, facts, format)}
    return written | _hashes(file, kohya)


def _own(facts: Facts) -> dict[str, str]:
    step = "" if facts.step is None else str(facts.step)
    found = {"base_model": facts.model, "method": facts.method, "reward": facts.rewards, "step": step}
    return {f"tropism.{name}": value for name, value in {"version": __version__, **found}.items() if value}


def architecture(base: Base) -> str:
    """ModelSpec's name for the kind of network; the pipeline's class where it has none."""
    version_2 = base.network.get("cross_attention_dim") == 1024
    known = {
        "StableDiffusionPipeline": _stable_diffusion(version_2, base.prediction),
        "LatentConsistencyModelPipeline": _stable_diffusion(version_2, base.prediction),
        "StableDiffusionXLPipeline": "stable-diffusion-xl-v1-base",
        "StableDiffusion3Pipeline": "stable-diffusion-3",
        "FluxPipeline": "flux-1-dev" if base.network.get("guidance_embeds") else "flux-1-schnell",
    }
    return known.get(base.pipeline, base.pipeline)


def _stable_diffusion(version_2: bool, prediction: str) -> str:
    kind = "v2-768-v" if prediction == "v_prediction" else "v2-512"
    return f"stable-diffusion-{kind if version_2 else 'v1'}"


def _modelspec(base: Base, facts: Facts, format: str) -> dict[str, str]:
    ldm = format in ("kohya", "comfyui") and base.pipeline == "StableDiffusionXLPipeline"  # its names of layers
    found = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{architecture(base)}/lora",
        "implementation": "https://github.com/Stability-AI/generative-models" if ldm else "diffusers",
        "title": facts.title,
        "description": f"A LoRA trained by tropism with {facts.method} on the reward {facts.rewards}",
        "date": facts.date,
        "resolution": f"{base.resolution[1]}x{base.resolution[0]}",
    }
    prediction = {"epsilon": "epsilon", "v_prediction": "v"}.get(base.prediction)
    return {f"modelspec.{name}": value for name, value in found.items()} | (
        {"modelspec.prediction_type": prediction} if prediction else {}
    )


def _kohya(file: LoraFile, base: Base, facts: Facts) -> dict[str, str]:
    """Rank, alpha and the base model, as sd-scripts says them."""
    modules = {"StableDiffusion3Pipeline": "networks.lora_sd3", "FluxPipeline": "networks.lora_flux"}
    version_2 = base.network.get("cross_attention_dim") == 1024
    versions = {
        "StableDiffusionXLPipeline": "sdxl_base_v1-0",
        "StableDiffusion3Pipeline": "sd3",
        "FluxPipeline": "flux1",
    }
    plain = f"sd_{'v2' if version_2 else 'v1'}{'_v' if base.prediction == 'v_prediction' else ''}"
    found = {
        "ss_network_module": modules.get(base.pipeline, "networks.lora"),
        "ss_network_dim": str(file.rank),
        "ss_network_alpha": f"{file.alpha:g}",
        "ss_base_model_version": versions.get(base.pipeline, plain),
        "ss_sd_model_name": facts.model,
        "ss_v2": str(version_2 and base.pipeline not in versions),
        "ss_output_name": facts.title,
        "ss_training_comment": f"tropism {__version__}, reward {facts.rewards}",
    }
    counts = {"ss_steps": facts.step, "ss_seed": facts.seed}
    return found | {name: str(value) for name, value in counts.items() if value is not None}


def _hashes(file: LoraFile, kohya: Mapping[str, str]) -> dict[str, str]:
    """Of the weights (all bytes after the header), and the two that WebUIs find a kohya file by."""
    content = save(file.tensors, dict(kohya))
    weights = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    found = {"modelspec.hash_sha256": f"0x{weights}"}
    if kohya:
        found["sshs_model_hash"] = weights
    if kohya and len(content) > LEGACY.start:
        found["sshs_legacy_hash"] = hashlib.sha256(content[LEGACY.start : LEGACY.stop]).hexdigest()[:8]
    return found
