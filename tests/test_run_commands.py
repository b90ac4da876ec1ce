"""``tropism sample``, ``eval`` and ``demo`` on a tiny pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image, ImageChops
from small_run import refused, said, small_place, train_words

from tropism import pictures

PICK = ["--model", "model"]
EVAL = ["eval", *PICK, "--reward", "brightness", "jpeg-compressibility=0.1", "--prompts", "prompts.txt"]


@pytest.fixture(scope="module")
def place(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run in ``run``."""
    folder = small_place(tiny_sd, tmp_path_factory.mktemp("commands"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        from tropism.cli import main

        assert main(train_words(out="run", eval_every="0")) == 0
    return folder


@pytest.fixture(autouse=True)
def inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def same(one: Path, other: Path) -> bool:
    """The same pixels, but for rounding."""
    difference = ImageChops.difference(Image.open(one), Image.open(other))
    return max(high for _, high in difference.getextrema()) <= 1


def test_sample_writes_every_image_and_a_grid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sample", *PICK, "--prompt", "a red fox", "--prompt", "two blue cubes", "--images", "2"]
    assert said([*words, "--out", str(tmp_path / "a")], capsys).code == 0
    names = ["000-a-red-fox.png", "001-a-red-fox.png", "002-two-blue-cubes.png", "003-two-blue-cubes.png", "grid.png"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == names
    assert Image.open(tmp_path / "a" / names[0]).size == (16, 16)
    assert said([*words, "--out", str(tmp_path / "b"), "--batch-size", "1"], capsys).code == 0
    assert all(same(tmp_path / "a" / name, tmp_path / "b" / name) for name in names[:4])
    assert not same(tmp_path / "a" / names[0], tmp_path / "a" / names[1])


def test_sample_with_an_adapter_differs_and_takes_run_or_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {}
    for name, adapter in {"base": [], "run": ["run"], "adapter": ["run/adapter"],
                          "checkpoint": ["run/checkpoints/step-000002"]}.items():  # fmt: skip
        out = tmp_path / f"{name}.png"
        words = ["sample", *PICK, "--prompt", "a red fox", "--inference-steps", "2", "--guidance-scale", "9"]
        result = said([*words, "--out", str(out), *(["--adapter", *adapter] if adapter else [])], capsys)
        assert result.code == 0, result
        assert "2 steps, guidance 9" in result.out
        found[name] = out.read_bytes()
    assert found["run"] == found["adapter"] == found["checkpoint"] != found["base"]


def test_sample_into_a_numbered_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(["sample", *PICK, "--prompts", "prompts.txt"], capsys).code == 0
    assert len(list(Path("runs/sample-1").glob("*.png"))) == 4


def test_eval_prints_a_table_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "found.json"
    result = said([*EVAL, "--images", "5", "--adapter", "run", "--out", str(file)], capsys)
    assert result.code == 0, result
    assert [line.split()[0] for line in result.out.splitlines()[:3]] == [
        "brightness",
        "jpeg_compressibility",
        "weighted",
    ]
    found = json.loads(file.read_text())
    assert list(found["rewards"]) == ["brightness", "jpeg_compressibility", "weighted sum"]
    for reward in found["rewards"].values():
        before, after = reward["scores"]["base"], reward["scores"]["tuned"]
        assert len(before) == len(after) == 5
        assert reward["gain"]["mean"] == pytest.approx(sum(after) / 5 - sum(before) / 5, abs=1e-6)
        assert reward["gain"]["low"] <= reward["gain"]["mean"] <= reward["gain"]["high"]
    alone = said([*EVAL, "--images", "5"], capsys).out
    assert "adapter" not in alone
    assert alone.splitlines()[0].split()[1] == f"{found['rewards']['brightness']['base']['mean']:.4g}"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["sample", *PICK], "wanted either prompt (one or more texts) or prompts"),
        (["sample", *PICK, "--prompt", "x", "--images", "0"], "images is 0; wanted at least 1"),
        (["sample", *PICK, "--prompt", "x", "--out", "run"], "out is run, which holds a run already"),
        (["sample", *PICK, "--prompt", "x", "--adapter", "nowhere"], "adapter is nowhere, but there is no such folder"),
        (["sample", *PICK, "--prompt", "x", "--adapter", "model"], "which is a whole pipeline; give it as model"),
        (
            ["sample", *PICK, "--prompt", "x", "--adapter", "run/samples"],
            "there is no pytorch_lora_weights.safetensors",
        ),
        (["sample", *PICK, "--prompt", "x", "--inference-steps", "0"], "inference_steps is 0; wanted"),
        (["eval", *PICK], "reward is not given"),
        ([*EVAL, "--images", "1"], "images is 1; wanted at least 2"),
        ([*EVAL, "--out", "found.txt"], "out is found.txt; wanted a .json file"),
        ([*EVAL[:-4], "./rewards.py:boom", "--prompts", "prompts.txt"], "reward 'boom' raised KeyError"),
        (["demo", "--preset", "nowhere.yaml"], "there is no configuration file nowhere.yaml"),
        (["demo", "--stepz", "3"], "did you mean --steps?"),
    ],
)
def test_bad_input_is_one_sentence(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("model", "run", "prompts.txt", "rewards.py"):
        (tmp_path / name).symlink_to(Path(name).resolve())
    monkeypatch.chdir(tmp_path)
    assert sentence in refused(words, capsys)


def test_demo_runs_its_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = train_words("raft")[2:]
    settings = {flag[2:].replace("-", "_"): value for flag, value in zip(words[::2], words[1::2], strict=True)}
    preset = tmp_path / "preset.yaml"
    preset.write_text("method: raft\n" + "".join(f"{name}: {value}\n" for name, value in settings.items()))
    result = said(["demo", "--preset", str(preset), "--steps", "1", "--out", str(tmp_path / "out")], capsys)
    assert result.code == 0, result
    for name in ("before_after.png", "curve.png", "adapter"):
        assert str(tmp_path / "out" / name) in result.out
    assert "95 % interval" in result.out
    assert (tmp_path / "out" / "samples" / "step-000001.png").is_file()


def test_the_packaged_preset_is_a_configuration_of_its_method() -> None:
    from tropism import catalog, cli, flags
    from tropism.cli import PRESET
    from tropism.config import TrainSettings, read_config

    file = Path(cli.__file__).with_name(PRESET)
    method = read_config(file)["method"]
    settings = [*flags.settings_of(TrainSettings, ""), *flags.settings_of(catalog.method_settings(method), "")]
    values = flags.read(flags.build_parser("demo", "", settings), settings, ["--config", str(file)], method)
    shared = {setting.name for setting in flags.settings_of(TrainSettings, "")}
    TrainSettings(**{name: value for name, value in values.items() if name in shared}).check()


def test_captions_are_wrapped_and_cut() -> None:
    lines = pictures.wrap("a large yellow diamond above a blue cross on a beige background " * 3, 150, lines=3)
    assert len(lines) == 3
    assert lines[-1].endswith("…")
    font = pictures._font()
    assert all(font.getlength(line) <= 150 for line in [*lines, *pictures.wrap("x" * 99, 150)])
