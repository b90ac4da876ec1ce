"""Students that are told the guidance: each row its own, as the teacher has it; plain diffusers draws the same."""

from __future__ import annotations

import dataclasses
import inspect
import io
import json
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import (
    DiffusionPipeline,
    LatentConsistencyModelPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from distillers import SIZES
from families import Row, ours, theirs
from methods import Off, batch, toy
from nets import randn
from small_run import refused, said, small_place
from test_few_step import distil_words, pixels
from torch import Tensor, nn

from tropism.cli import main
from tropism.commands import with_adapter
from tropism.denoisers import END, TOLD, NetDenoiser, takes_guidance
from tropism.distillation.pairs import scaled, unasked
from tropism.guidance import Guided, Told, by_row
from tropism.methods import lcm, rg_lcd
from tropism.models.own import OwnModel
from tropism.models.pipelines import load_pipeline, wrap_pipeline
from tropism.models.ring import Ring
from tropism.schedules import RectifiedFlow

SCALES = (1.0, 3.0, 7.5)


QUIET: Any = {
    LatentConsistencyModelPipeline: {"requires_safety_checker": False},
    StableDiffusionPipeline: {"requires_safety_checker": False},
    StableDiffusionXLPipeline: {"add_watermarker": False},
}


def student(build: Any = tiny.sd_pipeline, hops: Any = "consistency", seed: int = 1) -> Any:
    """A tiny SD, fully trained, as a model of two moves that is told its guidance; its new input and the
    rest of its weights are not what they were."""
    model = wrap_pipeline(build(), onednn=False)
    model.train_full()
    view = model.few_step(hops, 2, 3.0)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model, view


# The network.


def test_the_new_input_changes_nothing_at_first() -> None:
    """Whatever the scale: the same numbers as before, from the network and from its reference."""
    model = wrap_pipeline(tiny.sd_pipeline(), onednn=False)
    x, t, rows = tiny.noise(2), torch.tensor([0.9, 0.3]), model.encode(tiny.PROMPTS)
    model.train_full()
    before, count = model.denoiser(x, t, rows).eps, len(model.parameters())
    model.be_told()
    model.be_told()  # once is enough
    assert len(model.parameters()) == count + 1 and model.parameters()[-1].shape == (8, 256)
    for cond in (rows, {**rows, TOLD: torch.tensor([1.0, 9.0])}):
        assert torch.equal(model.denoiser(x, t, cond).eps, before)
        with model.reference():
            assert torch.equal(model.denoiser(x, t, cond).eps, before)


def test_the_embedding_is_the_one_of_diffusers() -> None:
    """get_guidance_scale_embedding of w - 1, LCM's convention, whatever this house's w; by rows."""
    model, view = student()
    w = torch.tensor([1.0, 4.25])
    embedded = view._guidance(view.pipe.unet, tiny.noise(2), {TOLD: w})
    pipe = tiny.lcm_pipeline()
    assert torch.equal(embedded, pipe.get_guidance_scale_embedding(w - 1, embedding_dim=256))
    angles = 1000 * 3.25 * torch.exp(-torch.arange(128) * torch.log(torch.tensor(10000.0)) / 127)
    torch.testing.assert_close(embedded[1, :128], angles.sin(), rtol=0, atol=1e-3)
    with model.reference():
        assert model._guidance(model._network(), tiny.noise(2), {TOLD: w}) is None


PIPELINES: Any = {
    "lcm": (tiny.sd_pipeline, LatentConsistencyModelPipeline, "consistency"),
    "sd": (tiny.sd_pipeline, StableDiffusionPipeline, "consistency"),
    "sd-ddim": (tiny.sd_pipeline, StableDiffusionPipeline, "ode"),
    "sdxl": (tiny.sdxl_pipeline, StableDiffusionXLPipeline, "consistency"),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_plain_diffusers_draws_a_told_student(name: str, tmp_path: Path) -> None:
    """At several scales, from what was saved; the tiny pipelines have random weights."""
    build, kind, hops = PIPELINES[name]
    _, view = student(build, hops)
    view.save_adapter(tmp_path)
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    assert unet.config.time_cond_proj_dim == 256
    parts = {**build().components, "unet": unet, "scheduler": view.pipe.scheduler}
    known = inspect.signature(kind.__init__).parameters
    pipe = tiny._quiet(kind(**{part: value for part, value in parts.items() if part in known}, **QUIET[kind]))
    for scale in SCALES:
        mine = ours(Row(lambda: None, 2, scale), view)
        expected = theirs(Row(lambda: None, 2, scale), pipe)
        assert expected.std() > 0.02
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-4)
    other = ours(Row(lambda: None, 2, scale + 1), view)
    assert (mine - other).abs().max() > 1e-3


def test_teacher_and_student_share_a_network_and_are_asked_differently() -> None:
    model, view = student()
    assert not takes_guidance(model.denoiser) and takes_guidance(view.denoiser)
    assert view.told() == {"guidance_scale": 3.0, "steps": 2, "hops": "consistency", "told": True}
    method = lcm.Settings(told=(1.0, 8.0), student_steps=2, inference_steps=4).build(
        model, Off(), torch.Generator().manual_seed(0)
    )
    assert isinstance(method.policy.denoiser, Told) and isinstance(method.teacher.denoiser, Guided)
    rows = {**model.encode(tiny.PROMPTS), TOLD: torch.tensor([2.0, 5.0])}
    x, t = tiny.noise(2), torch.tensor([0.9, 0.4])
    with torch.no_grad(), model.reference():
        wanted = [Guided(model.denoiser, model.null(), w)(x, t, rows).eps for w in (2.0, 5.0)]
    found = method.teacher.denoiser(x, t, rows).eps
    torch.testing.assert_close(found, torch.stack([wanted[0][0], wanted[1][1]]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("build", [tiny.sd3_pipeline, tiny.pixart_pipeline, lambda: tiny.flux_pipeline(guidance=False)])
def test_a_network_that_cannot_be_told_is_refused(build: Any) -> None:
    model = wrap_pipeline(build())
    model.train_full()
    with pytest.raises(ValueError, match=r"the network of a \w+ cannot be told its guidance; leave told out, or take"):
        lcm.Settings(told=(1.0, 8.0)).build(model, Off(), torch.Generator())


def test_a_lora_cannot_hold_the_input() -> None:
    model = wrap_pipeline(tiny.sd_pipeline())
    model.add_lora(2)
    with pytest.raises(
        ValueError, match=r"a LoRA cannot hold the input .*; train it in full \(full\), or leave told out"
    ):
        model.few_step("consistency", 4, 3.0)


def test_a_network_that_is_told_anyway_needs_nothing_new() -> None:
    """FLUX.1 dev, with a LoRA: teacher and student are told the same rows."""
    model = wrap_pipeline(tiny.flux_pipeline())
    model.add_lora(2)
    method = lcm.Settings(told=(1.0, 4.0), student_steps=2, inference_steps=4).build(
        model, Off(), torch.Generator().manual_seed(0)
    )
    assert isinstance(method.teacher.denoiser, Told) and method.teacher.guidance is by_row
    assert isinstance(method.policy.denoiser, Told) and method.policy.model.guidance_scale == 3.5


# Rows.


def test_scales_are_even_in_their_range_and_one_a_row() -> None:
    cond = {"label": torch.arange(20_000)}
    drawn = scaled(cond, (2.0, 6.0), torch.Generator().manual_seed(0))[TOLD]
    assert drawn.min() >= 2 and drawn.max() <= 6
    torch.testing.assert_close(torch.histc(drawn, 8, 2, 6) / 20_000, torch.full((8,), 1 / 8), rtol=0, atol=0.01)
    assert scaled(cond, None, torch.Generator()) is cond


def test_rows_without_prompt_are_the_null_row() -> None:
    cond = {"a": randn(4000, 3, 2) + 9, "b": torch.ones(4000, dtype=torch.int64)}
    null = {"a": torch.zeros(1, 3, 2), "b": torch.tensor([-1])}
    found = unasked(cond, null, 0.25, torch.Generator().manual_seed(0))
    gone = found["b"] == -1
    assert float(gone.float().mean()) == pytest.approx(0.25, abs=0.02)
    assert (found["a"][gone] == 0).all() and torch.equal(found["a"][~gone], cond["a"][~gone])


@pytest.mark.parametrize("data", ["chains", "pictures"])
def test_the_chain_of_a_row_follows_the_scale_it_is_told(data: Any) -> None:
    """Two neighbouring states are a move of the guided teacher apart, at each row's own scale."""
    model = toy("flow")
    settings = lcm.Settings(**SIZES, told=(1.0, 6.0), data=data, minibatch=1000)
    settings.check()
    more = {"pictures": lambda prompts, generator: randn(len(prompts.text), 2)} if data == "pictures" else {}
    method = settings.build(model, Off(), torch.Generator().manual_seed(0), **more)
    pairs = next(iter(next(iter(method.experience(batch(64))))))
    w = pairs.cond[TOLD]
    assert w.min() < 1.5 and w.max() > 5.5
    with torch.no_grad(), model.reference():
        both = [model.denoiser(pairs.x, pairs.t, {"prompt_embeds": each}) for each in
                (pairs.cond["prompt_embeds"], model.null()["prompt_embeds"].expand(len(w), -1, -1))]  # fmt: skip
    flow = [each.eps - each.x0 for each in both]
    guided = flow[1] + w[:, None] * (flow[0] - flow[1])
    wanted = pairs.x + (pairs.s - pairs.t)[:, None] * guided
    torch.testing.assert_close(pairs.y, wanted, rtol=1e-4, atol=1e-4)
    shuffled = pairs.x + (pairs.s - pairs.t)[:, None] * (flow[1] + w.flip(0)[:, None] * (flow[0] - flow[1]))
    assert (pairs.y - shuffled).abs().max() > 0.05


def test_rows_that_are_not_told_are_refused() -> None:
    with pytest.raises(ValueError, match=r"cond\['told_guidance'\] is nothing; wanted a scale for each of 2 rows"):
        by_row(torch.ones(2), {})
    with pytest.raises(ValueError, match=r"is \(3,\); wanted a scale for each of 2 rows"):
        by_row(torch.ones(2), {TOLD: torch.ones(3)})


def test_both_halves_of_guidance_hear_the_same_scale_and_others_none() -> None:
    heard = []

    def net(x: Tensor, number: Tensor, cond: Any) -> Tensor:
        heard.append(cond)
        return x * 0

    x, t, row = randn(2, 3), torch.tensor([0.5, 0.5]), {"label": torch.zeros(1)}
    cond = {"label": torch.ones(2), TOLD: torch.tensor([2.0, 4.0]), END: torch.tensor([0.0, 1.0])}
    told = NetDenoiser(net, RectifiedFlow(), "flow", takes_guidance=True)
    Guided(told, row, 1.5)(x, t, cond)
    assert heard[-1][TOLD].tolist() == [2.0, 4.0, 2.0, 4.0] and heard[-1][END].tolist() == [0.0, 1.0, 0.0, 1.0]
    Guided(replace(told, takes_guidance=False), row, by_row)(x, t, cond)
    assert TOLD not in heard[-1] and heard[-1]["label"].tolist() == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("hops", ["consistency", "ode", "jump"])
@pytest.mark.parametrize("kind", ["toy", "flow", "ring"])
def test_toys_are_told_and_do_not_change_at_first(kind: Any, hops: Any) -> None:
    model: Any = Ring(classes=2) if kind == "ring" else toy("flow" if kind == "flow" else "eps")
    prompts = ["class 0", "class 1"] if kind == "ring" else ["angle 0 radius 1", "angle 2 radius 2"]
    plain, told = model.few_step(hops, 4), model.few_step(hops, 4, 2.5)
    assert takes_guidance(told.denoiser) and not takes_guidance(plain.denoiser) and told.guidance_scale == 2.5
    assert not takes_guidance(model.denoiser)
    x, t, cond = randn(2, 2), torch.tensor([0.9, 0.5]), model.encode(prompts)

    def says(w: float) -> Tensor:
        return Told(told.denoiser, w)(x, t, cond).x0

    assert torch.equal(says(1.0), plain.denoiser(x, t, cond).x0) and torch.equal(says(1.0), says(6.0))
    says(6.0).sum().backward()
    assert model.net.told.weight.grad.abs().max() > 0
    with torch.no_grad():
        model.net.told.weight += 0.1 * randn(*model.net.told.weight.shape)
    assert ((says(1.0) - says(6.0)).abs().amax(1) > 1e-3).all()
    torch.testing.assert_close(
        says(1.0)[:1], Told(told.denoiser, 1.0)(x[:1], t[:1], {k: v[:1] for k, v in cond.items()}).x0
    )


# Settings and the command.


def test_settings_that_cannot_be_are_refused() -> None:
    for range_, sentence in (((4.0, 1.0), "told is 4 1"), ((2.0, 2.0), "told is 2 2"), ((-1.0, 2.0), "told is -1 2")):
        with pytest.raises(ValueError, match=f"{sentence}; wanted two scales of at least 0, the smaller first"):
            lcm.Settings(told=range_).check()
    with pytest.raises(ValueError, match="guidance_scale is 9; wanted one of those told, 1 to 8"):
        lcm.Settings(told=(1.0, 8.0), guidance_scale=9.0).check()


@pytest.mark.parametrize(("given", "drawn"), [(None, 2.0), (3.5, 3.5)])
def test_the_scale_that_a_student_is_drawn_with(given: float | None, drawn: float) -> None:
    """guidance_scale, or the model's own (2 of the toy), in the range that is told."""
    method = lcm.Settings(**SIZES, told=(1.0, 8.0), guidance_scale=given).build(toy(), Off(), torch.Generator())
    assert method.policy.model.guidance_scale == drawn
    high = lcm.Settings(**SIZES, told=(3.0, 8.0)).build(toy(), Off(), torch.Generator())
    assert high.policy.model.guidance_scale == 3.0


def test_a_reward_guided_student_is_told_as_well() -> None:
    """The proxy's chains and its table are told the scale that the student is drawn with."""
    settings = rg_lcd.Settings(**SIZES, told=(1.0, 5.0), proxy_rounds=0, proxy_steps=1)
    settings.check()
    method = settings.build(toy(), Off(), torch.Generator().manual_seed(0))
    pairs = next(iter(next(iter(method.experience(batch(2))))))
    assert TOLD in pairs.cond and method.loss(pairs).total.isfinite()


class Net(nn.Module):
    """A network of one's own that can be told."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.scale = nn.Linear(13, 16), nn.Linear(16, 12), nn.Linear(1, 16)

    def forward(self, x: Tensor, tau: Tensor, length: Tensor, told_guidance: Tensor | None = None) -> Tensor:
        hidden = self.first(torch.cat([x.flatten(1), tau[:, None].to(x)], dim=1)) + length
        if told_guidance is not None:
            hidden = hidden + self.scale(told_guidance[:, None])
        return self.last(torch.tanh(hidden)).view_as(x)


def own(**changes: Any) -> OwnModel:
    def encode(prompts: list[str]) -> dict[str, Tensor]:
        return {"length": torch.tensor([[len(prompt) / 10] for prompt in prompts])}

    return OwnModel(Net(), encode, lambda x: x * 0.5 + 0.5, (3, 2, 2), guidance_scale=2.0, **changes)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_network_of_ones_own(kind: str, tmp_path: Path) -> None:
    model = own(takes_guidance=True)
    model.add_lora(2) if kind == "lora" else model.train_full()
    settings = lcm.Settings(told=(1.0, 5.0), student_steps=2, inference_steps=4, prompts_per_step=2)
    method = settings.build(model, Off(), torch.Generator().manual_seed(0))
    pairs = next(iter(next(iter(method.experience(dataclasses.replace(batch(1), text=["a", "bb"] * 4))))))
    method.loss(pairs).total.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    method.policy.model.save_adapter(tmp_path)
    view: Any = method.policy.model
    lines = view.use("base", "adapter", kind == "full", "a")
    assert 'model = model.few_step("consistency", 2, 2)' in lines
    again = own(takes_guidance=True)
    again._net.load_state_dict({name: value for name, value in model._net.state_dict().items() if "lora" not in name} if
                               kind == "full" else again._net.state_dict())  # fmt: skip
    drawn = with_adapter(again, tmp_path)
    assert takes_guidance(drawn.denoiser) and drawn.guidance_scale == 2.0


def test_a_network_of_ones_own_without_the_argument_is_refused() -> None:
    model = own()
    model.train_full()
    with pytest.raises(ValueError, match="is not told its guidance; give it an argument told_guidance, and OwnModel"):
        model.few_step("consistency", 2, 3.0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a told run of a tiny SD, and its merged pipeline."""
    home = tmp_path_factory.mktemp("told")
    folder = small_place(tiny.sd_folder(home / "base"), home)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()):
        patch.chdir(folder)
        words = distil_words("lcm", out="run", full="", told=["1", "8"], steps="2", learning_rate="1e-2")
        assert main(words) == 0 and main(["export", "run", "--merge"]) == 0
    return folder


@pytest.mark.parametrize("scale", [1.0, 2.0, 5.0])
def test_by_the_command(made: Path, scale: float, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """The run, its merged pipeline, and plain diffusers with it: the same pictures at every scale."""
    monkeypatch.chdir(made)
    told = {"guidance_scale": 2, "steps": 2, "hops": "consistency", "told": True}
    assert json.loads(Path("run/adapter/tropism.json").read_text()) == told
    asked = ("--guidance-scale", str(scale))
    adapter, line = pixels("model", tmp_path / "adapter", capsys, "--adapter", "run", *asked)
    assert f"1 images with 2 steps, guidance {scale:g}:" in line
    merged, _ = pixels("run/export-merged", tmp_path / "merged", capsys, *asked)
    torch.testing.assert_close(merged, adapter, rtol=0, atol=1.1 / 255)
    model, pipe = (
        load_pipeline("run/export-merged", onednn=False),
        DiffusionPipeline.from_pretrained("run/export-merged"),
    )
    row = Row(lambda: None, 2, scale)
    torch.testing.assert_close(ours(row, model), theirs(row, tiny._quiet(pipe)), rtol=0, atol=1e-4)


def test_a_told_run_goes_on_and_starts_another(made: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(made)
    words = distil_words("lcm", out=str(tmp_path / "next"), full="", told=["1", "8"], start_from="run")
    assert said(words, capsys).code == 0
    assert said(["distill", "lcm", "--resume", str(tmp_path / "next"), "--steps", "2"], capsys).code == 0


def test_a_lora_is_refused_by_the_command(made: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(made)
    assert "a LoRA cannot hold the input" in refused(distil_words("lcm", told=["1", "8"]), capsys)
    assert "told is 8 1; wanted two scales" in refused(distil_words("lcm", told=["8", "1"]), capsys)


def test_a_wrong_note_is_refused(made: Path, tmp_path: Path) -> None:
    (tmp_path / "tropism.json").write_text('{"told": 3}')
    with pytest.raises(ValueError, match="gives told as 3; wanted true or false"):
        from tropism.models.pipelines import read_defaults

        read_defaults(tmp_path)
