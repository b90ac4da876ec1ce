"""The page's network that is told two times: distilled, saved and drawn with by the command."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from small_run import refused, said, train_words

from tropism.denoisers import FlowMap
from tropism.models.own import OwnModel
from tropism.plugins import load_function
from tropism.samplers import Jump, solver

PAGE = Path(__file__).parents[1] / "docs" / "methods" / "mean_flow.md"
FILE = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)[0]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_jumps.py").write_text(FILE)
    (tmp_path / "prompts.txt").write_text("a red fox\n")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("method", ["mean_flow", "shortcut"])
def test_the_command_teaches_it_to_jump(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = train_words(
        method,
        model="my_jumps.py:build",
        prompts="scenes",
        out="run",
        full="",
        eval_every="0",
        student_steps="2",
        updates="2",
        passes="2",
    )
    result = said(["distill", *words[1:]], capsys)
    assert result.code == 0, result.err
    assert json.loads(Path("run/adapter/tropism.json").read_text())["hops"] == "jump"
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 2 and rows[-1]["updates"] == 4 and rows[-1]["distance"] > 0
    drawn = said(
        ["sample", "--model", "my_jumps.py:build", "--adapter", "run", "--prompt", "a red circle", "--out", "one"],
        capsys,
    )
    assert drawn.code == 0, drawn.err


def test_its_view_jumps_and_it_says_what_it_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    model: OwnModel = load_function("my_jumps.py", "build", "model")()
    view = model.few_step("jump", 2)
    assert isinstance(view.denoiser, FlowMap) and solver(view.denoiser) == Jump()
    pictures = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(model.decode(model.latents(pictures)), pictures)
    with pytest.raises(ValueError, match=r"latents gave \(2, 3, 8, 8\) for images .* wanted \(2, 3, 64, 64\)"):
        model.latents(pictures[:, :, :8, :8])
    words = train_words("mean_flow", model="my_jumps.py:build", out="run", full="", prompts="prompts.txt")
    assert "without pictures to learn from" in refused(["distill", *words[1:]], capsys)
    assert not Path("run").exists()
