"""What export refuses: a broken run, wrong words, a full disk; one sentence each, and nothing is written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from exporting import make_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_run import said

from tropism.models.adapters import LORA_FILE


def resave(run: Path, **metadata: str) -> None:
    file = run / "adapter" / LORA_FILE
    with safe_open(str(file), framework="pt") as opened:
        tensors, header = {k: opened.get_tensor(k) for k in opened.keys()}, opened.metadata()  # noqa: SIM118
    save_file(tensors, file, header | metadata)


def poison(run: Path) -> None:
    tensors = load_file(run / "adapter" / LORA_FILE)
    with safe_open(str(run / "adapter" / LORA_FILE), framework="pt") as opened:
        header = opened.metadata()
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, run / "adapter" / LORA_FILE, header)


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no adapter": (lambda run: shutil.rmtree(run / "adapter"), "has no trained weights"),
    "empty adapter": (lambda run: (run / "adapter" / LORA_FILE).unlink(), "has no trained weights"),
    "not a safetensors file": (lambda run: (run / "adapter" / LORA_FILE).write_text("hello"), ""),
    "no rank": (lambda run: resave(run, lora_adapter_metadata="{}"), "not of rank 8"),
    "broken rank": (lambda run: resave(run, lora_adapter_metadata="[1"), ""),
    "a list for a rank": (lambda run: resave(run, lora_adapter_metadata="[]"), ""),
    "unknown setting": (lambda run: resave(run, lora_adapter_metadata='{"unet.beta": 1}'), "beta"),
    "not a number": (poison, "infinite or NaN"),
    "config is no YAML": (lambda run: (run / "config.yaml").write_text("a: [1"), "is not YAML"),
    "config is a list": (lambda run: (run / "config.yaml").write_text("- 1"), "holds no settings"),
    "config without a model": (lambda run: (run / "config.yaml").write_text("method: ddpo"), "give --model"),
    "model is gone": (lambda run: (run / "config.yaml").write_text("model: nowhere"), "there is no model"),
    "model is a number": (lambda run: (run / "config.yaml").write_text("model: 3"), "give --model"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_run_is_one_sentence_and_nothing_is_written(
    name: str, exported_runs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(exported_runs["sd"][1], tmp_path / "run")
    change, expected = BROKEN[name]
    change(tmp_path / "run")
    result = said(["export", str(tmp_path / "run"), "--out", str(tmp_path / "deep" / "out")], capsys)
    assert result.code == 2, result
    assert result.err.count("\n") == 1 and result.err.startswith("tropism: ") and "Traceback" not in result.err
    assert any(word in result.err for word in expected.split("|"))
    assert not (tmp_path / "deep").exists()


@given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255), cut=st.booleans())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
def test_damaged_weights_are_refused_or_read_whole(
    place: float, byte: int, cut: bool, exported_runs: Any, tmp_path_factory: Any, capsys: Any
) -> None:
    run = tmp_path_factory.mktemp("damaged") / "run"
    shutil.copytree(exported_runs["sd"][1], run)
    file = run / "adapter" / LORA_FILE
    content = bytearray(file.read_bytes())
    at = int(place * len(content))
    content[at] = byte
    file.write_bytes(content[:at] if cut else content)
    out = run.parent / "out"
    result = said(["export", str(run), "--format", "kohya", "--out", str(out)], capsys)
    assert result.code == (0 if out.exists() else 2), result
    assert result.err.count("\n") == (0 if out.exists() else 1) and "Traceback" not in result.err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--merge", "--format", "peft"], "merge is given with format peft"),
        (["--format", "onnx"], "format is 'onnx'"),
        (["--precision", "int8"], "precision is 'int8'"),
        (["--model", "nowhere"], "there is no model"),
        (["--model", "nowhere:net"], "export knows"),
    ],
)
def test_what_cannot_be_done_is_said(
    words: list[str], sentence: str, exported_runs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = said(["export", str(exported_runs["sd"][1]), "--out", str(tmp_path / "out"), *words], capsys)
    assert result.code == 2 and sentence in result.err and result.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_full_run_has_no_lora(exported_runs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "run", exported_runs["sd"][0], full=True)
    result = said(["export", str(tmp_path / "run"), "--format", "kohya"], capsys)
    assert result.code == 2 and "--merge" in result.err
    assert not list((tmp_path / "run").glob("export*"))


def test_a_disk_that_is_full_leaves_nothing(
    exported_runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tropism.export.save_file", full)
    result = said(["export", str(exported_runs["sd"][1]), "--out", str(tmp_path / "deep" / "out")], capsys)
    assert result.code == 1 and "could not be written" in result.err
    assert not (tmp_path / "deep").exists()


def test_no_run_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert "run is not given" in said(["export"], capsys).err
    assert "there is no such folder" in said(["export", "nowhere"], capsys).err
