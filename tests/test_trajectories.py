"""CTM and SCott where the answer is known: jumps, their noise, second order, the twin, the blur, the adversary."""

import copy
import dataclasses
import itertools
import math

import pytest
import torch
from distillers import SIZES
from methods import Off, batch, toy
from nets import TABLE, randn
from safetensors.torch import load_file, save_file
from torch import Tensor

from tropism.base import Prediction, take
from tropism.checkpoint import load_checkpoint, save_checkpoint
from tropism.data.prompts import PromptSet, batches
from tropism.denoisers import END, FlowMap
from tropism.distillation import carried
from tropism.distillation.adversarial import Adversarial, Discriminator
from tropism.distillation.pairs import anywhere
from tropism.ema import Ema, Twin
from tropism.methods import ctm, scott
from tropism.models.own import OwnModel
from tropism.models.ring import Ring
from tropism.models.toy import GaussianDenoiser, MixtureDenoiser
from tropism.samplers import DDIM, Consistency, Heun, Jump, walk
from tropism.schedules import EDM, Cosine, RectifiedFlow, scaled_level
from tropism.train import train

SCHEDULES = [EDM(), EDM(variance_preserving=True), RectifiedFlow(), Cosine()]
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)


@dataclasses.dataclass(frozen=True)
class Exact:
    """The mixture's belief whatever it is told; what it was told is kept in ``heard``."""

    inner: MixtureDenoiser
    heard: list[Tensor]
    takes_end = True

    @property
    def schedule(self):
        return self.inner.schedule

    def __call__(self, x, t, cond) -> Prediction:
        self.heard.append(cond[END])
        return self.inner(x, t, {})


def mixture(schedule) -> MixtureDenoiser:
    means = torch.tensor([[-0.7, 0.1], [0.6, -0.3], [0.1, 0.8]], dtype=torch.float64)
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    return MixtureDenoiser(means, torch.full((3,), 0.15, dtype=torch.float64), weights, schedule)


def exact(schedule) -> FlowMap:
    return FlowMap(Exact(mixture(schedule), []))


@each_schedule
def test_a_jump_to_where_one_is_stays(schedule):
    x, t = randn(6, 2).double(), torch.linspace(0.1, 0.95, 6)
    torch.testing.assert_close(carried(exact(schedule), x, t, t, {}), x, rtol=1e-6, atol=1e-6 * float(x.abs().max()))


@each_schedule
def test_short_jumps_follow_the_velocity_of_the_path(schedule):
    """dG/ds at s = t is alpha' D + sigma' eps, which for a variance-exploding path is (x - D) / t."""
    x, t = randn(6, 2).double(), torch.linspace(0.3, 0.9, 6)
    x0, eps = mixture(schedule)(x, t, {})
    step = 2e-3
    there, back = (carried(exact(schedule), x, t, t + by, {}) for by in (step, -step))
    slopes = [(f(t.double() + step).double() - f(t.double() - step).double()) for f in (schedule.alpha, schedule.sigma)]
    wanted = (slopes[0][:, None] * x0 + slopes[1][:, None] * eps) / (2 * step)
    torch.testing.assert_close((there - back) / (2 * step), wanted, rtol=1e-3, atol=1e-3)
    if schedule == EDM():  # against the closed form itself
        level, speed = schedule.level(t).double(), 7 * schedule.level(t).double() / t.double()
        torch.testing.assert_close(wanted, (x - x0) / level[:, None] * speed[:, None], rtol=1e-3, atol=1e-3)


@each_schedule
def test_gamma_is_how_much_of_a_jump_is_noise(schedule):
    """0 is the deterministic jump, 1 the law of Consistency, told the clean end; between, the level that is jumped to
    and the noise add up to the level of s."""
    x, t, s = randn(4, 2).double(), torch.tensor([0.9, 0.8, 0.6, 0.5]), torch.tensor([0.7, 0.5, 0.3, 0.0])
    denoiser = exact(schedule)
    quiet, _ = Jump(0.0)(denoiser, x, t, s, {})
    assert torch.equal(quiet.mean, carried(denoiser, x, t, s, {})) and not quiet.is_random.any()
    denoiser.inner.heard.clear()
    loud, _ = Jump(1.0)(denoiser, x, t, s, {})
    hops, _ = Consistency()(denoiser, x, t, s, {})
    torch.testing.assert_close(loud.mean, hops.mean, rtol=0, atol=0)
    torch.testing.assert_close(loud.std, hops.std, rtol=0, atol=0)
    assert torch.equal(denoiser.inner.heard[0], schedule.net_time(torch.zeros(4)))
    half, belief = Jump(0.6)(denoiser, x, t, s, {})
    reached = scaled_level(schedule, s, 0.8)
    assert torch.equal(denoiser.inner.heard[-1], schedule.net_time(reached))
    level, wanted = (schedule.sigma(each) / schedule.alpha(each) for each in (reached, s))
    torch.testing.assert_close(level, 0.8 * wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close((half.std / schedule.alpha(s)) ** 2 + level**2, wanted**2, rtol=1e-4, atol=1e-6)
    alpha = schedule.alpha(s)[:, None]
    torch.testing.assert_close(half.mean, alpha * (belief.x0 + level[:, None] * belief.eps), rtol=1e-4, atol=1e-4)
    assert torch.equal(half.mean[3], belief.x0[3]) and not half.is_random[3]


def test_gamma_outside_its_range_is_refused():
    for gamma in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="gamma must lie in"):
            Jump(gamma)


def test_a_scaled_level_on_a_table_is_the_nearest_entry_below():
    reached = scaled_level(TABLE, torch.tensor([0.5, 1.0, 0.0]), 0.5)
    level, wanted = (TABLE.sigma(t) / TABLE.alpha(t) for t in (reached, torch.tensor([0.5, 1.0, 0.0])))
    assert (level <= 0.5 * wanted + 1e-6).all() and (level[:2] > 0.49 * wanted[:2]).all()


@pytest.mark.parametrize("schedule", [EDM(sigma_max=20.0, rho=3.0), RectifiedFlow(), Cosine()], ids=repr)
def test_heun_is_of_second_order(schedule):
    """On a Gaussian, where the path is (x - alpha m) / sqrt(alpha^2 std^2 + sigma^2) = constant: twice the steps are a
    quarter of the error, of DDIM's half."""
    mean, std = torch.tensor([0.4, -0.2], dtype=torch.float64), 0.6
    denoiser, x, far = GaussianDenoiser(mean, std, schedule), randn(8, 2), torch.tensor([0.9])

    def scale(t):
        return (schedule.alpha(t) ** 2 * std**2 + schedule.sigma(t) ** 2).sqrt().double()

    x = (x * scale(far)).float()
    near = torch.tensor([0.2])
    wanted = schedule.alpha(near) * mean + (x - schedule.alpha(far) * mean) / scale(far) * scale(near)

    def error(kernel, steps):
        *_, last = walk(kernel, denoiser, x, torch.linspace(0.9, 0.2, steps + 1), {})
        return float((last.x_next - wanted).norm())

    assert 3.3 < error(Heun(), 8) / error(Heun(), 16) < 4.7
    assert 1.6 < error(DDIM(0.0), 8) / error(DDIM(0.0), 16) < 2.4
    assert error(Heun(), 16) < error(DDIM(0.0), 32)  # as many calls


def test_heun_ends_with_eulers_step():
    x, t = randn(3, 2), torch.tensor([0.5, 0.4, 0.3])
    for schedule in SCHEDULES:
        law, belief = Heun()(mixture(schedule), x, t, torch.zeros(3), {})
        torch.testing.assert_close(law.mean, belief.x0, rtol=1e-5, atol=1e-6)


def test_pairs_anywhere_lie_on_the_chain():
    first, second, end = anywhere(5)(20_000, 12, torch.Generator().manual_seed(0))
    assert (first >= 0).all() and (end <= 12).all() and (second <= end).all()
    shares = torch.bincount(second - first, minlength=6) / 20_000
    torch.testing.assert_close(shares, torch.arange(6) / 15, rtol=0, atol=0.015)
    near = first[(second - first) == 5]
    torch.testing.assert_close(torch.bincount(near) / len(near), torch.full((8,), 1 / 8), rtol=0, atol=0.02)
    assert end[(second - first) == 5].max() == 12


def test_a_twin_is_the_average_and_lets_gradients_through():
    model = Ring(seed=0, width=16).few_step("jump", 4)
    twin, plain = Twin(model, 0.5), Ema(model.parameters(), 0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    twin.update(), plain.update()
    with plain.swapped():
        assert all(map(torch.equal, twin.model.parameters(), model.parameters()))
    state, x = twin.state_dict(), randn(3, 2).requires_grad_()
    ctm.Arrived(twin)(x, torch.tensor([0.9, 0.5, 0.0]), {"label": torch.tensor([-1, -1, -1])}).sum().backward()
    assert (x.grad[:2] != 0).any(1).all() and torch.equal(x.grad[2], torch.ones(2))
    assert all(parameter.grad is None for parameter in [*twin.model.parameters(), *model.parameters()])
    other = Twin(Ring(seed=1, width=16).few_step("jump", 4), 0.5)
    other.load_state_dict(state)
    assert all(map(torch.equal, twin.model.parameters(), other.model.parameters()))


def quadrature(eta: float, steps: int = 400) -> tuple[float, float]:
    """(mean, standard deviation) of f_N(noise) for data N(0.3, 0.5^2), where f stays linear: f(x) = a x + b."""
    schedule, mean, std = EDM(), torch.tensor([0.3], dtype=torch.float64), 0.5
    denoiser, a, b = GaussianDenoiser(mean, std, schedule), 1.0, 0.0
    times = torch.linspace(0.2, 1.0, steps + 1)
    for s, t in itertools.pairwise(times):
        points = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        law, _ = DDIM(eta)(denoiser, points, t.expand(2), s.expand(2), {})
        zero, one = law.mean.flatten().tolist()
        a, b = a * (one - zero), a * zero + b
    return b, abs(a) * float(schedule.sigma(torch.tensor([1.0])))


def test_noise_in_the_teacher_collapses_what_a_squared_distance_learns():
    """f(x) = E[f(y) | x]: without noise the fixed point has the data's spread, with eta = 1 none of it."""
    centre, spread = quadrature(0.0)
    assert centre == pytest.approx(0.3, abs=0.01) and spread == pytest.approx(0.5, abs=0.01)
    assert 0.9 < quadrature(0.1)[1] / spread < 0.97 and quadrature(1.0)[1] < 0.02


def test_much_noise_without_an_adversary_is_refused():
    with pytest.raises(ValueError, match=r"eta is 0\.5 without an adversarial term"):
        scott.Settings(eta=0.5).check()
    scott.Settings(eta=0.5, adversarial_weight=0.4).check()
    with pytest.raises(ValueError, match="substeps is 21"):
        scott.Settings(substeps=21).check()
    with pytest.raises(ValueError, match="most is 21"):
        ctm.Settings(most=21).check()


def minibatch(method):
    return next(iter(next(iter(method.experience(batch())))))


def test_the_adversary_and_the_student_learn_apart():
    """The student's loss leaves the discriminator's gradient alone, and the discriminator's the student's."""
    model = toy()
    method = scott.Settings(**SIZES, adversarial_weight=0.4).build(model, Off(), torch.Generator().manual_seed(0))
    (adversary,) = method.terms
    assert isinstance(adversary, Adversarial)
    pairs = minibatch(method)
    said = carried(method.policy.model.denoiser, pairs.x, pairs.t, pairs.end, pairs.cond)
    loss, metrics = adversary(method, pairs, said)
    own = [parameter.grad.clone() for parameter in adversary.parameters]
    assert all(parameter.grad is None for parameter in model.parameters()) and all(g.abs().sum() > 0 for g in own)
    loss.backward()
    assert all(map(torch.equal, own, [parameter.grad for parameter in adversary.parameters]))
    assert any(parameter.grad.abs().sum() > 0 for parameter in model.parameters() if parameter.grad is not None)
    assert metrics["discriminator_loss"] == pytest.approx(2.0, abs=1.5)
    before = [parameter.detach().clone() for parameter in adversary.parameters]
    adversary.after_step(method)
    assert not any(map(torch.equal, before, adversary.parameters)) and adversary.rows == 0
    with torch.no_grad():
        real, fake = (adversary.discriminator(x, pairs.cond) for x in (pairs.x0, said))
    assert float((1 - real).relu().sum() + (1 + fake).relu().sum()) / len(said) < float(metrics["discriminator_loss"])


def test_a_discriminator_reads_maps_and_prompts():
    """Every row by itself, and differently for another prompt; labels are left out."""
    cond = {"prompt_embeds": randn(5, 7, 6), "pooled": randn(5, 3, seed=1), "label": torch.arange(5)}
    net = Discriminator((4, 8, 8), cond, 16, torch.Generator().manual_seed(0))
    maps = randn(5, 4, 8, 8, seed=2)
    said = net(maps, cond)
    assert said.shape == (5,) and net.told.in_features == 9
    torch.testing.assert_close(net(maps[2:3], take(cond, torch.tensor([2]))), said[2:3], rtol=1e-5, atol=1e-6)
    other = net(maps, cond | {"prompt_embeds": cond["prompt_embeds"] + torch.tensor([0, 0, 1, 0, 0])[:, None, None]})
    assert ((other - said).abs() > 1e-4).tolist() == [False, False, True, False, False]


class Told(torch.nn.Module):
    """A network that is told two times."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Linear(14, 32), torch.nn.Linear(32, 12)

    def forward(self, x, tau, length, end_time=None):
        times = torch.stack([tau, tau if end_time is None else end_time], dim=1)
        hidden = torch.tanh(self.first(torch.cat([x.flatten(1), times.to(x)], dim=1)))
        return self.last(hidden + length).view_as(x)


def own(takes_end: bool = True) -> OwnModel:
    def encode(prompts):
        return {"length": torch.tensor([[len(prompt) / 10] for prompt in prompts])}

    return OwnModel(Told(), encode, lambda x: x * 0.5 + 0.5, (3, 2, 2), takes_end=takes_end)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_network_of_ones_own_is_distilled_and_its_twin_follows(kind):
    """Both change, the twin half as far after one update of decay 0.5; nothing else of the network does."""
    model = own()
    model.add_lora(4) if kind == "lora" else model.train_full()
    settings = ctm.Settings(
        prompts_per_step=4, images_per_prompt=2, student_steps=2, inference_steps=6, updates=1, target_decay=0.5
    )
    settings.check()
    method = settings.build(model, Off(), torch.Generator().manual_seed(0))
    twin = method.target.model
    assert {id(each) for each in twin.parameters()}.isdisjoint({id(each) for each in model.parameters()})
    before = [parameter.detach().clone() for parameter in model.parameters()]
    work = batches(PromptSet(["a", "bb", "ccc", "dddd"]), 4, 2, 0)
    train(method, work, torch.optim.SGD(model.parameters(), lr=0.1), steps=1)
    moved = [now.detach() - was for now, was in zip(model.parameters(), before, strict=True)]
    assert any(each.abs().max() > 0 for each in moved)
    for now, was, by in zip(twin.parameters(), before, moved, strict=True):
        torch.testing.assert_close(now, was + by / 2, rtol=1e-5, atol=1e-7)


def test_a_network_that_is_told_one_time_is_refused():
    model = own(takes_end=False)
    model.train_full()
    with pytest.raises(ValueError, match="the network of this model is told one time"):
        ctm.Settings().build(model, Off(), torch.Generator())


class Saved:
    """A toy that a checkpoint can hold."""

    def __init__(self, model) -> None:
        self.model = model

    def save_adapter(self, folder) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.model.net.state_dict(), folder / "net.safetensors")

    def load_adapter(self, folder) -> None:
        self.model.net.load_state_dict(load_file(folder / "net.safetensors"))


@pytest.mark.parametrize("settings", [scott.Settings(**SIZES, adversarial_weight=0.4), ctm.Settings(**SIZES)], ids=repr)
def test_what_moves_with_a_distillation_is_kept(settings, tmp_path):
    """Discriminator and its optimizer, the twin: the next update after a checkpoint is the same."""
    ends = []
    model = toy()
    method, optimizer = started(settings, model)
    advance(method, optimizer, 2)
    folder = save_checkpoint(tmp_path, 1, Saved(model), optimizer, method)
    advance(method, optimizer, 2)
    ends.append(copy.deepcopy(model.net.state_dict()))
    model = toy()
    method, optimizer = started(settings, model, seed=5)
    load_checkpoint(folder, Saved(model), optimizer, method)
    advance(method, optimizer, 2)
    assert all(torch.equal(value, ends[0][name]) for name, value in model.net.state_dict().items())
    plain, optimizer = started(scott.Settings(**SIZES, target_decay=0.0), toy())
    with pytest.raises(ValueError, match="it is of another kind of run"):
        load_checkpoint(folder, Saved(toy()), optimizer, plain)


def started(settings, model, seed=0):
    method = settings.build(model, Off(), torch.Generator().manual_seed(seed))
    return method, torch.optim.AdamW(model.parameters(), lr=1e-3)


def advance(method, optimizer, updates) -> None:
    for _, update in zip(range(updates), method.experience(batch()), strict=False):
        total = sum(method.loss(pairs).total for pairs in update)
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step()
