"""Checkpoints: everything the next step needs, as safetensors and JSON, written to a temporary name and renamed.

A checkpoint is a folder with the adapter (as ``save_adapter`` writes it, so it can be drawn with),
``state.safetensors`` (the optimizer's tensors as ``optimizer/<parameter>/<name>``, ``generator``, ``ema/<name>``,
``target/<name>``, ``proxy/<name>``, ``term<number>/<name>``) and ``state.json`` (the step, the optimizer's settings,
what the method remembers, and what the run says of itself). With an average of the weights its ``adapter`` folder has
them averaged, as they were evaluated.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tropism.resume import checkpoints
from tropism.sums import check_seal, seal

if TYPE_CHECKING:
    from tropism.ema import Ema
    from tropism.models.trainable import Trainable

KEPT = 2
PARTS = ("target", "proxy")
OLD = ".old"  # within a temporary folder: what a checkpoint that is whole replaces


def save_checkpoint(
    folder: Path,
    step: int,
    model: Trainable,
    optimizer: torch.optim.Optimizer,
    method: Any,
    ema: Ema | None = None,
    run: Mapping[str, Any] | None = None,
    name: str = "",
    limit: int = KEPT,
) -> Path:
    """Writes ``folder/step-<step>``, the last ``limit`` of which stay, or ``folder/<name>``; whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / (name or f"step-{step:06}")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
        new = Path(temporary) / final.name
        model.save_adapter(new)
        tensors, settings = optimizer_state(optimizer)
        if (generator := _generator(method)) is not None:
            tensors["generator"] = generator.get_state()
        for part, holder in tensor_holders(method).items():
            tensors |= {f"{part}/{key}": value for key, value in holder.state_dict().items()}
        if ema is not None:
            tensors |= {f"ema/{key}": value for key, value in ema.state_dict().items()}
            with ema.swapped():
                model.save_adapter(new / "adapter")
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, new / "state.safetensors")
        remembered = {key: holder.state_dict() for key, holder in method_holders(method).items()}
        state = {"step": step, "optimizer": settings, "method": remembered, "run": dict(run or {})}
        (new / "state.json").write_text(json.dumps(state), encoding="utf-8")
        seal(new)
        if final.exists():
            os.replace(final, Path(temporary) / OLD)
        os.replace(new, final)
    for old in checkpoints(folder)[:-limit]:
        shutil.rmtree(old)
    return final


def load_checkpoint(
    folder: Path, model: Trainable, optimizer: torch.optim.Optimizer, method: Any, ema: Ema | None = None
) -> dict[str, Any]:
    """Puts everything back as it was at ``save_checkpoint`` and returns its ``run``, with the ``step``.

    Raises ValueError, in one sentence, for a checkpoint that is not whole or not of this run's kind.
    """
    check_seal(folder)
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "state.safetensors")
        step, settings, remembered, run = (state[name] for name in ("step", "optimizer", "method", "run"))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"the checkpoint {folder} is not whole ({error}); go on from another") from error
    generator, parts = _generator(method), tensor_holders(method)
    wanted = {"generator"} if generator is not None else set()
    wanted |= {"ema"} if ema is not None else set()
    wanted |= set(parts)
    for name in sorted(wanted ^ ({name.split("/")[0] for name in tensors} - {"optimizer"})):
        raise ValueError(
            f"the checkpoint {folder} has {'no' if name in wanted else 'a'} {name}; it is of another kind of run"
        )
    holders = method_holders(method)
    if set(holders) != set(remembered):
        raise ValueError(f"the checkpoint {folder} remembers {sorted(remembered)}; wanted {sorted(holders)}")
    model.load_adapter(folder)
    load_optimizer(optimizer, tensors, settings)
    if generator is not None:
        generator.set_state(tensors["generator"])
    if ema is not None:
        ema.load_state_dict(under("ema", tensors))
    for part, holder in parts.items():
        holder.load_state_dict(under(part, tensors))
    for name, holder in holders.items():
        holder.load_state_dict(remembered[name])
    return {"step": step, **run}


def tidy(folder: Path, last: int) -> None:
    """Removes checkpoints after step ``last``, which a run that goes on from there takes back, and what a process that
    was killed had half written; what lacked only its rename is finished first."""
    for half in folder.glob(".saving-*"):
        for new in half.iterdir() if (half / OLD).exists() else ():
            if new.name != OLD and not (folder / new.name).exists():
                os.replace(new, folder / new.name)
        shutil.rmtree(half)
    for later in checkpoints(folder):
        if int(later.name.removeprefix("step-")) > last:
            shutil.rmtree(later)


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Its tensors by ``optimizer/<parameter>/<name>``, and the settings of its groups as plain values."""
    state = optimizer.state_dict()
    tensors = {
        f"optimizer/{parameter}/{name}": value if isinstance(value, Tensor) else torch.tensor(value)
        for parameter, entries in state["state"].items()
        for name, value in entries.items()
    }
    return tensors, state["param_groups"]


def load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], settings: list[dict[str, Any]]
) -> None:
    """The other way round. Raises ValueError for another number of parameters."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in under("optimizer", tensors).items():
        parameter, entry = name.split("/")
        state.setdefault(int(parameter), {})[entry] = value
    optimizer.load_state_dict({"state": state, "param_groups": settings})


def under(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries below ``name/``, without it."""
    return {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}


def method_holders(method: Any) -> dict[str, Any]:
    """What a method remembers from step to step: its own ``state_dict``, or that of its credit's statistics."""
    stats = getattr(getattr(method, "credit", None), "stats", None)
    holders: dict[str, Any] = {"method": method, "statistics": stats}
    return {name: holder for name, holder in holders.items() if hasattr(holder, "state_dict")}


def tensor_holders(method: Any) -> dict[str, Any]:
    """What a method remembers as tensors: the average of the student that a distillation compares it with, the proxy
    that stands for its reward, and terms that learn."""
    holders = {name: getattr(method, name, None) for name in PARTS}
    holders |= {f"term{place}": term for place, term in enumerate(getattr(method, "terms", ()))}
    return {name: holder for name, holder in holders.items() if hasattr(holder, "load_state_dict")}


def _generator(method: Any) -> torch.Generator | None:
    """The source of a method's chance, if it has one."""
    found = getattr(method, "generator", None)
    return found if isinstance(found, torch.Generator) else None
