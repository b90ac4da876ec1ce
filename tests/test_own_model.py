"""A network of one's own: the page's example as it stands, on the command line and in Python."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from small_run import refused, said, train_words
from torch import Tensor, nn

from tropism.base import concat
from tropism.denoisers import regression_target
from tropism.models.own import OwnModel
from tropism.plugins import load_function
from tropism.policy import Policy
from tropism.samplers import DDIM, EulerODE
from tropism.schedules import add_noise, ddpm_table

PAGE = Path(__file__).parents[1] / "docs" / "adding_a_model.md"
FILE = "\n".join(re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)[:1])
OWN: dict[str, Any] = dict(model="my_model.py:build", out="run", eval_every="0")
RED = ["a red fox", "two blue cubes"]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The page's file, seeded so that two builds are the same network, and prompts."""
    file = FILE.replace("    network = Network()", "    torch.manual_seed(0)\n    network = Network()")
    (tmp_path / "my_model.py").write_text(file + "\n\ndef wrong():\n    return 3\n\ndef broken():\n    return 1 / 0\n")
    (tmp_path / "prompts.txt").write_text("a red fox\ntwo blue cubes\na green hill\n")
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        yield tmp_path


def built() -> OwnModel:
    model: OwnModel = load_function("my_model.py", "build", "model")()
    return model


def test_the_example_is_short() -> None:
    code = [line for line in FILE.splitlines() if line.strip()]
    assert 10 < len(code) < 30


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_the_command_trains_it_and_draws_with_it(full: bool, capsys: pytest.CaptureFixture[str]) -> None:
    method, more = ("alignprop", {"full": ""}) if full else ("ddpo", {})
    result = said(train_words(method, **OWN, **more), capsys)
    assert result.code == 0, result.err
    saved = Path("run/adapter") / ("network/model.safetensors" if full else "adapter_model.safetensors")
    weights = load_file(saved)
    assert len(weights) == (6 if full else 2) and not any(Path("run").rglob("*.pt"))
    drawn = {}
    for name, adapter in {"base": [], "tuned": ["--adapter", "run"]}.items():
        words = ["sample", "--model", OWN["model"], "--prompt", "a red fox", "--out", f"{name}.png", *adapter]
        assert said(words, capsys).code == 0
        drawn[name] = Path(f"{name}.png").read_bytes()
    assert drawn["base"] != drawn["tuned"]
    card = Path("run/README.md").read_text()
    assert f"load_model('{OWN['model']}'" in card and ("train_full" in card) == full
    snippet = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0]
    found: dict[str, Any] = {}
    exec(snippet.replace('"adapter"', '"run/adapter"'), found)  # what the card says draws what was trained
    assert found["images"].shape == (1, 3, 32, 32)


def test_a_run_of_it_goes_on_bit_for_bit(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(train_words(**OWN, save_every="1"), capsys).code == 0
    assert said(train_words(**{**OWN, "out": "half"}, steps="1", save_every="1"), capsys).code == 0
    assert said(["train", "ddpo", "--resume", "half", "--steps", "2"], capsys).code == 0
    whole, parts = (load_file(f"{run}/adapter/adapter_model.safetensors") for run in ("run", "half"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_the_command_says_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    result = said(["models", OWN["model"]], capsys)
    assert result.code == 0
    for fact in ("OwnModel of Network", "flow", "3 x 32 x 32", "10 steps, guidance 1", "on 1 layers"):
        assert fact in result.out


def test_refusals_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    def sentence(model: str) -> str:
        return refused(train_words(model=model), capsys)

    assert "my_model.py has no bild; did you mean build?" in sentence("my_model.py:bild")
    assert "there is no such file" in sentence("other.py:build")
    assert "returned a int; wanted an OwnModel or a pipeline" in sentence("my_model.py:wrong")
    assert "image_size is (8, 8), but my_model.py:build decides" in refused(
        train_words(model=OWN["model"], image_size=["8", "8"]), capsys
    )
    assert "my_model.py:broken, which raised ZeroDivisionError: division by zero" in sentence("my_model.py:broken")


def test_peft_loads_the_lora_alone() -> None:
    model = built()
    model.add_lora(rank=2, alpha=4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3)
    model.save_adapter("adapter")
    assert json.loads(Path("adapter/adapter_config.json").read_text())["lora_alpha"] == 4
    assert not list(Path("adapter").glob(".saving*"))
    network = PeftModel.from_pretrained(built().pipe.network, "adapter")
    x, tau, rows = torch.randn(2, 3, 32, 32), torch.tensor([0.3, 0.9]), dict(model.encode(RED))
    with torch.no_grad():
        expected = network(x, tau, **rows)
        torch.testing.assert_close(model.net(x, tau, rows), expected, rtol=0, atol=1e-5)
        with model.reference():
            assert torch.equal(model.net(x, tau, rows), built().net(x, tau, rows))
        assert (model.net(x, tau, rows) - built().net(x, tau, rows)).abs().max() > 1e-2
    again = built()
    again.load_adapter("adapter")
    assert torch.equal(again.net(x, tau, rows), model.net(x, tau, rows))
    other = built()
    other.add_lora(rank=3)
    with pytest.raises(ValueError, match="rank 2, this one 3"):
        other.load_adapter("adapter")
    with pytest.raises(ValueError, match=r"no adapter_config\.json"):
        built().load_adapter("nowhere")


def test_all_the_weights_come_back() -> None:
    model = built()
    model.train_full()
    with torch.no_grad():
        model.parameters()[0].add_(1.0)
    model.save_adapter("all")
    model.save_adapter("all")
    again = built()
    with pytest.raises(ValueError, match="nothing was trained"):
        again.save_adapter("all")
    again.train_full()
    again.load_adapter("all")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with again.reference():
        assert torch.equal(again.pipe.network.read.bias, model.pipe.network.read.bias)
    Path("all/network/model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        again.load_adapter("all")


class Known(nn.Module):
    """Says its target exactly, of data that are one point a prompt."""

    def __init__(self, target: Any, schedule: Any) -> None:
        super().__init__()
        self.target, self.schedule, self.layer = target, schedule, nn.Linear(1, 1)

    def forward(self, x: Tensor, tau: Tensor, mean: Tensor) -> Tensor:
        t = tau if self.target == "flow" else (tau + 1) / self.schedule.size
        alpha, sigma = (value(t).reshape(-1, 1, 1, 1) for value in (self.schedule.alpha, self.schedule.sigma))
        x0 = mean.reshape(-1, 1, 1, 1).expand_as(x)
        return regression_target(self.target, self.schedule, x0, (x - alpha * x0) / sigma, t)


@pytest.mark.parametrize("target", ["flow", "eps", "v", "x0"])
def test_every_target_reaches_the_data(target: Any) -> None:
    """Data of one point: whatever the path and the number of moves, a chain ends in it."""
    table = None if target == "flow" else ddpm_table(100, 1e-3, 0.05)
    values = {"a red fox": 0.25, "two blue cubes": 0.75, "": 0.0}
    probe = OwnModel(nn.Linear(1, 1), lambda p: {"mean": torch.zeros(len(p))}, lambda x: x, (3, 4, 4), schedule=table)
    network = Known(target, probe.denoiser.schedule)
    model = OwnModel(
        network,
        lambda prompts: {"mean": torch.tensor([values[prompt] for prompt in prompts])},
        lambda x: x,
        (3, 4, 4),
        target=target,
        schedule=table,
        steps=5,
    )
    kernel = EulerODE() if target == "flow" else DDIM(0.0)
    images = Policy(model, kernel, model.steps).images(RED, torch.Generator().manual_seed(0))
    torch.testing.assert_close(images, torch.tensor([0.25, 0.75]).reshape(2, 1, 1, 1).expand(2, 3, 4, 4))
    guided = Policy(model, kernel, model.steps, 2.0).images(RED, torch.Generator().manual_seed(0))
    torch.testing.assert_close(guided[0], torch.full((3, 4, 4), 0.5))
    t = torch.tensor([0.4, 0.4])
    x0, eps = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    noisy = add_noise(model.denoiser.schedule, x0, eps, t)
    assert model.denoiser(noisy, t, model.encode(RED)).x0.shape == x0.shape


def test_levers_of_memory_change_nothing() -> None:
    plain, saving = built(), built()
    for model in (plain, saving):
        model.train_full()
    saving.enable_gradient_checkpointing()
    saving.enable_vae_slicing()
    saving.drop_text_encoders(RED)
    calls = []
    saving.pipe.network.read.register_forward_hook(lambda *_: calls.append(1))
    x, t = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.9])
    gradients = []
    for model in (plain, saving):
        rows = model.encode(RED)
        images = model.decode(model.denoiser(x, t, rows).x0)
        gradients.append(torch.autograd.grad(images.square().sum(), model.parameters()))
        assert set(concat(rows, model.null())) == {"letters"}
    assert len(calls) == 2
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(ValueError, match=r"dropped after 3 prompts, of which 'a green hill' is none"):
        saving.encode(["a green hill"])


def test_wrong_parts_are_named() -> None:
    one = OwnModel(nn.Linear(1, 1), lambda p: {}, lambda x: x, (1,))
    with pytest.raises(ValueError, match="encode gave nothing for 1 prompts"):
        one.encode(["a"])
    short = OwnModel(nn.Linear(1, 1), lambda p: {"row": torch.zeros(1, 2)}, lambda x: x, (1,))
    with pytest.raises(ValueError, match=r"encode gave \{'row': \(1, 2\)\} for 2 prompts"):
        short.encode(RED)
    bare = OwnModel(nn.PReLU(), lambda p: {}, lambda x: x, (1,))
    with pytest.raises(ValueError, match="PReLU has no linear or convolution layer"):
        bare.add_lora()
    with pytest.raises(ValueError, match="leave explore_weights at 1 1"):
        bare.phrases(RED)
