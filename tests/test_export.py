"""What a run has trained, in every format: other programs draw the same pictures with it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from families import ROWS
from families import ours as drawn
from families import theirs as drawn_there
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_run import said, small_place, train_words

from tropism.cli import main
from tropism.evaluate import deterministic
from tropism.models.adapters import LORA_FILE
from tropism.models.latent_pipeline import LatentPipeline
from tropism.models.pipelines import load_pipeline

FORMATS = ("diffusers", "peft", "kohya", "comfyui")
NAMED = {"diffusers": LORA_FILE, "peft": "adapter_model.safetensors", "kohya": "run.safetensors"}
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


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path, LatentPipeline]]:
    """By family: the base model, a run on it, and the model with what it trained."""
    home = tmp_path_factory.mktemp("export")
    found = {}
    for family, base in (("sd", tiny.sd_folder(home / "sd")), ("sd3", tiny.sd3_folder(home / "sd3", t5=True))):
        found[family] = (base, home / family / "run", make_run(home / family / "run", base))
    return found


families = pytest.mark.parametrize("family", ["sd", "sd3"])


def export(run: Path, out: Path, *words: str) -> Path:
    assert main(["export", str(run), "--out", str(out), *words]) == 0
    return out


def plain(base: Path) -> Any:
    pipe = DiffusionPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def theirs(pipe: Any) -> torch.Tensor:
    options = {"eta": 0.0} if hasattr(pipe, "unet") else {}
    images = pipe(tiny.PROMPTS, latents=tiny.noise(2), num_inference_steps=STEPS, output_type="pt", **options).images
    return torch.as_tensor(images)


def ours(model: LatentPipeline) -> torch.Tensor:
    policy = deterministic(model, STEPS, None, 2)
    with torch.no_grad():
        *_, last = policy.chain(tiny.noise(2), model.encode(tiny.PROMPTS))
        return model.decode(last.x_next)


def check_equal(pipe: Any, model: LatentPipeline, base: Path) -> None:
    """The pipeline draws what tropism draws with its adapter, which is not what the base draws."""
    found, wanted = theirs(pipe), ours(model)
    assert (theirs(plain(base)) - wanted).abs().max() > 0.1
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@families
def test_diffusers_file_draws_the_same(family: str, places: Any, tmp_path: Path) -> None:
    base, run, model = places[family]
    out, pipe = export(run, tmp_path / "out"), plain(base)
    pipe.load_lora_weights(out)
    check_equal(pipe, model, base)
    (config,) = getattr(pipe, model.part).peft_config.values()
    assert (config.r, config.lora_alpha) == (2, 6)
    saved, trained = load_file(out / LORA_FILE), load_file(run / "adapter" / LORA_FILE)
    assert saved.keys() == trained.keys() and all(torch.equal(saved[name], trained[name]) for name in saved)


@families
def test_peft_folder_draws_the_same(family: str, places: Any, tmp_path: Path) -> None:
    base, run, model = places[family]
    out, pipe = export(run, tmp_path / "out", "--format", "peft"), plain(base)
    setattr(pipe, model.part, PeftModel.from_pretrained(getattr(pipe, model.part), out))
    check_equal(pipe, model, base)
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (2, 6, str(base))


@pytest.mark.parametrize("format", ["kohya", "comfyui"])
def test_kohya_names_of_a_unet_draw_the_same(format: str, places: Any, tmp_path: Path) -> None:
    base, run, model = places["sd"]
    out, pipe = export(run, tmp_path / "out", "--format", format), plain(base)
    tensors = load_file(out / "run.safetensors")
    ends = {name.partition(".")[2] for name in tensors}
    assert ends == {"lora_down.weight", "lora_up.weight", "alpha"}
    assert all(name.startswith("lora_unet_") for name in tensors)
    assert {float(value) for name, value in tensors.items() if name.endswith(".alpha")} == {6.0}
    pipe.load_lora_weights(out, weight_name="run.safetensors")
    check_equal(pipe, model, base)


class Original(dict[str, torch.Tensor]):
    """SD3 in its original names as far as diffusers' converter asks: the change that a kohya file makes, else zeros."""

    def __init__(self, lora: dict[str, torch.Tensor], blocks: int) -> None:
        zeros = {f"joint_blocks.{i}.x_block.attn.qkv.weight": torch.zeros(6, 1) for i in range(blocks)}
        super().__init__(zeros | {"context_embedder.weight": torch.zeros(6, 1)})
        self.lora, self.used = lora, set[str]()

    def pop(self, name: str, *default: Any) -> torch.Tensor:
        kohya = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        if name.endswith(".bias") or f"{kohya}.alpha" not in self.lora:
            return torch.zeros(6, 1)
        self.used |= {f"{kohya}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")}
        down, up = self.lora[f"{kohya}.lora_down.weight"], self.lora[f"{kohya}.lora_up.weight"]
        return self.lora[f"{kohya}.alpha"] / down.shape[0] * up @ down


def test_kohya_names_of_sd3_draw_the_same(places: Any, tmp_path: Path) -> None:
    """Query, key and value are one layer there; diffusers' converter of SD3's own checkpoints takes them apart."""
    base, run, model = places["sd3"]
    lora = load_file(export(run, tmp_path / "out", "--format", "kohya") / "run.safetensors")
    assert lora["lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight"].shape == (6, 16)
    assert lora["lora_unet_joint_blocks_0_x_block_attn_qkv.alpha"] == 18.0
    assert lora["lora_unet_joint_blocks_0_x_block_attn_proj.alpha"] == 6.0
    original = Original(lora, blocks=2)
    changes = convert_sd3_transformer_checkpoint_to_diffusers(original)
    assert original.used == set(lora)
    pipe = plain(base)
    weights = dict(pipe.transformer.named_parameters())
    with torch.no_grad():
        for name, change in changes.items():
            if name.endswith(".weight") and bool(change.any()):
                weights[name].add_(change)
    check_equal(pipe, model, base)


@torch.no_grad()
def add_as_comfyui(net: torch.nn.Module, lora: dict[str, torch.Tensor]) -> None:
    """As ComfyUI reads them: weight + alpha / rank * B @ A for ``transformer.<layer>``, 1 where there is no alpha."""
    layers = {name.partition(".lora_")[0].removesuffix(".alpha") for name in lora}
    for name, weight in net.named_parameters():
        layer = f"transformer.{name.removesuffix('.weight')}"
        if layer in layers:
            down, up = lora[f"{layer}.lora_A.weight"], lora[f"{layer}.lora_B.weight"]
            weight.add_(lora.get(f"{layer}.alpha", torch.tensor(len(down))) / len(down) * up @ down)
            layers.remove(layer)
    assert not layers


def test_comfyui_names_of_sd3_draw_the_same(places: Any, tmp_path: Path) -> None:
    base, run, model = places["sd3"]
    lora = load_file(export(run, tmp_path / "out", "--format", "comfyui") / "run.safetensors")
    pipe = plain(base)
    add_as_comfyui(pipe.transformer, lora)
    check_equal(pipe, model, base)


def test_comfyui_file_without_alphas_is_read_by_diffusers_too(places: Any, tmp_path: Path) -> None:
    base = places["sd3"][0]
    model = make_run(tmp_path / "run", base, alpha=2)
    out, pipe = export(tmp_path / "run", tmp_path / "out", "--format", "comfyui"), plain(base)
    pipe.load_lora_weights(out, weight_name="run.safetensors")
    check_equal(pipe, model, base)


@families
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_merged_pipeline_draws_the_same(family: str, full: bool, places: Any, tmp_path: Path) -> None:
    base, run, model = places[family]
    if full:
        run, model = tmp_path / "run", make_run(tmp_path / "run", base, full=True)
    out = export(run, tmp_path / "out", "--merge")
    check_equal(plain(out), model, base)
    assert json.loads((out / "tropism.json").read_text())["guidance_scale"] == model.guidance_scale
    assert not list(out.rglob("*lora*"))
    assert str(base) not in "".join(file.read_text() for file in out.rglob("*.json"))
    torch.testing.assert_close(ours(load_pipeline(out, onednn=False)), ours(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, kind) for name in ("lcm", "sdxl", "flux-dev", "pixart-alpha") for kind in ("peft", "merged")),
        *((name, "diffusers") for name in ("lcm", "sdxl", "flux-dev", "flux-schnell")),
        *((name, "comfyui") for name in ("lcm", "sdxl", "flux-dev", "pixart-alpha")),
        *((name, "kohya") for name in ("lcm", "sdxl")),
    ],
)
def test_other_families_draw_the_same(name: str, kind: str, tmp_path: Path) -> None:
    row = ROWS[name]
    row.build().save_pretrained(tmp_path / "base")
    model = row.model(onednn=False)
    model.add_lora(2, 6)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_adapter(tmp_path / "run")
    words = ["--merge"] if kind == "merged" else ["--format", kind]
    out = export(tmp_path / "run", tmp_path / "out", "--model", str(tmp_path / "base"), *words)
    pipe = plain(out if kind == "merged" else tmp_path / "base")
    if kind == "peft":
        setattr(pipe, model.part, PeftModel.from_pretrained(getattr(pipe, model.part), out))
    elif kind == "comfyui" and model.part == "transformer":
        add_as_comfyui(pipe.transformer, load_file(out / "run.safetensors"))
    elif kind != "merged":
        pipe.load_lora_weights(out, weight_name=LORA_FILE if kind == "diffusers" else "run.safetensors")
    wanted = drawn(row, model)
    assert (drawn_there(row, plain(tmp_path / "base")) - wanted).abs().max() > 1e-2
    torch.testing.assert_close(drawn_there(row, pipe), wanted, rtol=0, atol=1e-4)  # as test_families has it


@pytest.mark.parametrize(("format", "sentence"), [("diffusers", "use peft, or merge"), ("kohya", "have no names")])
def test_pixart_is_refused_where_nothing_reads_it(format: str, sentence: str, tmp_path: Path, capsys: Any) -> None:
    ROWS["pixart-alpha"].build().save_pretrained(tmp_path / "base")
    model = ROWS["pixart-alpha"].model()
    model.add_lora(2)
    model.save_adapter(tmp_path / "run")
    words = ["export", str(tmp_path / "run"), "--model", str(tmp_path / "base"), "--format", format]
    result = said(words, capsys)
    assert result.code == 2 and sentence in result.err and result.err.count("\n") == 1
    assert not list((tmp_path / "run").glob("export*"))


def test_header_says_what_the_weights_are(places: Any, tmp_path: Path) -> None:
    base, run, _ = places["sd"]
    for format, name in NAMED.items():
        file = export(run, tmp_path / format, "--format", format) / name
        with safe_open(str(file), framework="pt") as opened:
            said_ = opened.metadata()
        content = file.read_bytes()
        weights = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
        assert said_["modelspec.hash_sha256"] == "0x" + weights
        assert said_["modelspec.architecture"] == "stable-diffusion-v1/lora"
        assert (said_["modelspec.resolution"], said_["modelspec.prediction_type"]) == ("16x16", "epsilon")
        assert (said_["tropism.base_model"], said_["tropism.step"]) == (str(base), "2")
        assert (said_["tropism.reward"], said_["tropism.method"]) == ("brightness=2 redness", "ddpo")
        assert ("ss_network_dim" in said_) == (format == "kohya")
    assert (said_["ss_network_dim"], said_["ss_network_alpha"], said_["ss_seed"]) == ("2", "6", "7")
    assert (said_["ss_base_model_version"], said_["sshs_model_hash"]) == ("sd_v1", weights)
    assert "sshs_legacy_hash" not in said_  # the old hash looks at bytes that a small file does not have


def test_card_has_the_pictures_the_rewards_and_the_use(places: Any, tmp_path: Path) -> None:
    base, run, _ = places["sd"]
    out = export(run, tmp_path / "out", "--format", "kohya")
    card = (out / "README.md").read_text()
    facts = next(yaml.safe_load_all(card))
    assert facts["base_model"] == str(base) and "lora" in facts["tags"]
    assert 'pipe.load_lora_weights(".", weight_name="run.safetensors")' in card
    assert "| brightness | 0.5 | 0.875 |" in card and "| weighted sum | 0.25 | 0.75 |" in card
    assert "Gain 0.5 (95 % interval 0.25 to 0.75); better in 75 % of the pairs." in card
    assert sorted(file.name for file in out.iterdir()) == [
        "README.md", "before_after.png", "run.safetensors", "step-000002.png"]  # fmt: skip
    assert all(f"]({name})" in card for name in ("before_after.png", "step-000002.png"))


@pytest.mark.parametrize("kind", ["diffusers", "peft", "kohya", "merged"])
def test_the_use_of_the_card_works(kind: str, places: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, run, model = places["sd"]
    words = ["--merge"] if kind == "merged" else ["--format", kind]
    out = export(run, tmp_path / "out", *words)
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(out)
    names: dict[str, Any] = {}
    exec(code, names)
    names["pipe"].set_progress_bar_config(disable=True)
    check_equal(names["pipe"], model, base)


def test_half_precision_rounds_weights_and_keeps_alpha(places: Any, tmp_path: Path) -> None:
    _, run, _ = places["sd"]
    exact = load_file(export(run, tmp_path / "a", "--format", "kohya") / "run.safetensors")
    half = load_file(export(run, tmp_path / "b", "--format", "kohya", "--precision", "float16") / "run.safetensors")
    for name, value in exact.items():
        assert torch.equal(half[name], value if name.endswith(".alpha") else value.half())


def test_exporting_twice_gives_the_same_file(places: Any, tmp_path: Path) -> None:
    """Up to the order of the header's entries, which safetensors leaves open."""
    _, run, _ = places["sd3"]
    files = [export(run, tmp_path / name, "--format", "kohya") / "run.safetensors" for name in "ab"]
    start = 8 + int.from_bytes(files[0].read_bytes()[:8], "little")
    assert files[0].read_bytes()[start:] == files[1].read_bytes()[start:]
    headers = [json.loads(file.read_bytes()[8:start]) for file in files]
    assert headers[0] == headers[1]


def test_a_trained_run_and_its_checkpoint(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(small_place(tiny_sd, tmp_path))
    assert main(train_words(out="r")) == 0
    assert said(["export", "r"], capsys).code == 0
    again = said(["export", "r"], capsys)
    assert again.code == 2 and "which holds files already" in again.err
    assert said(["export", "r/checkpoints/step-000001", "--format", "kohya"], capsys).code == 0
    out = Path("r/export-kohya-step-000001")
    assert {file.name for file in out.iterdir()} == {"README.md", "r-step-000001.safetensors", "step-000001.png"}
    shutil.copytree("r/adapter", "adapter-alone")
    assert "give --model" in said(["export", "adapter-alone"], capsys).err
    assert said(["export", "adapter-alone", "--model", "model", "--out", "alone"], capsys).code == 0
    alone, whole = (load_file(Path(name, LORA_FILE)) for name in ("alone", "r/export-diffusers"))
    assert all(torch.equal(alone[name], whole[name]) for name in whole)


# What is refused.


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
    name: str, places: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(places["sd"][1], tmp_path / "run")
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
    place: float, byte: int, cut: bool, places: Any, tmp_path_factory: Any, capsys: Any
) -> None:
    run = tmp_path_factory.mktemp("damaged") / "run"
    shutil.copytree(places["sd"][1], run)
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
    words: list[str], sentence: str, places: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = said(["export", str(places["sd"][1]), "--out", str(tmp_path / "out"), *words], capsys)
    assert result.code == 2 and sentence in result.err and result.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_full_run_has_no_lora(places: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "run", places["sd"][0], full=True)
    result = said(["export", str(tmp_path / "run"), "--format", "kohya"], capsys)
    assert result.code == 2 and "--merge" in result.err
    assert not list((tmp_path / "run").glob("export*"))


def test_a_disk_that_is_full_leaves_nothing(
    places: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tropism.export.save_file", full)
    result = said(["export", str(places["sd"][1]), "--out", str(tmp_path / "deep" / "out")], capsys)
    assert result.code == 1 and "could not be written" in result.err
    assert not (tmp_path / "deep").exists()


def test_no_run_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert "run is not given" in said(["export"], capsys).err
    assert "there is no such folder" in said(["export", "nowhere"], capsys).err


def test_a_checkpoint_of_averaged_weights(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(small_place(tiny_sd, tmp_path))
    assert said(train_words(out="r", steps="2", ema="0.5", learning_rate="1e-2"), capsys).code == 0
    assert said(["export", "r/checkpoints/step-000001", "--out", "one"], capsys).code == 0
    name = "pytorch_lora_weights.safetensors"
    exported, average, plain = (
        load_file(folder / name)
        for folder in (Path("one"), Path("r/checkpoints/step-000001/adapter"), Path("r/checkpoints/step-000001"))
    )
    assert all(torch.equal(exported[key], average[key]) for key in average)
    assert any(not torch.equal(average[key], plain[key]) for key in average)
    with safe_open(Path("one") / name, "pt") as file:
        assert file.metadata()["tropism.step"] == "1" and file.metadata()["tropism.base_model"] == "model"
