"""Checkpoints: everything the next step needs, as safetensors and JSON, written to a temporary name and renamed.

A checkpoint is a folder with the adapter (as ``save_adapter`` writes it, so it can be drawn with),
``state.safetensors`` (the optimizer's tensors as ``optimizer/<parameter>/<name>``, ``generator``, ``ema/<name>``) and
``state.json`` (the step, the optimizer's settings, and what the method remembers).
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

if TYPE_CHECKING:
    from tropism.ema import Ema
    from tropism.models.latent_pipeline import LatentPipeline

KEPT = 2


def save_checkpoint(
    folder: Path,
    step: int,
    model: LatentPipeline,
    optimizer: torch.optim.Optimizer,
    method: Any,
    ema: Ema | None = None,
) -> Path:
    """Writes ``folder/step-<step>`` and removes all but the last two. Whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:06}"
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
        new = Path(temporary) / "new"
        model.save_adapter(new)
        tensors, settings = optimizer_state(optimizer)
        generator = getattr(method, "generator", None)
        if isinstance(generator, torch.Generator):
            tensors["generator"] = generator.get_state()
        if ema is not None:
            tensors |= {f"ema/{name}": value for name, value in ema.state_dict().items()}
        save_file(
            {name: value.detach().cpu().contiguous() for name, value in tensors.items()}, new / "state.safetensors"
        )
        state = {"step": step, "optimizer": settings, "method": method_state(method)}
        (new / "state.json").write_text(json.dumps(state), encoding="utf-8")
        if final.exists():
            shutil.rmtree(final)
        os.replace(new, final)
    for old in checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(folder.glob("step-*")) if folder.is_dir() else []


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Its tensors by ``optimizer/<parameter>/<name>``, and the settings of its groups as plain values."""
    state = optimizer.state_dict()
    tensors = {
        f"optimizer/{parameter}/{name}": value if isinstance(value, Tensor) else torch.tensor(value)
        for parameter, entries in state["state"].items()
        for name, value in entries.items()
    }
    return tensors, state["param_groups"]


def method_state(method: Any) -> dict[str, Any]:
    """What a method remembers from step to step: its own ``state_dict``, or that of its credit's statistics."""
    stats = getattr(getattr(method, "credit", None), "stats", None)
    holders: dict[str, Any] = {"method": method, "statistics": stats}
    return {name: holder.state_dict() for name, holder in holders.items() if hasattr(holder, "state_dict")}
