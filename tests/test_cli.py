"""The command line: help, settings from flags and files, and one sentence for everything that is wrong with them."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from small_run import refused, said, small_place, train_words

from tropism import __version__, catalog, flags
from tropism.config import BadInput, TrainSettings, read_config, save_config


@pytest.fixture
def place(tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(small_place(tiny_sd, tmp_path))
    return tmp_path


def python(code: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, where the package can be imported from any folder."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)


@dataclass(frozen=True)
class Base:
    width: int = 2
    """How wide."""
    pair: tuple[float, float] = (1.0, 2.0)


@dataclass(frozen=True)
class Derived(Base):
    width: int = 3
    scale: float | None = None
    """A scale in %."""
    words: list[str] = field(default_factory=list)
    kind: Literal["no", "yes"] = "no"
    on: bool = False


SETTINGS = flags.settings_of(Derived, "settings")


def parsed(*words: str) -> Derived:
    return Derived(**flags.read(flags.build_parser("x", "", SETTINGS), SETTINGS, words))


def test_fields_are_flags() -> None:
    assert parsed() == Derived()
    assert parsed("--width", "5", "--pair", "0.5", "3", "--scale=1e-3") == Derived(5, (0.5, 3.0), 1e-3)
    assert parsed("--words", "a", "b=2", "--words", "c").words == ["a", "b=2", "c"]
    assert parsed("--on").on
    assert parsed("--on=false", "--kind", "no") == Derived()
    assert not parsed("--on", "--no-on").on
    assert parsed("--scale", "3", "--scale", "none").scale is None


def test_docs_and_defaults_come_from_the_class_that_has_them() -> None:
    by_name = {setting.name: setting for setting in SETTINGS}
    assert by_name["width"].doc == "How wide."
    assert by_name["width"].default == 3
    text = flags.build_parser("x", "", SETTINGS).format_help()
    assert "A scale in %. (default: none)" in text
    assert "no|yes" in text


def test_flags_override_files_and_files_override_defaults(tmp_path: Path) -> None:
    file = tmp_path / "some.yaml"
    file.write_text("width: 7\nscale: 3e-4\nkind: no\nwords: one\npair: [1, 4]\non: true\n")
    expected = Derived(7, (1.0, 4.0), 3e-4, ["one"], "no", True)
    assert parsed("--config", str(file)) == expected
    assert parsed("--width", "9", "--config", str(file), "--words", "x", "--no-on") == Derived(
        9, (1.0, 4.0), 3e-4, ["x"], "no", False
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--width", "2.5"], "width is '2.5'; wanted a whole number"),
        (["--width"], "width is given without a value; wanted a whole number"),
        (["--width", "1", "2"], "width is '1 2'; wanted a whole number"),
        (["--scale", "nan"], "scale is 'nan'; wanted a number or none"),
        (["--pair", "1"], "pair is '1'; wanted 2 of: a number"),
        (["--kind", "maybe"], "kind is 'maybe'; wanted one of no, yes"),
        (["--on", "maybe"], "on is 'maybe'; wanted true or false"),
        (["--wdith", "2"], "there is no setting --wdith; did you mean --width?"),
        (["--zzz", "2"], "there is no setting --zzz; --help lists them"),
        (["stray"], "'stray' follows no setting"),
        (["--config", "nowhere.yaml"], "there is no configuration file nowhere.yaml"),
    ],
)
def test_a_wrong_flag_is_one_sentence(words: list[str], sentence: str) -> None:
    with pytest.raises(BadInput) as caught:
        parsed(*words)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("wdith: 2", "there is no setting wdith; did you mean width?"),
        ("width: wide", "width is 'wide'; wanted a whole number"),
        ("width: null", "width is None; wanted a whole number"),
        ("pair: [1]", "pair is [1]; wanted 2 of: a number"),
        ("on: maybe", "on is 'maybe'; wanted true or false"),
        ("a: [", "is not YAML"),
        ("- 1", "holds no settings by name"),
        ("method: raft", "is for the method raft"),
    ],
)
def test_a_wrong_file_is_one_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "some.yaml"
    file.write_text(text)
    with pytest.raises(BadInput) as caught:
        parsed("--config", str(file))
    assert sentence in str(caught.value)


def test_a_written_configuration_reads_back(tmp_path: Path) -> None:
    own = catalog.method_settings("ddpo")
    settings = TrainSettings(model="a", reward=["b=0.5"], mixed_precision="no", lora_targets=["to_q"], out="x")
    written = own(learning_rate=1e-5, explore_weights=(0.5, 2.0))
    save_config(tmp_path / "config.yaml", "ddpo", settings, written)
    entries = read_config(tmp_path / "config.yaml")
    assert entries.pop("method") == "ddpo"
    assert "out" not in entries
    both = [*flags.settings_of(TrainSettings, ""), *flags.settings_of(own, "")]
    values = flags.read(flags.build_parser("x", "", both), both, ["--config", str(tmp_path / "config.yaml")], "ddpo")
    assert {name: values[name] for name in entries} == {
        name: tuple(value) if name == "explore_weights" else value for name, value in entries.items()
    }
    assert values["learning_rate"] == 1e-5


def test_every_method_has_flags_that_do_not_clash() -> None:
    shared = {setting.name for setting in flags.settings_of(TrainSettings, "")}
    for name in catalog.method_names():
        settings = flags.settings_of(catalog.method_settings(name), "")
        assert not shared & {setting.name for setting in settings}
        parser = flags.build_parser(name, "", settings)
        assert catalog.method_settings(name)(**flags.read(parser, settings, [])) == catalog.method_settings(name)()


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from tropism.cli import main; main(['--help']); main(['train', '--help'])\n"
        "assert 'torch' not in sys.modules and 'jsonargparse' in sys.modules"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert "--save-every" in done.stdout


def test_settings_are_refused_before_model_libraries_load(place: Path) -> None:
    code = (
        "import sys; from tropism.cli import main\n"
        f"assert main({train_words(learning_rate='fast')!r}) == 2\n"
        f"assert main({train_words(learning_rate='7')!r}) == 2\n"
        "assert not {'diffusers', 'transformers', 'peft', 'matplotlib'} & set(sys.modules), sorted(sys.modules)"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert "learning_rate is 7.0" in done.stderr


@pytest.mark.parametrize("words", [["--help"], [], ["train", "--help"], ["train", "ddpo", "-h"], ["sample", "--help"],
                                   ["eval", "--help"], ["demo", "--help"], ["methods", "--help"]])  # fmt: skip
def test_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    result = said(words, capsys)
    assert result.code == 0
    assert "usage: tropism" in result.out
    assert result.err == ""


def test_version_and_methods(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(["--version"], capsys).out == f"tropism {__version__}\n"
    listed = said(["methods"], capsys).out
    assert all(f"{name}: " in listed for name in catalog.method_names())
    assert "--learning-rate" in said(["methods", "flow_grpo"], capsys).out
    assert said(["methods", "nothing"], capsys).code == 2


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["trian"], "there is no command 'trian'; did you mean train?"),
        (["train"], "train wants a method first"),
        (["train", "dppo"], "there is no method 'dppo'; did you mean ddpo?"),
        (train_words(lerning_rate="1"), "there is no setting --lerning-rate; did you mean --learning-rate?"),
        (train_words(learning_rate="7"), "learning_rate is 7.0; wanted"),
        (train_words(images_per_prompt="0"), "images_per_prompt is 0; wanted"),
        (train_words(steps="0"), "steps is 0; wanted at least 1"),
        (train_words(seed="-1"), "seed is -1; wanted 0 or more"),
        (train_words(ema="1"), "ema is 1.0; wanted"),
        (train_words(threads="0"), "threads is 0; wanted"),
        (train_words(full="", lora_alpha="3"), "full trains none"),
        (train_words(mixed_precision="fp16", device="cpu"), "mixed_precision is fp16; wanted no or bf16"),
        (train_words(device="gpu"), "device is gpu, which torch cannot use here"),
        (train_words(report_to="nothing"), "report_to is nothing; wanted none"),
        (train_words(model="scense"), "there is no model 'scense'"),
        (train_words(model="./nowhere"), "there is no model './nowhere'"),
        (train_words(model="."), "has no model_index.json"),
        (train_words(reward=None), "reward is not given"),
        (train_words(prompts=None), "prompts is not given"),
        (train_words(reward="brightnes"), "did you mean brightness?"),
        (train_words(reward="no_module:f"), "import raised ModuleNotFoundError"),
        (train_words(reward="./rewards.py:brihgt"), "did you mean bright?"),
        (train_words(reward="./rewards.py:number"), "which is of type int; wanted a function"),
        (train_words(reward=["brightness", "brightness"]), "given twice"),
        (train_words(prompts="nowhere.txt"), "there is no prompt file nowhere.txt"),
        (train_words(eval_prompts="nowhere.txt"), "eval_prompts is nowhere.txt"),
        (train_words(prompts="scenes-triple"), "wanted scenes or scenes-held-out"),
        (train_words(out="model"), "out is model, which holds files already"),
        (train_words(out="prompts.txt"), "out is prompts.txt, which is a file"),
        (train_words(out="prompts.txt/x"), "lies below a file"),
        (train_words(explore_weights=["1"]), "explore_weights is '1'; wanted 2"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_loads(
    words: list[str], sentence: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "load_model", lambda *_: pytest.fail("a model was loaded"))
    before = sorted(place.iterdir())
    assert sentence in refused(words, capsys)
    assert sorted(path for path in place.iterdir() if path.name != "__pycache__") == before


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (train_words(reward="./rewards.py:scalar"), "reward 'scalar' returned scores of shape (); wanted (2,)"),
        (train_words(reward="./rewards.py:boom"), "reward 'boom' raised KeyError"),
        (train_words(reward="./rewards.py:silent"), "reward 'silent' gave no score for any"),
        (train_words(reward="./rewards.py:answer"), "reward 'answer' wants 'answer'"),
        (train_words(reward="clip:model"), "could not load the CLIP"),
        (train_words(lora_targets=["to_z"]), "is called 'to_z'"),
        (train_words("flow-grpo"), "flow-grpo does not suit the model model"),
        (train_words("alignprop", reward="jpeg_compressibility"), "has no gradient"),
    ],
)
def test_what_shows_only_after_loading_leaves_no_run_either(
    words: list[str], sentence: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in refused(words, capsys)


def test_a_file_where_weights_should_be(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "model" / "unet" / "diffusion_pytorch_model.safetensors").write_text("version https://git-lfs")
    assert "is not a sound safetensors file" in refused(train_words(), capsys)


def test_sentences_can_show_where_they_came_from(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tropism.cli import main

    monkeypatch.setenv("TROPISM_TRACEBACK", "1")
    with pytest.raises(BadInput):
        main(["train", "dppo"])
