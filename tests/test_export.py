"""What a run has trained, in every format: other programs draw the same pictures with it."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from exporting import STEPS, export, make_run
from families import ROWS
from families import ours as drawn
from families import theirs as drawn_there
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from small_run import said, small_place, train_words

from tropism.cli import main
from tropism.evaluate import deterministic
from tropism.models.adapters import LORA_FILE
from tropism.models.latent_pipeline import LatentPipeline
from tropism.models.pipelines import load_pipeline

FORMATS = ("diffusers", "peft", "kohya", "comfyui")
NAMED = {"diffusers": LORA_FILE, "peft": "adapter_model.safetensors", "kohya": "run.safetensors"}


families = pytest.mark.parametrize("family", ["sd", "sd3"])


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
def test_diffusers_file_draws_the_same(family: str, exported_runs: Any, tmp_path: Path) -> None:
    base, run, model = exported_runs[family]
    out, pipe = export(run, tmp_path / "out"), plain(base)
    pipe.load_lora_weights(out)
    check_equal(pipe, model, base)
    (config,) = getattr(pipe, model.part).peft_config.values()
    assert (config.r, config.lora_alpha) == (2, 6)
    saved, trained = load_file(out / LORA_FILE), load_file(run / "adapter" / LORA_FILE)
    assert saved.keys() == trained.keys() and all(torch.equal(saved[name], trained[name]) for name in saved)


@families
def test_peft_folder_draws_the_same(family: str, exported_runs: Any, tmp_path: Path) -> None:
    base, run, model = exported_runs[family]
    out, pipe = export(run, tmp_path / "out", "--format", "peft"), plain(base)
    setattr(pipe, model.part, PeftModel.from_pretrained(getattr(pipe, model.part), out))
    check_equal(pipe, model, base)
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (2, 6, str(base))


@pytest.mark.parametrize("format", ["kohya", "comfyui"])
def test_kohya_names_of_a_unet_draw_the_same(format: str, exported_runs: Any, tmp_path: Path) -> None:
    base, run, model = exported_runs["sd"]
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


def test_kohya_names_of_sd3_draw_the_same(exported_runs: Any, tmp_path: Path) -> None:
    """Query, key and value are one layer there; diffusers' converter of SD3's own checkpoints takes them apart."""
    base, run, model = exported_runs["sd3"]
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


def test_comfyui_names_of_sd3_draw_the_same(exported_runs: Any, tmp_path: Path) -> None:
    base, run, model = exported_runs["sd3"]
    lora = load_file(export(run, tmp_path / "out", "--format", "comfyui") / "run.safetensors")
    pipe = plain(base)
    add_as_comfyui(pipe.transformer, lora)
    check_equal(pipe, model, base)


def test_comfyui_file_without_alphas_is_read_by_diffusers_too(exported_runs: Any, tmp_path: Path) -> None:
    base = exported_runs["sd3"][0]
    model = make_run(tmp_path / "run", base, alpha=2)
    out, pipe = export(tmp_path / "run", tmp_path / "out", "--format", "comfyui"), plain(base)
    pipe.load_lora_weights(out, weight_name="run.safetensors")
    check_equal(pipe, model, base)


@families
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_merged_pipeline_draws_the_same(family: str, full: bool, exported_runs: Any, tmp_path: Path) -> None:
    base, run, model = exported_runs[family]
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


def test_header_says_what_the_weights_are(exported_runs: Any, tmp_path: Path) -> None:
    base, run, _ = exported_runs["sd"]
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


def test_card_has_the_pictures_the_rewards_and_the_use(exported_runs: Any, tmp_path: Path) -> None:
    base, run, _ = exported_runs["sd"]
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
def test_the_use_of_the_card_works(
    kind: str, exported_runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, run, model = exported_runs["sd"]
    words = ["--merge"] if kind == "merged" else ["--format", kind]
    out = export(run, tmp_path / "out", *words)
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(out)
    names: dict[str, Any] = {}
    exec(code, names)
    names["pipe"].set_progress_bar_config(disable=True)
    check_equal(names["pipe"], model, base)


def test_half_precision_rounds_weights_and_keeps_alpha(exported_runs: Any, tmp_path: Path) -> None:
    _, run, _ = exported_runs["sd"]
    exact = load_file(export(run, tmp_path / "a", "--format", "kohya") / "run.safetensors")
    half = load_file(export(run, tmp_path / "b", "--format", "kohya", "--precision", "float16") / "run.safetensors")
    for name, value in exact.items():
        assert torch.equal(half[name], value if name.endswith(".alpha") else value.half())


def test_exporting_twice_gives_the_same_file(exported_runs: Any, tmp_path: Path) -> None:
    """Up to the order of the header's entries, which safetensors leaves open."""
    _, run, _ = exported_runs["sd3"]
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
