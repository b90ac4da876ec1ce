"""The oneDNN twin of a network answers and learns like the network itself, and leaves it as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from tropism.models import onednn
from tropism.models.latent_pipeline import LatentPipeline
from tropism.models.pipelines import wrap_pipeline

pytestmark = pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="a torch without oneDNN")

families = pytest.mark.parametrize("build", [tiny.sd_pipeline, tiny.sd3_pipeline])
kinds = pytest.mark.parametrize("kind", ["none", "lora", "feed-forward", "full"])


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """On any processor that can."""
    monkeypatch.setattr("tropism.models.latent_pipeline.twin_pays", lambda net: True)


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def prepared(build: Callable[[], Any], kind: str, fast: bool, dtype: torch.dtype = torch.float32) -> LatentPipeline:
    model = wrap_pipeline(build().to(dtype=dtype), onednn=fast)
    if kind == "full":
        model.train_full()
    elif kind != "none":
        model.add_lora(rank=2, alpha=8, feed_forward=kind == "feed-forward", generator=seed())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=seed(1)))
    return model


def answer(model: LatentPipeline, x: Tensor | None = None) -> Tensor:
    return model.denoiser(tiny.noise(2) if x is None else x, torch.tensor([0.4, 0.9]), model.encode(tiny.PROMPTS)).eps


def gradients(model: LatentPipeline) -> list[Tensor]:
    x = tiny.noise(2).requires_grad_()
    weights = torch.randn(x.shape, generator=seed(2))
    return list(torch.autograd.grad((answer(model, x) * weights).sum(), [x, *model.parameters()], allow_unused=True))


@families
@kinds
def test_equals_the_network(build: Any, kind: str) -> None:
    slow, fast = prepared(build, kind, False), prepared(build, kind, True)
    expected = answer(slow)
    torch.testing.assert_close(answer(fast), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(answer(fast), expected, rtol=1e-4, atol=1e-5)
    for got, wanted in zip(gradients(fast), gradients(slow), strict=True):
        assert (got is None) == (wanted is None)
        if got is not None:
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def distance(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@families
def test_bfloat16_is_as_near_to_float32_as_the_network_is(build: Any) -> None:
    exact = prepared(build, "lora", False)
    slow, fast = (prepared(build, "lora", fast, torch.bfloat16) for fast in (False, True))
    assert distance(answer(fast), answer(exact)) < 1.5 * distance(answer(slow), answer(exact))
    wanted = torch.cat([grad.flatten() for grad in gradients(exact)])
    got, theirs = (torch.cat([grad.flatten() for grad in gradients(model)]) for model in (fast, slow))
    assert distance(got, wanted) < 1.5 * distance(theirs, wanted)


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_changes_no_bit(build: Any, dtype: torch.dtype) -> None:
    model = prepared(build, "lora", True, dtype)
    with torch.no_grad():
        expected = answer(model)
    assert torch.equal(answer(model), expected)


@families
def test_checkpointing_recomputes_the_twin(build: Any) -> None:
    plain, saving = prepared(build, "lora", True), prepared(build, "lora", True)
    saving.enable_gradient_checkpointing()
    for got, wanted in zip(gradients(saving), gradients(plain), strict=True):
        assert torch.equal(got, wanted)


@families
def test_the_pipeline_stays_as_it_is(build: Any) -> None:
    model = prepared(build, "lora", True)
    net: nn.Module = getattr(model.pipe, model.part)
    before = dict(net.named_modules())
    answer(model)
    after = dict(net.named_modules())
    assert before.keys() == after.keys() and all(before[name] is after[name] for name in before)
    assert not any(type(module).__module__ == onednn.__name__ for module in after.values())


@families
def test_later_weights_and_the_reference_are_seen(build: Any) -> None:
    model = prepared(build, "lora", True)
    first = answer(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    assert not torch.equal(answer(model), first)
    with model.reference():
        assert torch.equal(answer(model), answer(prepared(build, "none", True)))


def test_what_it_replaces() -> None:
    net = prepared(tiny.sd_pipeline, "lora", True).pipe.unet
    kinds = [type(module) for module in onednn.twin(net).modules()]
    assert nn.Linear not in kinds
    assert kinds.count(onednn.Gate) == sum(type(module).__name__ == "GEGLU" for module in net.modules())


def test_second_derivatives_are_refused() -> None:
    x = tiny.noise(2).requires_grad_()
    (grad,) = torch.autograd.grad(answer(prepared(tiny.sd_pipeline, "lora", True), x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@kinds
def test_autocast_is_obeyed(kind: str) -> None:
    exact, slow, fast = (prepared(tiny.sd_pipeline, kind, fast) for fast in (False, False, True))
    with torch.autocast("cpu", torch.bfloat16):
        near, nearer = answer(slow), answer(fast)
    assert 1e-4 < distance(nearer, answer(exact)) < 1.5 * distance(near, answer(exact))


def test_it_is_for_one_type_of_weights() -> None:
    net = tiny.sd_pipeline().unet
    assert not onednn.twin_pays(net.half())
    net.conv_in.float()
    assert not onednn.twin_pays(net)
