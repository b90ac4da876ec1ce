"""What every test runs under: one thread, no network, no display. Nothing is seeded here: tests pass generators."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # before torch and numpy are imported
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "offline"
os.environ["MPLBACKEND"] = "Agg"

from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Stable Diffusion pipeline of random weights; not to be written to."""
    import tiny

    return tiny.sd_folder(tmp_path_factory.mktemp("tiny-sd"))


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Stable Diffusion 3 pipeline of random weights; not to be written to."""
    import tiny

    return tiny.sd3_folder(tmp_path_factory.mktemp("tiny-sd3"))


@pytest.fixture(scope="session")
def tiny_lcm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny latent consistency model of random weights; not to be written to."""
    import tiny

    folder = tmp_path_factory.mktemp("tiny-lcm")
    tiny.lcm_pipeline().save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def exported_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path, Any]]:
    """By family: the base model, a run on it, and the model with what it trained; not to be written to."""
    import tiny
    from exporting import make_run

    home = tmp_path_factory.mktemp("export")
    found = {}
    for family, base in (("sd", tiny.sd_folder(home / "sd")), ("sd3", tiny.sd3_folder(home / "sd3", t5=True))):
        found[family] = (base, home / family / "run", make_run(home / family / "run", base))
    return found
