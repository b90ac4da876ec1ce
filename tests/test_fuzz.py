"""Malformed settings, prompt files, checkpoints, pictures and replies of rewards: one sentence, or a sound result.

Nothing but the error that says so may come out, and nothing may be half-done.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_run import said, small_place, train_words

from tropism import catalog, flags
from tropism.checkpoint import load_checkpoint
from tropism.cli import _train_settings
from tropism.config import BadInput, TrainSettings
from tropism.data.prompts import PromptSet
from tropism.methods.ddpo import Settings
from tropism.models.pipelines import wrap_pipeline
from tropism.plan import as_bad_input, make_plan
from tropism.rewards import RewardError, as_reward

many = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, max_examples=60)
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
JSON = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
NAMES = [each.name for kind in (TrainSettings, Settings) for each in flags.settings_of(kind, "")]
GOOD = {"model": "scenes", "reward": ["brightness"], "steps": 3, "save_every": 1}


def one_sentence(error: BaseException) -> None:
    text = str(error).strip()
    assert text and "\n" not in text and "Traceback" not in text, text


@pytest.fixture(scope="module")
def folder() -> Any:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def planned(file: Path) -> None:
    """All that is checked before anything loads."""
    try:
        found = _train_settings("ddpo", ["--config", str(file), "--out", str(file.parent / "run")], "train")
        assert found is not None
        make_plan(*found)
    except BadInput as error:
        one_sentence(error)
    assert not (file.parent / "run").exists()


@many
@given(st.sampled_from(NAMES), JSON)
def test_settings_of_any_kind(folder: Path, name: str, value: Any) -> None:
    if name in ("threads", "device"):
        return  # these are tried on the machine
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(GOOD | {name: value}, allow_unicode=True), encoding="utf-8")
    planned(file)


@many
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_configurations_that_are_no_yaml(folder: Path, content: bytes) -> None:
    file = folder / "config.yaml"
    file.write_bytes(content)
    planned(file)


ROWS = st.dictionaries(st.sampled_from(["prompt", "answer", "images", ""]), JSON, max_size=3).map(json.dumps)
LINES = st.lists(ROWS | st.text(max_size=20), max_size=4).map("\n".join)


@many
@given(
    st.binary(max_size=80) | LINES.map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.sampled_from([".txt", ".jsonl", ".csv", ""]),
)
def test_prompt_files_of_any_content(folder: Path, content: bytes, suffix: str) -> None:
    file = folder / f"prompts{suffix}"
    file.write_bytes(content)
    try:
        prompts = catalog.read_prompt_set(str(file))
    except BadInput as error:
        one_sentence(error)
    else:
        assert len(prompts) and all(isinstance(text, str) and text.strip() for text in prompts.text)
        assert all(len(values) == len(prompts) for values in prompts.columns.values())
    finally:
        file.unlink()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(a checkpoint of a tiny run, the parts that it is loaded into)."""
    place = tmp_path_factory.mktemp("trained")
    tiny.sd_pipeline().save_pretrained(place / "tiny")
    small_place(place / "tiny", place)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        from tropism.cli import main

        assert main(train_words(out="run", steps="1")) == 0
    model = wrap_pipeline(tiny.sd_pipeline(), guidance_scale=2.0, steps=3)
    model.add_lora(8, generator=torch.Generator().manual_seed(0))
    method = Settings(inference_steps=3).build(
        model, as_reward(lambda images: images.mean((1, 2, 3)), "x"), torch.Generator()
    )
    return place / "run" / "checkpoints" / "step-000001", model, method


@st.composite
def damage(draw: Any) -> Any:
    """damage(bytes) -> other bytes, or None where the file is gone."""
    kind = draw(st.sampled_from(["cut", "flip", "junk", "gone", "json"]))
    place, junk = draw(st.floats(0, 1, exclude_max=True)), draw(st.binary(max_size=30))
    name, value = draw(st.sampled_from(["step", "optimizer", "method", "run"])), draw(JSON)

    def change(content: bytes) -> bytes | None:
        at = int(place * len(content))
        if kind == "json" and content[:1] == b"{":
            return json.dumps(json.loads(content) | {name: value}).encode()
        return {"cut": content[:at], "flip": content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]}.get(
            kind, junk if kind != "gone" else None
        )

    return change


@many
@given(st.sampled_from(["state.json", "state.safetensors", "pytorch_lora_weights.safetensors"]), damage())
def test_damaged_checkpoints(trained: Any, folder: Path, name: str, change: Any) -> None:
    whole, model, method = trained
    broken = folder / "broken"
    shutil.copytree(whole, broken)
    content = change((broken / name).read_bytes())
    damaged = content != (broken / name).read_bytes()
    (broken / name).unlink()
    if content is not None:
        (broken / name).write_bytes(content)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    try:
        with as_bad_input(ValueError, OSError):
            load_checkpoint(broken, model, optimizer, method)
        assert not damaged
    except BadInput as error:
        one_sentence(error)
        assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
        assert not optimizer.state
    finally:
        shutil.rmtree(broken)


SHAPED = [torch.ones(shape) for shape in ((2,), (2, 1), (3,), (2, 2), (), (0,))]
TYPED = [torch.ones(2, dtype=dtype) for dtype in (torch.long, torch.complex64, torch.bool, torch.bfloat16)]
ODD = [b"xx", object(), 1j, {1, 2}, [torch.tensor(1.0), None], [[1.0], [2.0]], "12", ["1", "2"], 10**400, [10**400, 1]]
REPLIES = JSON | st.lists(PLAIN, min_size=2, max_size=2) | st.tuples(JSON, JSON) | st.sampled_from(SHAPED + TYPED + ODD)


@settings(many, max_examples=200)
@given(REPLIES)
def test_replies_of_a_reward(reply: Any) -> None:
    reward = as_reward(lambda images, prompts: reply, "user")
    try:
        values = reward(torch.rand(2, 3, 4, 4), ["a", "b"])
    except RewardError as error:
        one_sentence(error)
    else:
        assert values.shape == (2,) and values.dtype == torch.float32 and not values.isinf().any()


SHAPES = st.lists(st.integers(0, 5), min_size=0, max_size=5)


@many
@given(SHAPES, st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.long]),
       st.sampled_from(["jpeg_compressibility", "jpeg_incompressibility", "brightness", "redness", "scenes"]),
       st.sampled_from([0.5, -1.0, 3.0, float("nan"), float("inf")]))  # fmt: skip
def test_pictures_of_any_shape(shape: list[int], dtype: torch.dtype, name: str, value: float) -> None:
    spec = catalog.check_rewards([name])[0]
    reward = catalog.build_reward(spec, "scenes", torch.device("cpu"))
    images = torch.full(shape, value if dtype.is_floating_point else 1.0).to(dtype)
    prompts = ["a red circle"] * (shape[0] if shape else 1)
    try:
        values = reward(images, prompts)
    except RewardError as error:
        one_sentence(error)
    else:
        assert values.shape == (len(prompts),) and values.dtype == torch.float32


def test_a_damaged_run_is_said_in_one_line(trained: Any, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = trained[0]
    (checkpoint / "state.json").write_text("{")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(checkpoint.parents[2])
        result = said(["train", "ddpo", "--resume", "run", "--steps", "2"], capsys)
    assert result.code == 2 and result.err.count("\n") == 1 and "is not whole" in result.err


def test_prompt_sets_are_made_of_what_was_read(folder: Path) -> None:
    file = folder / "some.jsonl"
    file.write_text('{"prompt": "a", "answer": 1}\n{"prompt": "b", "answer": 2}\n')
    assert catalog.read_prompt_set(str(file)) == PromptSet(["a", "b"], {"answer": [1, 2]})
