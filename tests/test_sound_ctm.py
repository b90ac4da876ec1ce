"""SoundCTM: the teacher's features as a distance, the scale that is told, and guidance between jumps with and without
a prompt."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from distillers import SIZES
from methods import Off, batch, toy
from nets import randn
from test_told import Net
from torch import Tensor, nn

from tropism.base import concat
from tropism.denoisers import END, TOLD, towards
from tropism.distillation import carried
from tropism.distillation.features import Features, blocks_of, lowest
from tropism.guidance import Guided, Told, interpolated
from tropism.losses.consistency import MeanSquare, SquaredNorm
from tropism.methods.sound_ctm import Settings
from tropism.models.own import OwnModel
from tropism.models.ring import Ring
from tropism.policy import Policy
from tropism.samplers import Jump, solver
from tropism.schedules import EDM, RectifiedFlow

HIDDEN = ["layers.0", "layers.1", "layers.2"]
PROMPTS = ["angle 0 radius 1", "angle 2 radius 2", "angle 3 radius 1"]


def state() -> tuple[Any, Tensor, Tensor, Any]:
    model = toy("flow")
    return model, randn(3, 2), torch.tensor([0.8, 0.4, 0.0]), model.encode(PROMPTS)


# The distance.


def by_hand(net: Any, x: Tensor, t: Tensor, cond: Any) -> list[Tensor]:
    """Unit outputs of the three hidden layers of a toy's network."""
    angle = t[:, None] * 2.0 ** torch.arange(8) * torch.pi / 4
    hidden = net.layers[0](torch.cat([x, angle.sin(), angle.cos(), cond["prompt_embeds"].flatten(1)], dim=1))
    found = [hidden]
    for layer in net.layers[1:3]:
        hidden = layer(nn.functional.silu(hidden))
        found.append(hidden)
    return [each / each.norm(dim=1, keepdim=True) for each in found]


def test_features_are_those_of_the_teacher_at_the_time_of_the_state() -> None:
    """Unit vectors of each hidden layer, at s, with the prompt; the clean end counts as the lowest noise."""
    model, x, s, cond = state()
    seen = Features(model, HIDDEN)(x, s, cond)
    with torch.no_grad(), model.reference():
        wanted = by_hand(model.network, x, s.clamp(min=1e-3), cond)
        elsewhen = by_hand(model.network, x, torch.tensor([0.9, 0.5, 0.1]), cond)
    torch.testing.assert_close(seen, torch.cat(wanted, dim=1), rtol=1e-4, atol=1e-5)
    assert (seen - torch.cat(elsewhen, dim=1)).abs().amax(1).min() > 1e-3
    other = Features(model, HIDDEN)(x, s, model.encode(PROMPTS[::-1]))
    assert (seen - other).abs().amax(1)[[0, 2]].min() > 1e-3
    d = SquaredNorm()(seen, other)
    layers = zip(seen.split(96, 1), other.split(96, 1), strict=True)
    torch.testing.assert_close(d, sum((a - b).square().sum(1) for a, b in layers))


def test_the_teacher_is_not_what_was_trained_and_not_told() -> None:
    """Weights of the student, where it jumps and its scale make no difference."""
    model, x, s, cond = state()
    features = Features(model, HIDDEN)
    before = features(x, s, cond)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1
    more = {**cond, TOLD: torch.full((3,), 4.0), END: torch.full((3,), 200.0)}
    assert torch.equal(features(x, s, more), before)
    assert not any(layer._forward_hooks for layer in [*model.net.modules(), *model._frozen.modules()])


def test_the_distance_of_a_state_to_itself_is_nothing_and_leads_to_the_other() -> None:
    """d(e, e) = 0; else a gradient to e, none to any weight, and along it the distance falls."""
    model, y, s, cond = state()
    features, d = Features(model, HIDDEN), SquaredNorm()
    e = (y + 0.3 * randn(3, 2, seed=1)).requires_grad_()
    wanted = features(y, s, cond).detach()
    assert d(features(y, s, cond), wanted).abs().max() == 0
    far = d(features(e, s, cond), wanted)
    far.sum().backward()
    assert (e.grad.norm(dim=1) > 1e-3).all()
    assert all(parameter.grad is None for parameter in [*model.net.parameters(), *model._frozen.parameters()])
    with torch.no_grad():
        step = 1e-2 * e.grad / e.grad.norm(dim=1, keepdim=True)
        nearer = d(features(e - step, s, cond), wanted)
        falls = (far - nearer) / 1e-2
    torch.testing.assert_close(falls, e.grad.norm(dim=1), rtol=0.15, atol=1e-3)


class Blocks(nn.Module):
    """Every shape that features have: a map, tokens, a signal, a tuple, a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.down_blocks = nn.ModuleList([nn.Conv2d(3, 5, 1), nn.Conv2d(5, 4, 1)])
        self.mid_block = nn.Linear(4, 6)
        self.signal, self.both, self.unused = nn.Conv1d(6, 7, 1), Both(), nn.Linear(1, 1)

    def forward(self, x: Tensor, tau: Tensor, length: Tensor) -> Tensor:
        tokens = self.mid_block(self.down_blocks[1](self.down_blocks[0](x)).flatten(2).mT)
        self.both(self.signal(tokens.mT))
        return x * length[:, :, None, None]


class Both(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...], None]:
        return x.mean(2), (x, x), None


def own(network: Any, **more: Any) -> OwnModel:
    model = OwnModel(network, lambda text: {"length": torch.ones(len(text), 1)}, lambda x: x, (3, 2, 2), **more)
    model.train_full()
    return model


@pytest.mark.parametrize(
    ("block", "channels_last", "dim"),
    [("down_blocks.0", True, 1), ("mid_block", True, 2), ("signal", False, 1), ("both", True, 1)],
)
def test_lengths_are_over_channels_whatever_the_shape(block: str, channels_last: bool, dim: int) -> None:
    """Against |n(a) - n(b)|^2 over channels, the mean over positions, written out."""
    net = Blocks()
    model, answers = own(net), []
    rows, t = model.encode(["a", "b"]), torch.tensor([0.5, 0.2])
    a, b = randn(2, 3, 2, 2), randn(2, 3, 2, 2, seed=1)
    frozen = model._trained._frozen
    handle = frozen.get_submodule(block).register_forward_hook(lambda _, given, answer: answers.append(answer))
    features = Features(model, [block], channels_last)
    found = SquaredNorm()(features(a, t, rows), features(b, t, rows))
    handle.remove()
    one, other = (each[0] if isinstance(each, tuple) else each for each in answers)
    gap = (one / one.norm(dim=dim, keepdim=True) - other / other.norm(dim=dim, keepdim=True)).square().sum(dim)
    torch.testing.assert_close(found, gap.reshape(2, -1).mean(1))


def test_blocks_by_themselves_and_wrong_names() -> None:
    net = Blocks()
    assert blocks_of(net) == ["down_blocks.0", "down_blocks.1", "mid_block"]
    with pytest.raises(ValueError, match="Net keeps no list of blocks; name some of its modules as feature_blocks"):
        blocks_of(Net())
    with pytest.raises(ValueError, match=r"the network has no blocks \['lost'\]; wanted some of down_blocks"):
        Features(own(net), ["lost", "signal"])
    with pytest.raises(ValueError, match="the network has no blocks to name"):
        Features(own(net), [])
    model = own(net)
    with pytest.raises(ValueError, match=r"does not call its blocks \['unused'\]"):
        Features(model, ["signal", "unused"])(randn(1, 3, 2, 2), torch.tensor([0.5]), model.encode(["a"]))


def test_the_lowest_noise() -> None:
    assert lowest(RectifiedFlow()) == 1e-3
    level = EDM().level(torch.tensor([lowest(EDM())]))
    torch.testing.assert_close(level, torch.tensor([0.002]), rtol=1e-3, atol=0)


# The method.


def built(model: Any, **changes: Any) -> Any:
    settings = Settings(**SIZES, **{"feature_blocks": HIDDEN} | changes)
    settings.check()
    return settings.build(model, Off(), torch.Generator().manual_seed(0))


def first(method: Any, rows: int = 8) -> Any:
    return next(iter(next(iter(method.experience(batch(rows))))))


def test_states_are_compared_where_both_jump_to_and_not_at_the_end_of_time() -> None:
    """The loss is d at s of the student's jump from t and its average's from u, both told their row's scale."""
    model = toy("flow")
    method = built(model, denoiser_weight=0.0)
    pairs = first(method)
    assert pairs.cond[TOLD].min() >= 2 and pairs.cond[TOLD].max() <= 5 and (pairs.end > 0).any()
    with torch.no_grad():
        for parameter in model.parameters():  # the average stays where it was
            parameter += 0.02 * randn(*parameter.shape)
    jump = method.policy.model.denoiser
    said = carried(jump, pairs.x, pairs.t, pairs.end, pairs.cond)
    with method.target.swapped(), torch.no_grad():
        there = carried(jump, pairs.y, pairs.s, pairs.end, pairs.cond)
    there = there.where((pairs.s > pairs.end)[:, None], pairs.y)
    features = Features(model, HIDDEN)
    apart = SquaredNorm()(features(said, pairs.end, pairs.cond), features(there, pairs.end, pairs.cond))
    loss = method.loss(pairs)
    torch.testing.assert_close(loss.total, apart.sum())
    loss.total.backward()
    assert model.net.told.weight.grad.abs().max() > 0 and model.net.end.weight.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in model._frozen.parameters())


def test_states_may_be_compared_as_they_are() -> None:
    method = built(toy("flow"), compared="states", distance="l2", feature_blocks=None, denoiser_weight=0.0)
    pairs = first(method)
    said = carried(method.policy.model.denoiser, pairs.x, pairs.t, pairs.end, pairs.cond)
    torch.testing.assert_close(method.loss(pairs).total, MeanSquare()(said, method.wanted(pairs)).sum())


def test_chains_without_prompt_are_unguided() -> None:
    """A share of the rows is the null row; there omega makes no difference to the teacher."""
    model = toy("flow")
    method = built(model, drop=0.3)
    pairs = first(method, 64)
    gone = (pairs.cond["prompt_embeds"] == model.null()["prompt_embeds"]).flatten(1).all(1)
    assert 0.1 < float(gone.float().mean()) < 0.5
    with torch.no_grad(), model.reference():
        alone = model.denoiser(pairs.x, pairs.t, {"prompt_embeds": pairs.cond["prompt_embeds"]}).x0
        guided = method.teacher.denoiser(pairs.x, pairs.t, pairs.cond).x0
    torch.testing.assert_close(guided[gone], alone[gone], rtol=1e-4, atol=1e-4)
    assert (guided[~gone] - alone[~gone]).abs().max() > 0.05


# nu.


@dataclasses.dataclass(frozen=True, eq=False)
class Counting:
    """A denoiser that keeps what it was asked."""

    inner: Any
    asked: list[Any]
    takes_guidance = True

    @property
    def schedule(self) -> Any:
        return self.inner.schedule

    def __call__(self, x: Tensor, t: Tensor, cond: Any) -> Any:
        self.asked.append((len(x), cond))
        return self.inner(x, t, cond)


def told_student() -> tuple[Any, Any]:
    model = toy("flow")
    view = model.few_step("jump", 4, 3.0)
    with torch.no_grad():
        for name in ("told", "end"):
            getattr(model.net, name).weight += 0.1 * randn(96, 16)
    return model, view


def test_nu_is_linear_between_the_jumps_with_and_without_prompt() -> None:
    model, view = told_student()
    x, t, s = randn(3, 2), torch.tensor([0.9, 0.7, 0.5]), torch.tensor([0.4, 0.2, 0.0])
    cond, null = model.encode(PROMPTS), concat(model.null(), model.null(), model.null())
    omega = torch.full((3,), 3.0)

    def jump(denoiser: Any, rows: Any) -> Tensor:
        return Jump()(denoiser, x, t, s, rows)[0].mean

    ours, without = (jump(view.denoiser, {**each, TOLD: omega}) for each in (cond, null))
    for nu in (0.0, 0.5, 1.0, 2.5):
        found = jump(interpolated(view.denoiser, model.null(), 3.0, nu), cond)
        torch.testing.assert_close(found, nu * ours + (1 - nu) * without, rtol=1e-4, atol=1e-5)
    assert (ours - without).abs().max() > 0.05


def test_nu_1_is_one_call_and_omega_is_told_to_both_halves() -> None:
    model, view = told_student()
    asked: list[Any] = []
    inner, cond = Counting(view.denoiser, asked), model.encode(PROMPTS)
    x, t = randn(3, 2), torch.full((3,), 0.9)
    rows = towards(view.denoiser, cond, torch.full((3,), 0.2))
    scales = torch.tensor([2.0, 3.0, 4.0])
    one = interpolated(inner, model.null(), lambda t, cond: scales, 1.0)(x, t, rows)
    assert [count for count, _ in asked] == [3] and torch.equal(asked[0][1][TOLD], scales)
    assert torch.equal(one.x0, view.denoiser(x, t, {**rows, TOLD: scales}).x0)
    interpolated(inner, model.null(), lambda t, cond: scales, 2.0)(x, t, rows)
    assert [count for count, _ in asked] == [3, 6]
    assert torch.equal(asked[1][1][TOLD], scales.repeat(2)) and torch.equal(asked[1][1][END], rows[END].repeat(2))


def test_a_policy_draws_with_nu() -> None:
    model, view = told_student()
    policy = Policy(view, solver(view.denoiser), 2, 3.0)
    assert isinstance(policy.denoiser, Told) and isinstance(policy.with_(nu=2.0).denoiser.inner, Guided)
    x = randn(3, 2)
    drawn = policy.with_(nu=2.0).draw(PROMPTS, torch.Generator().manual_seed(0), x)
    walked = x
    guided = interpolated(view.denoiser, model.null(), 3.0, 2.0)
    with torch.no_grad():
        for t, s in zip(policy.ts, policy.ts[1:], strict=False):
            rows = model.encode(PROMPTS)
            walked = Jump()(guided, walked, t.expand(3), s.expand(3), rows)[0].mean
    torch.testing.assert_close(drawn, walked, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="nu is 2, but this network is not told its guidance; give guidance instead"):
        Policy(model, solver(model.denoiser), 2, nu=2.0).denoiser  # noqa: B018


# What cannot be.


def test_settings_that_cannot_be_are_refused() -> None:
    for changes, sentence in (
        (dict(drop=1.0), "drop is 1; wanted a share from 0 to below 1"),
        (dict(told=(5.0, 2.0)), "told is 5 2; wanted two scales"),
        (dict(compared="states", feature_blocks=["a"]), "feature_blocks is given without features to compare"),
        (dict(feature_blocks=[]), "feature_blocks is given without features to compare or is empty"),
    ):
        with pytest.raises(ValueError, match=sentence):
            Settings(**changes).check()


def test_models_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="the teacher of a Ring is no network, and has no features; compare states"):
        Settings().build(Ring(), Off(), torch.Generator())
    with pytest.raises(ValueError, match="the network of this model is told one time"):
        Settings().build(own(Net(), takes_guidance=True), Off(), torch.Generator())
    with pytest.raises(ValueError, match="the network of this model is not told its guidance"):
        Settings().build(own(Net(), takes_end=True), Off(), torch.Generator())


class Jumping(nn.Module):
    """A network of one's own with a list of blocks, that is told where to jump and its guidance."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(15, 16), nn.Linear(16, 16)])
        self.last = nn.Linear(16, 12)

    def forward(
        self, x: Tensor, tau: Tensor, length: Tensor, end_time: Any = None, told_guidance: Any = None
    ) -> Tensor:
        told = [tau, tau if end_time is None else end_time, tau * 0 + 1 if told_guidance is None else told_guidance]
        hidden = torch.cat([x.flatten(1), torch.stack(told, dim=1).to(x)], dim=1)
        for block in self.blocks:
            hidden = torch.tanh(block(hidden) + length)
        return self.last(hidden).view_as(x)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_network_of_ones_own(kind: str) -> None:
    """Features of its blocks as they were before training, LoRA or not."""
    model = OwnModel(
        Jumping(), lambda text: {"length": torch.ones(len(text), 1)}, lambda x: x, (3, 2, 2),
        takes_end=True, takes_guidance=True, guidance_scale=3.0,
    )  # fmt: skip
    model.add_lora(2) if kind == "lora" else model.train_full()
    settings = Settings(prompts_per_step=2, images_per_prompt=2, student_steps=2, inference_steps=4)
    method = settings.build(model, Off(), torch.Generator().manual_seed(0))
    assert method.view.blocks == ["blocks.0", "blocks.1"]
    pairs = next(iter(next(iter(method.experience(dataclasses.replace(batch(1), text=["a", "bb"] * 4))))))
    before = method.view(pairs.x, pairs.end, pairs.cond)
    method.loss(pairs).total.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter += 0.5
    assert torch.equal(method.view(pairs.x, pairs.end, pairs.cond), before)
