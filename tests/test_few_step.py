"""A model made for few steps: plain diffusers draws the same pictures, and what is saved of it says how it is drawn."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest
import tiny
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from diffusers.schedulers import scheduling_flow_match_lcm
from families import ROWS, Row, ours, theirs
from PIL import Image
from safetensors.torch import load_file
from small_run import refused, said, small_place, train_words
from test_resume import weights

from tropism.base import Hops
from tropism.cli import main
from tropism.commands import with_adapter
from tropism.models.latent_pipeline import LatentPipeline
from tropism.models.pipelines import load_pipeline

TEACHERS = ("sd", "sdxl", "sd3", "flux-dev", "flux-schnell", "pixart-alpha", "sd-dpm")
HOPS: tuple[Hops, ...] = ("consistency", "ode")


def student(row: Row, hops: Hops, steps: int) -> tuple[Row, LatentPipeline]:
    """The view, and how its own pipeline is called; its LoRA is not what it was."""
    model = row.model(onednn=False)
    model.add_lora(2, 6)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    view = model.few_step(hops, steps)
    scale = view.guidance_scale
    return replace(row, steps=steps, guidance=scale, call=dict(row.call)), view


def same_noise(monkeypatch: pytest.MonkeyPatch, pipe: Any) -> None:
    """Pipelines of flows give their scheduler no generator: it gets the noise that the house's chain draws."""
    generator = torch.Generator().manual_seed(3)

    def drawn(shape: Any, **_: Any) -> torch.Tensor:
        noise = torch.randn((2, *tiny.LATENT_SHAPE), generator=generator)
        return pipe._pack_latents(noise, *noise.shape) if isinstance(pipe, FluxPipeline) else noise

    monkeypatch.setattr(scheduling_flow_match_lcm, "randn_tensor", drawn)


@pytest.mark.parametrize("hops", HOPS)
@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("name", TEACHERS)
def test_plain_diffusers_draws_the_student(name: str, steps: int, hops: Hops, monkeypatch: pytest.MonkeyPatch) -> None:
    row, view = student(ROWS[name], hops, steps)
    same_noise(monkeypatch, view.pipe)
    expected = theirs(row, view.pipe)
    assert expected.std() > 0.02
    torch.testing.assert_close(ours(row, view), expected, rtol=0, atol=1e-4)


# By the command.


class Place(NamedTuple):
    """A folder to run in, of one family: its model and, of each method, a run and its merged pipeline."""

    family: str
    folder: Path


def distil_words(method: str, **changes: Any) -> list[str]:
    """``tropism distill``: a teacher of four moves, a student of two."""
    changes = {"images_per_prompt": "1", "inference_steps": "4", "student_steps": "2", "updates": "2", **changes}
    changes = {"reward": "jpeg_compressibility", "learning_rate": "2e-2", "steps": "1", "eval_every": "0", **changes}
    return ["distill", *train_words(method, **changes)[1:]]


@pytest.fixture(scope="module", params=["sd", "sd3"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Place:
    home = tmp_path_factory.mktemp("students")
    base = tiny.sd_folder(home / "base") if request.param == "sd" else tiny.sd3_folder(home / "base", t5=True)
    folder = small_place(base, home)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as out:
        patch.chdir(folder)
        for method in ("lcm", "mlcm"):
            assert main(distil_words(method, out=method)) == 0
            (folder / f"{method}.txt").write_text(out.getvalue())
            assert main(["export", method, "--merge"]) == 0 and main(["export", method]) == 0
    return Place(request.param, folder)


@pytest.fixture
def place(made: Place, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(made.folder)
    return made.family


def pixels(model: str, out: Path, capsys: Any, *words: str) -> tuple[torch.Tensor, str]:
    """A picture of ``tropism sample``, (3, 16, 16) in [0, 1], and what it said."""
    result = said(["sample", "--model", model, "--prompt", tiny.PROMPTS[0], "--out", f"{out}.png", *words], capsys)
    assert result.code == 0, result
    return torch.from_numpy(numpy.array(Image.open(f"{out}.png"))).permute(2, 0, 1) / 255, result.out


SCHEDULERS = {
    ("sd", "lcm"): "LCMScheduler",
    ("sd", "mlcm"): "DDIMScheduler",
    ("sd3", "lcm"): "FlowMatchLCMScheduler",
    ("sd3", "mlcm"): "FlowMatchEulerDiscreteScheduler",
}
methods = pytest.mark.parametrize("method", ["lcm", "mlcm"])
one_family = pytest.mark.parametrize("made", ["sd3"], indirect=True)
LEVEL = 1.1 / 255  # of a PNG


@methods
def test_a_student_is_drawn_as_it_was_made_for(method: str, place: str, tmp_path: Path, capsys: Any) -> None:
    out = Path(f"{method}.txt").read_text()
    assert "by the teacher in 3 steps (guidance 2), " in out and " by the student in 2 steps\n" in out
    assert f"teacher and student  {method}/before_after.png" in out
    hops = "consistency" if method == "lcm" else "ode"
    told = {"guidance_scale": 1, "steps": 2, "hops": hops}
    for folder in (f"{method}/adapter", f"{method}/export-merged"):
        assert json.loads(Path(folder, "tropism.json").read_text()) == told
    drawn, line = pixels("model", tmp_path / "adapter", capsys, "--adapter", method)
    assert "1 images with 2 steps, guidance 1:" in line and "note:" not in line
    merged, line = pixels(f"{method}/export-merged", tmp_path / "merged", capsys)
    assert "1 images with 2 steps, guidance 1:" in line and "note:" not in line
    torch.testing.assert_close(merged, drawn, rtol=0, atol=LEVEL)


@methods
def test_a_merged_student_in_plain_diffusers(method: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_pipeline(f"{method}/export-merged", onednn=False)
    name = SCHEDULERS[place, method]
    assert type(model.pipe.scheduler).__name__ == name
    index = json.loads(Path(method, "export-merged", "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", name]
    pipe = DiffusionPipeline.from_pretrained(f"{method}/export-merged")
    pipe.set_progress_bar_config(disable=True)
    row = Row(lambda: pipe, 2, 1.0)
    same_noise(monkeypatch, pipe)
    torch.testing.assert_close(ours(row, model), theirs(row, pipe), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="made for few steps already; wanted the model that it was distilled from"):
        model.few_step("ode", 1)


@methods
def test_cards_draw_the_student_in_plain_diffusers(method: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    card, exported = (Path(method, folder, "README.md").read_text() for folder in ("", "export-diffusers"))
    assert "by the teacher in 3 steps (guidance 2) and by the student in 2 steps (seed 0)" in card
    assert "| reward | teacher | student |" in card and f"`tropism distill {method} --config" in card
    assert "It was made for 2 steps with guidance 1." in exported
    wanted, row = with_adapter(load_pipeline("model", onednn=False), Path(method, "adapter")), Row(lambda: None, 2, 1.0)
    for text, folder in ((card, method), (exported, f"{method}/export-diffusers")):
        code = text.split("```python\n")[1].split("```")[0]
        code = "\n".join(line for line in code.splitlines() if ".images" not in line)
        names: dict[str, Any] = {}
        exec(code.replace('("adapter")', f'("{folder}/adapter")').replace('(".")', f'("{folder}")'), names)
        names["pipe"].set_progress_bar_config(disable=True)
        with monkeypatch.context() as patch:
            same_noise(patch, names["pipe"])
            torch.testing.assert_close(theirs(row, names["pipe"]), ours(row, wanted), rtol=0, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("made", ["sd3"], indirect=True)
@methods
def test_the_documented_lines_for_other_counts(
    method: str, steps: int, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers stretches whatever sigmas it is given, so its scheduler has to be told another end."""
    pages = (Path(__file__).parents[1] / "docs" / "few_steps.md").read_text()
    lines = pages[pages.index("steps = 2\n") :].split("```")[0].splitlines()
    pipe = DiffusionPipeline.from_pretrained(f"{method}/export-merged")
    pipe.set_progress_bar_config(disable=True)
    exec("\n".join(lines[1:-1]), {"pipe": pipe, "steps": steps})
    same_noise(monkeypatch, pipe)
    row, model = Row(lambda: pipe, steps, 1.0), load_pipeline(f"{method}/export-merged", onednn=False)
    torch.testing.assert_close(ours(row, model), theirs(row, pipe), rtol=0, atol=1e-4)


def test_the_page_speaks_of_teacher_and_student(place: str, tmp_path: Path, capsys: Any) -> None:
    result = said(["report", "lcm", "--out", str(tmp_path / "page.html")], capsys)
    assert result.out.startswith("The student against its teacher: ") and "trained on" not in result.out
    page = (tmp_path / "page.html").read_text()
    assert "Teacher against student in 2 steps, at equal seeds" in page and "<th>teacher</th>" in page
    assert "judges, weight 1" in page and "trained on" not in page


def test_a_step_count_that_was_not_trained_is_noted(place: str, tmp_path: Path, capsys: Any) -> None:
    noted, three = "note: inference_steps is 3, but this student was made for 2 moves", ("--inference-steps", "3")
    for words, wanted in (
        (("model", "--adapter", "lcm"), False),
        (("model", "--adapter", "mlcm"), True),
        (("mlcm/export-merged",), True),
    ):
        assert (noted in pixels(words[0], tmp_path / "image", capsys, *words[1:], *three)[1]) == wanted


@one_family
def test_a_merged_student_can_be_trained_with_rewards(place: str, tmp_path: Path, capsys: Any) -> None:
    model, out = "mlcm/export-merged", str(tmp_path / "tuned")
    assert said(train_words(model=model, out=out, steps="1", eval_every="0", inference_steps="2"), capsys).code == 0
    assert json.loads((tmp_path / "tuned/adapter/tropism.json").read_text())["hops"] == "ode"
    before, _ = pixels(model, tmp_path / "before", capsys)
    after, line = pixels(model, tmp_path / "after", capsys, "--adapter", out)
    assert "with 2 steps, guidance 1:" in line and not torch.equal(before, after)


def test_what_makes_no_student_is_refused(place: str, capsys: Any) -> None:
    sentence = "model is made for few steps already; wanted the model that it was distilled from"
    assert sentence in refused(distil_words("lcm", model="lcm/export-merged"), capsys)
    sentence = "student_steps is 4; wanted fewer than inference_steps, the teacher's 4"
    assert sentence in refused(distil_words("mlcm", student_steps="4"), capsys)
    sentence = "inference_steps is 5; wanted a multiple of student_steps, which is 2"
    assert sentence in refused(distil_words("mlcm", inference_steps="5"), capsys)
    sentence = "student_steps is 0; wanted a whole number of at least 1"
    assert sentence in refused(distil_words("lcm", student_steps="0"), capsys)


def test_two_and_two_steps_without_an_average(tiny_sd: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """test_resume.py has every method as it is by itself."""
    monkeypatch.chdir(small_place(tiny_sd, tmp_path))
    changes = {"lr_schedule": "constant", "skip": "2", "target_decay": "0"}
    for out, steps in (("whole", "4"), ("parts", "2")):
        assert said(distil_words("lcm", out=out, steps=steps, **changes), capsys).code == 0
    assert said(["distill", "lcm", "--resume", "parts", "--steps", "4"], capsys).code == 0
    assert weights(Path("parts")) == weights(Path("whole"))
    assert not _targets(Path("parts/checkpoints/step-000004"))


def _targets(checkpoint: Path) -> list[str]:
    return [name for name in load_file(checkpoint / "state.safetensors") if name.startswith("target/")]


def test_a_checkpoint_has_the_average_that_judges(place: str) -> None:
    assert _targets(Path("lcm/checkpoints/step-000001")) and not _targets(Path("mlcm/checkpoints/step-000001"))


@one_family
def test_all_weights_of_a_student(place: str, tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    assert said(distil_words("mlcm", out=str(run), full="", learning_rate="1e-3"), capsys).code == 0
    drawn, line = pixels("model", tmp_path / "adapter", capsys, "--adapter", str(run))
    assert "1 images with 2 steps, guidance 1:" in line
    assert said(["export", str(run), "--merge"], capsys).code == 0
    merged, _ = pixels(str(run / "export-merged"), tmp_path / "merged", capsys)
    torch.testing.assert_close(merged, drawn, rtol=0, atol=LEVEL)
