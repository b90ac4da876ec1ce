"""The memory plan: what is counted is what lives, on meta as on a processor, and what a run really needs."""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from tropism.catalog import method_settings
from tropism.config import TrainSettings
from tropism.data.prompts import PromptSet, batches
from tropism.footprint import Footprint, Line, LiveBytes, call_sizes, fused_on_meta, measure, saved_bytes, weight_bytes
from tropism.memory import MIB, Needs, free_mib, gradient_window, method_kind, needs_of, plan, resident_bytes
from tropism.models.latent_pipeline import LatentPipeline
from tropism.models.pipelines import wrap_pipeline
from tropism.rewards.callables import as_reward
from tropism.train import train

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]


def prepared(build: Any, rank: int = 2) -> LatentPipeline:
    model = wrap_pipeline(build(), onednn=False)
    model.add_lora(rank, generator=torch.Generator().manual_seed(0))
    return model


def inputs(model: LatentPipeline, rows: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    cond = {name: value.repeat(rows, *[1] * (value.ndim - 1)) for name, value in model.null().items()}
    return torch.zeros(rows, *model.latent_shape), torch.ones(rows), cond


families = pytest.mark.parametrize("build", [tiny.sd_pipeline, tiny.sd3_pipeline])


# What is counted.


def test_live_bytes_are_those_of_the_storages_that_live() -> None:
    with LiveBytes() as live:
        a = torch.zeros(1000)
        assert (live.now, live.peak) == (4000, 4000)
        view = a.view(10, 100)[2:]
        view += 1
        assert live.now == 4000  # views and what happens in place are no storages
        b = a * 2
        del a
        assert (live.now, live.peak) == (8000, 8000)  # the view keeps it
        del view
        assert live.now == 4000
        del b
        assert (live.now, live.peak) == (0, 8000)


@families
def test_a_graph_holds_what_autograd_saves_and_the_answer(build: Any) -> None:
    model = prepared(build)
    x, tau, cond = inputs(model, 2)
    model.net(x, tau, cond)
    parts = [part for part in model.pipe.components.values() if isinstance(part, nn.Module)]
    known = [*(p for part in parts for p in (*part.parameters(), *part.buffers())), x, tau, *cond.values()]
    saved = saved_bytes(lambda: model.net(x, tau, cond), known)
    held = call_sizes(lambda: model.net(x, tau, cond), True).held
    assert saved > 100_000
    assert held == saved + x.nbytes  # the answer is of the shape of x


@families
def test_tensors_without_memory_are_counted_alike(build: Any) -> None:
    model = prepared(build)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    net, x, tau, cond = model.net, *inputs(model, 2)
    real = call_sizes(lambda: net(x, tau, cond), True)
    for part in model.pipe.components.values():
        if isinstance(part, nn.Module):
            part.to("meta")
    x, tau, cond = x.to("meta"), tau.to("meta"), {name: value.to("meta") for name, value in cond.items()}
    with fused_on_meta():
        assert call_sizes(lambda: net(x, tau, cond), True) == real
    assert torch.nn.functional.scaled_dot_product_attention.__name__ == "scaled_dot_product_attention"


@families
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_line_through_one_and_two_rows_holds_for_more(build: Any, checkpointing: bool) -> None:
    model = prepared(build)
    if checkpointing:
        model.enable_gradient_checkpointing()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    foot = measure(model, model.null(), graph_to_noise=True)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    x, tau, cond = inputs(model, 7)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    sizes = call_sizes(lambda: model.net(x.requires_grad_(), tau, cond), True)
    assert foot.held.at(7) == pytest.approx(sizes.held, rel=0.04)
    assert foot.backward.at(7) == pytest.approx(sizes.backward, rel=0.04)
    plain = call_sizes(lambda: model.net(x, tau, cond), False)
    assert foot.forward.at(7) == pytest.approx(plain.forward, rel=0.04)


def test_checkpointing_holds_less() -> None:
    model = prepared(tiny.sd_pipeline)
    before = measure(model, model.null())
    model.enable_gradient_checkpointing()
    after = measure(model, model.null())
    assert after.held.slope < 0.5 * before.held.slope
    assert after.forward == before.forward


def test_weights_are_counted_once() -> None:
    shared = nn.Linear(10, 5, bias=False)
    parts = {"a": nn.Sequential(shared, nn.BatchNorm1d(5)), "b": nn.Sequential(shared), "scheduler": object()}
    found = weight_bytes(parts)
    assert found == {"a": 4 * (50 + 4 * 5) + 8, "b": 0}  # weight, bias, mean, variance, and an int64 count
    assert weight_bytes(parts, without=[shared.weight])["a"] == found["a"] - 200


# What is made of it.

NETWORK = (Line(0, MIB), Line(0, 4 * MIB), Line(MIB, 5 * MIB))  # forward, held, backward
FOOT = Footprint(*NETWORK, Line(0, 2 * MIB), Line(0, 3 * MIB), Line(0, 6 * MIB))
NEEDS = Needs("policy gradient", FOOT, {"unet": 10 * MIB}, trained=MIB, images=8, sample_batch=4, minibatch=2, moves=3)


def sizes_of(needs: Needs) -> dict[str, float]:
    return {row.phase: row.mib for row in plan(needs)}


def test_the_plan_is_this_arithmetic() -> None:
    found = sizes_of(NEEDS)
    assert found["models"] == 10
    assert found["training"] == 16  # weights, gradients, two moments
    assert found["rollout"] == 8  # 4 chains, 2 rows each
    assert found["reward"] == 8  # 4 images decoded at once
    assert found["backward"] == 21  # 2 chains, 2 rows each: 1 + 4 x 5
    assert found["spare"] == 10.5
    assert found["peak"] == 10 + 16 + 21 + 10.5


def test_settings_change_the_plan_as_they_should() -> None:
    assert sizes_of(replace(NEEDS, guided=False))["backward"] == 11
    assert sizes_of(replace(NEEDS, ema=True))["training"] == 24
    assert sizes_of(replace(NEEDS, full=True))["models"] == 14  # and a frozen copy
    assert sizes_of(replace(NEEDS, kind="regression", kept=1))["backward"] == 6  # one row, without guidance
    assert sizes_of(replace(NEEDS, minibatch=1000))["backward"] == 1 + 5 * 2 * 24  # there are no more than 8 x 3 moves
    assert sizes_of(replace(NEEDS, minibatch=1000, updates=5))["backward"] == 1 + 5 * 2 * 5  # of which a fifth, 4.8
    assert sizes_of(replace(NEEDS, latent=MIB))["rollout"] == 8 + 8 * 2 * 4 + 12 * 2  # states, and rows for the network
    direct = replace(NEEDS, kind="direct gradient", window=3)
    assert sizes_of(direct)["backward"] == 3 * 16 + 12  # three graphs of 4 rows, and the decoder's passes over 2
    assert sizes_of(direct)["rollout"] == 0
    assert sizes_of(replace(NEEDS, on_gpu=True))["spare"] == pytest.approx(2.1)


def test_levers_say_the_peak_that_they_leave() -> None:
    last = plan(NEEDS)[-1]
    smaller = sizes_of(replace(NEEDS, minibatch=1))["peak"]
    assert f"in backward; lower it by minibatch 1 ({smaller:.0f} MiB)" in last.note
    assert "gradient_checkpointing" in last.note and "mixed_precision bf16" in last.note
    bare = replace(NEEDS, minibatch=1, checkpointing=True, half=True, sample_batch=1)
    assert plan(bare)[-1].note == "in backward; lower it by another model"


@pytest.mark.parametrize(
    ("method", "changes", "kind", "window"),
    [
        ("ddpo", {}, "policy gradient", 1),
        ("flow-grpo", {}, "policy gradient", 1),
        ("raft", {}, "regression", 1),
        ("rwr", {}, "regression", 1),
        ("alignprop", {}, "direct gradient", 20),
        ("alignprop", {"longest": 4}, "direct gradient", 4),
        ("draft", {"k": 3}, "direct gradient", 3),
        ("refl", {}, "direct gradient", 1),
    ],
)
def test_methods_are_of_a_kind(method: str, changes: dict[str, int], kind: str, window: int) -> None:
    settings = method_settings(method)(**changes)
    assert (method_kind(settings), gradient_window(settings)) == (kind, window)


@families
@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("ddpo", {"minibatch": 8, "sample_batch": 8}),
        ("ddpo", {"minibatch": 1, "sample_batch": 16}),
        ("raft", {"minibatch": 8, "keep": 0.5}),
        ("rwr", {"minibatch": 16}),
        ("draft", {"minibatch": 4, "k": 3}),
        ("refl", {"minibatch": 8}),
    ],
)
def test_the_plan_is_what_a_step_has_in_use(build: Any, method: str, changes: dict[str, Any]) -> None:
    model = prepared(build)
    settings = method_settings(method)(prompts_per_step=4, images_per_prompt=4, inference_steps=4, **changes)
    needs = needs_of(model, TrainSettings(), settings, CPU, score=lambda images: images.mean((1, 2, 3)))
    working = max(row.mib for row in plan(needs) if row.phase in ("rollout", "reward", "backward"))
    built = settings.build(model, as_reward(lambda images: images.mean((1, 2, 3)), "bright", True), torch.Generator())
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with LiveBytes() as live:
        train(built, batches(PromptSet(tiny.PROMPTS * 2), 4, 4, 0, 0), optimizer, steps=1)
    states = 3 * sum(parameter.nbytes for parameter in model.parameters()) / MIB  # moments, and new gradients
    assert live.peak / MIB == pytest.approx(working, rel=0.15, abs=states)


MEASURED = """
import json, sys, torch
torch.set_num_threads(1)
from tropism import catalog
from tropism.config import TrainSettings
from tropism.data.prompts import batches
from tropism.memory import memory_plan
from tropism.plan import make_plan, set_up
from tropism.train import train
settings = TrainSettings(steps=1, reward=["brightness"], out="nowhere", device="cpu")
own = catalog.method_settings("ddpo")(minibatch=32, sample_batch=32, prompts_per_step=4, inference_steps=4)
ready = make_plan("ddpo", settings, own)
bench = set_up(ready)
rows = memory_plan(bench.model, settings, own, ready.device)
train(bench.method, batches(ready.prompts, 4, 8, 0, 0), bench.optimizer, steps=1)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps([rows[-1].mib, int(status["VmHWM"].split()[0]) / 1024]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says there what a process held at most")
def test_a_real_run_on_scenes_needs_what_was_planned(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, cwd=tmp_path, check=True)
    planned, measured = json.loads(done.stdout.strip().splitlines()[-1])
    assert planned == pytest.approx(measured, rel=0.25)


# The device, and published shapes.


def test_the_device_says_what_it_has() -> None:
    assert 0 < free_mib(CPU) <= 1.001 * 2**44 / MIB
    block = torch.ones(64 * MIB // 4)
    held = resident_bytes(CPU)
    del block
    assert held - resident_bytes(CPU) == pytest.approx(64 * MIB, rel=0.1)


def test_published_shapes_fit_where_the_page_says() -> None:
    spec = importlib.util.spec_from_file_location("memory_plan", ROOT / "benchmarks" / "memory_plan.py")
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    sys.modules["memory_plan"] = benchmark  # dataclasses look their module up
    spec.loader.exec_module(benchmark)
    counts = {}
    for name, sdxl in (("SD 1.5", False), ("SDXL", True)):
        model = benchmark.build(sdxl)
        trained = {id(parameter) for parameter in model.parameters()}
        for part, net in model.parts.items():
            counts[name, part] = sum(p.numel() for p in net.parameters() if id(p) not in trained)
        if not sdxl:
            needs = benchmark.needs_of(copy.copy(model), True, **benchmark.SMALL)
    assert counts == {
        ("SD 1.5", "unet"): 859_520_964,
        ("SD 1.5", "vae"): 83_653_863,
        ("SD 1.5", "text_encoder"): 123_060_480,
        ("SDXL", "unet"): 2_567_463_684,
        ("SDXL", "vae"): 83_653_863,
        ("SDXL", "text_encoder"): 123_060_480,
        ("SDXL", "text_encoder_2"): 694_659_840,
    }
    assert plan(needs)[-1].mib < 8 * 1024
