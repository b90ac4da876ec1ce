"""What the tests of the command share: a tiny model with few steps, prompts, rewards, and ``main`` with its output."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tropism import catalog
from tropism.cli import main

DISTILLING = {"student_steps": "1", "updates": "2", "lr_schedule": "constant"}  # a cosine depends on how long a run is
FLOW, HOPS = {"flow-grpo", "scm"}, {"lasro", "pso", "rlcm"}  # methods of a flow, and of a consistency model
WITH_MEAN, CLIPS = {"comospeech"}, {"animate-lcm"}  # methods of models whose noise has a mean (melodies), and of clips
TOKENS = {"dd1", "dd2"}  # methods of models that draw tokens
OWN_NETWORK = {"ctm", "mean-flow", "shortcut", "sound-ctm"} | WITH_MEAN | CLIPS | TOKENS
"""Those, and methods of a network that is told two times, as no pipeline is; their pages have one of one's own."""

REWARDS = """\
calls = 0

def bright(images):
    return images.mean((1, 2, 3))

def flat(images):
    return [1.0] * len(images)

def scalar(images):
    return images.mean()

def boom(images):
    raise KeyError("nope")

def silent(images):
    return [None] * len(images)

def answer(images, answer):
    return [float(a) for a in answer]

def late(images):
    global calls
    calls += 1
    if calls > 8:
        raise RuntimeError("the server is gone")
    return images.mean((1, 2, 3))

number = 3
"""


def small_place(tiny: Path, folder: Path) -> Path:
    """A folder to run in: ``model`` (three steps, guidance 2), ``prompts.txt``, ``rewards.py``, and ``pictures.jsonl``,
    the prompts with pictures."""
    shutil.copytree(tiny, folder / "model")
    (folder / "model" / "tropism.json").write_text(json.dumps({"steps": 3, "guidance_scale": 2.0}))
    (folder / "prompts.txt").write_text("a red fox\ntwo blue cubes\na green hill\n")
    (folder / "rewards.py").write_text(REWARDS)
    rows = []
    for number, text in enumerate((folder / "prompts.txt").read_text().splitlines()):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        rows.append(json.dumps({"prompt": text, "image": f"{number}.png"}))
    (folder / "pictures.jsonl").write_text("\n".join(rows))
    return folder


def learns_from_pictures(method: str) -> bool:
    """As its usual settings have it."""
    return bool(getattr(catalog.method_settings(method)(), "needs_pictures", False))


def train_words(method: str = "ddpo", **changes: str | list[str] | None) -> list[str]:
    """``tropism train`` with little to do; a setting that is None is left out, an empty one is a bare flag."""
    settings: dict[str, str | list[str] | None] = {
        "model": "model",
        "prompts": "pictures.jsonl" if learns_from_pictures(method) else "prompts.txt",
        "reward": "brightness",
        "steps": "2",
        "prompts_per_step": "2",
        "images_per_prompt": "2",
        "inference_steps": "3",
        "eval_images": "3",
        "eval_every": "1",
        "save_every": "1",
        "learning_rate": "1e-3",
        **(DISTILLING if method in catalog.distilling() else {}),
        **changes,
    }
    words = ["train", method]
    for name, value in settings.items():
        if value is not None:
            flag = f"--{name.replace('_', '-')}"
            words += [flag, *([value] if isinstance(value, str) and value else value)]
    return words


@dataclass(frozen=True)
class Said:
    """How a command ended."""

    code: int
    out: str
    err: str


def said(words: list[str], capsys: pytest.CaptureFixture[str]) -> Said:
    """Runs the command in this process."""
    capsys.readouterr()
    code = main(words)
    out, err = capsys.readouterr()
    return Said(code, out, err)


def refused(words: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """The one sentence of a command that must be refused, leaving no run."""
    result = said(words, capsys)
    assert result.code == code, result
    assert result.err.startswith("tropism: ")
    assert result.err.count("\n") == 1
    assert "Traceback" not in result.err
    assert not Path("runs").exists()
    return result.err.strip()
