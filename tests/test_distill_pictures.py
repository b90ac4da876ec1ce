"""``tropism distill`` from a user's pictures, on a tiny pipeline, and what is refused before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file
from small_run import refused, said, small_place, train_words


@pytest.fixture
def place(tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(small_place(tiny_sd, tmp_path))
    return tmp_path


def written(name: str, rows: list[dict[str, Any]]) -> str:
    Path(name).write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return name


def words(method: str, **changes: str | None) -> list[str]:
    """Two steps of two updates, each of two of the four rows."""
    few = dict(inference_steps="4", student_steps="2", passes="1", total_updates="4", eval_every="0")
    stages = {"stages": "2"} if method == "ect" else {}
    return ["distill", *train_words(method, **(few | stages | changes))[1:]]


@pytest.mark.parametrize("method", ["ct", "ict", "ect", "slct"])
def test_pictures_become_a_model_for_few_steps(method: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = said(words(method, out="run"), capsys)
    assert result.code == 0, result
    told = json.loads(Path("run/adapter/tropism.json").read_text())
    assert told == {"guidance_scale": 1.0, "steps": 2, "hops": "consistency"}
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert all(row["updates"] == 2 and row["distance"] > 0 and row["grad_norm"] > 0 for row in rows[1:])
    values = load_file("run/adapter/pytorch_lora_weights.safetensors")
    assert any(name.endswith("lora_B.weight") and bool(value.any()) for name, value in values.items())


def test_norms_without_scales_are_saved(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = said(words("slct", full="", unscaled_norms="", out="run"), capsys)
    assert result.code == 0, result
    file = next(Path("run/adapter/unet").glob("*.safetensors"))
    scales = {name: value for name, value in load_file(file).items() if name.endswith(("norm1.weight", "norm2.weight"))}
    inner = [value for name, value in scales.items() if "transformer_blocks" in name]
    assert inner and all(bool((value == 1).all()) for value in inner)
    assert yaml.safe_load(Path("run/config.yaml").read_text())["unscaled_norms"] is True


def test_what_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is one sentence, and nothing is written."""

    def sentence(prompts: str = "pictures.jsonl", method: str = "ect", **changes: str | None) -> str:
        return refused(words(method, prompts=prompts, **changes), capsys)

    assert "prompts is prompts.txt, without pictures to learn from; wanted .jsonl rows with a column image" in sentence(
        "prompts.txt"
    )
    row = {"prompt": "a red fox", "image": "0.png"}
    gone = sentence(written("gone.jsonl", [row, {**row, "image": "nowhere.png"}]))
    assert "the column image names 'nowhere.png', which is no file" in gone
    Image.new("RGB", (24, 16)).save("wide.png")
    mixed = sentence(written("mixed.jsonl", [row, {**row, "image": "wide.png"}]))
    assert "0.png is 16 x 16 pixels and wide.png 24 x 16; wanted pictures of one size" in mixed
    wide = sentence(written("wide.jsonl", [{**row, "image": "wide.png"}]))
    assert "pictures of (16, 24) pixels give latents (4, 8, 12); wanted (4, 8, 8)" in wide
    Path("words.png").write_text("not a picture")
    assert "words.png is not a picture that can be read" in sentence(
        written("words.jsonl", [{**row, "image": "words.png"}])
    )
    assert "layer norms can lose their scales in full training only" in sentence(method="slct", unscaled_norms="")
    assert "updates is 9; wanted at most the 4 pictures of a step" in sentence(updates="9")
