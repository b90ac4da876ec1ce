"""``tropism export``: what a run has trained, in the format of another program, in a folder with a model card.

Everything is read and converted before the folder is begun, and the folder is written under another name and renamed.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from tropism import catalog
from tropism.commands import with_adapter
from tropism.config import BadInput, DeviceSettings, ExportSettings, RunFailed, one_line, read_config
from tropism.export_card import Exported, render
from tropism.export_header import Facts, header
from tropism.plan import adapter_folder, as_bad_input, check_out, load

if TYPE_CHECKING:
    from tropism.models.exported import Base, Drawing, LoraFile

UNSOUND = (ValueError, OSError, KeyError, TypeError, AttributeError, SafetensorError)
PEFT_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class Source:
    """What is exported."""

    weights: Path  # the folder with the LoRA file or the network
    folder: Path | None  # of its run, where there is one
    settings: Mapping[str, Any]  # of its run, as config.yaml keeps them
    step: int | None
    final: bool  # the run's adapter, not one of its checkpoints

    @property
    def name(self) -> str:
        """Of a file that is moved elsewhere: the run's, with the step of a checkpoint."""
        home = self.folder or self.weights
        return home.resolve().name + ("" if self.final or self.step is None else f"-step-{self.step:06}")


def run_export(settings: ExportSettings) -> Path:
    """Writes the folder and says where it is. Raises BadInput before anything is written, RunFailed afterwards."""
    settings.check()
    source = find_source(str(settings.run))
    model = settings.model or source.settings.get("model")
    if not isinstance(model, str):
        raise BadInput(f"{settings.run} has no config.yaml that says its model; give --model")
    out = check_out(settings.out or str(_usual(source, settings)), "export")
    dtype = getattr(torch, settings.precision)
    with as_bad_input(*UNSOUND, prefix=f"the model {model} cannot be read: "):
        base = catalog.exporter(model).read_base(catalog.check_model(model))
        drawing = catalog.exporter(model).read_drawing(catalog.check_model(model), source.weights)
    if (source.weights / base.part).is_dir() and not settings.merge:
        raise BadInput(
            f"{settings.run} has trained all weights of the {base.part} and no LoRA; wanted --format diffusers --merge"
        )
    facts = _facts(source, model)
    write = _merged(source, model, dtype) if settings.merge else _lora(source, settings.format, base, facts, dtype)
    with new_folder(out) as folder:
        write(folder)
        (folder / "README.md").write_text(_card(source, settings, base, facts, drawing, folder), encoding="utf-8")
    print(f"{settings.format}{', merged' if settings.merge else ''}: {out} (its README.md says how to load it)")
    return out


def find_source(run: str) -> Source:
    """Of a run's folder, its adapter's or a checkpoint's. Raises BadInput."""
    weights = adapter_folder(run, "run")
    if not any(weights.glob("*.safetensors")) and not any(weights.glob("*/*.safetensors")):
        raise BadInput(f"run is {run}, which has no trained weights; wanted a run, its adapter, or a checkpoint")
    checkpoint = weights.parent if (weights.parent / "state.json").is_file() else weights  # averaged weights lie below
    homes = (Path(run).expanduser(), weights.parent, checkpoint.parent.parent)
    folder = next((home for home in homes if (home / "config.yaml").is_file()), None)
    settings = {} if folder is None else read_config(folder / "config.yaml")
    state = _json(checkpoint / "state.json")
    step = state.get("step")
    rows = [] if folder is None else read_rows(folder)
    if not state and rows:
        step = rows[-1].get("step")
    return Source(weights, folder, settings, step if isinstance(step, int) else None, not state)


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics that can be read, in order."""
    file = folder / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    rows = [row for row in map(_parsed, lines) if isinstance(row.get("step"), int)]
    return sorted(rows, key=lambda row: row["step"])


def _json(file: Path) -> dict[str, Any]:
    return _parsed(file.read_text(encoding="utf-8", errors="replace")) if file.is_file() else {}


def _parsed(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _usual(source: Source, settings: ExportSettings) -> Path:
    name = f"export-{'merged' if settings.merge else settings.format}"
    step = "" if source.final or source.step is None else f"-step-{source.step:06}"
    return (source.folder or source.weights) / f"{name}{step}"


def _facts(source: Source, model: str) -> Facts:
    rewards, seed = source.settings.get("reward"), source.settings.get("seed")
    newest = max(file.stat().st_mtime for file in source.weights.rglob("*.safetensors"))
    return Facts(
        model=model,
        method=str(source.settings.get("method", "an unknown method")),
        rewards=" ".join(map(str, rewards)) if isinstance(rewards, list) else str(rewards or "unknown"),
        step=source.step,
        seed=seed if isinstance(seed, int) else None,
        date=datetime.fromtimestamp(newest, UTC).isoformat(timespec="seconds"),
    )


def _lora(source: Source, format: str, base: Base, facts: Facts, dtype: torch.dtype) -> Any:
    """What writes the LoRA into a folder. Raises BadInput for what cannot be converted."""
    with as_bad_input(*UNSOUND):
        file: LoraFile = catalog.exporter(facts.model).lora_file(format, source.weights, base, facts.model, dtype)
    said = header(file, base, facts, format)
    names = {"diffusers": "pytorch_lora_weights.safetensors", "peft": PEFT_FILE}

    def write(folder: Path) -> None:
        save_file(file.tensors, folder / names.get(format, f"{source.name}.safetensors"), said)
        if file.config is not None:
            (folder / "adapter_config.json").write_text(json.dumps(file.config, indent=1), encoding="utf-8")

    return write


def _merged(source: Source, name: str, dtype: torch.dtype) -> Any:
    """What writes the whole pipeline into a folder. Raises BadInput for what cannot be loaded."""
    model = load(name, DeviceSettings(), torch.device("cpu"))
    with as_bad_input(*UNSOUND):
        model = with_adapter(model, source.weights)
    return lambda folder: catalog.exporter(name).save_merged(model, folder, dtype)


def _card(
    source: Source, settings: ExportSettings, base: Base, facts: Facts, drawing: Drawing | None, folder: Path
) -> str:
    """The text of the card, after its pictures were copied."""
    pictures = []
    for picture in _pictures(source):
        shutil.copy(picture, folder / picture.name)
        pictures.append(picture.name)
    rows = [] if source.folder is None else read_rows(source.folder)
    rows = [row for row in rows if source.step is None or row["step"] <= source.step]
    kind = "merged" if settings.merge else settings.format
    return render(Exported(kind, facts, base, source.name, source.settings, rows, pictures, drawing))


def _pictures(source: Source) -> list[Path]:
    """Before and after of a finished run, and the last samples up to the step."""
    if source.folder is None:
        return []
    samples = sorted((source.folder / "samples").glob("step-*.png"))
    kept = [each for each in samples if source.step is None or each.stem <= f"step-{source.step:06}"]
    both = source.folder / "before_after.png"
    return [*([both] if source.final and both.is_file() else []), *kept[-1:]]


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into that becomes ``out`` at the end, or nothing. Raises RunFailed where that cannot be."""
    missing = [path for path in (out.parent, *out.parent.parents) if not path.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".saving-") as temporary:
            new = Path(temporary) / "new"
            new.mkdir()
            yield new
            if out.is_dir():
                out.rmdir()  # empty: check_out has seen to that
            os.replace(new, out)
    except BaseException as error:
        for path in missing:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        if isinstance(error, (OSError, SafetensorError)):
            raise RunFailed(f"{out} could not be written ({one_line(error)}); nothing is kept of it") from error
        raise
