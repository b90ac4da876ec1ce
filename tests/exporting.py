"""A run's folder as training leaves it, and its export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image

from tropism.cli import main
from tropism.models.latent_pipeline import LatentPipeline
from tropism.models.pipelines import load_pipeline

STEPS = 3


def make_run(folder: Path, model: Path, full: bool = False, alpha: int = 6, seed: int = 1) -> LatentPipeline:
    """A run's folder as ``tropism train`` leaves it, with random weights in its adapter; returns its model."""
    trained = load_pipeline(model, onednn=False, steps=STEPS)
    trained.train_full() if full else trained.add_lora(2, alpha)
    generator = torch.Generator().manual_seed(seed)
    for parameter in trained.parameters():
        step = torch.randn(parameter.shape, generator=generator)
        parameter.data.add_(0.02 * step) if full else parameter.data.copy_(0.3 * step)
    trained.save_adapter(folder / "adapter")
    config = {"method": "ddpo", "model": str(model), "reward": ["brightness=2", "redness"], "seed": 7, "full": full}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rows: list[dict[str, Any]] = [
        {"step": 0, "eval_reward": 0.25, "eval_brightness": 0.5},
        {"step": 1, "reward_mean": 0.3},
        {"step": 2, "eval_reward": 0.75, "eval_brightness": 0.875, "eval_gain": 0.5, "eval_gain_low": 0.25,
         "eval_gain_high": 0.75, "eval_win_rate": 0.75},
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "samples").mkdir()
    for name in ("before_after.png", "samples/step-000000.png", "samples/step-000002.png"):
        Image.new("RGB", (4, 4)).save(folder / name)
    return trained


def export(run: Path, out: Path, *words: str) -> Path:
    assert main(["export", str(run), "--out", str(out), *words]) == 0
    return out
