"""sCM: the arc of any path, its tangent against finite differences and exact consistency functions, its sources."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from tropism.base import Cond, Prediction, Prompts, bcast
from tropism.data.prompts import PromptSet
from tropism.denoisers import consistent
from tropism.distillation.arc import Arc, scaled, tangent
from tropism.distillation.curriculum import Alone, Span
from tropism.distillation.levels import level
from tropism.distillation.pairs import Pairs, part_way
from tropism.methods import scm
from tropism.models.pipelines import wrap_pipeline
from tropism.models.ring import Ring
from tropism.models.toy import MixtureDenoiser, ToyNet, ToyTextToImage
from tropism.samplers import DDIM, EulerODE
from tropism.schedules import EDM, Cosine, RectifiedFlow, add_noise

SCHEDULES = [EDM(), EDM(variance_preserving=True), RectifiedFlow(), Cosine()]
named = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class Bent:
    """A path in float64, whose time is not its angle: the angle of data of standard deviation 1 is t^2 pi / 2."""

    def alpha(self, t: Tensor) -> Tensor:
        return (t.square() * math.pi / 2).cos()

    def sigma(self, t: Tensor) -> Tensor:
        return (t.square() * math.pi / 2).sin()


# The arc.


@named
def test_any_path_is_an_arc(schedule: Any) -> None:
    """A state over its size is cos x0 + sin d eps; its velocity is the derivative of that in the angle; a noise's level
    of d is half way between data and noise."""
    arc, t = Arc(schedule, 0.5), 0.05 + 0.9 * torch.rand(256, generator=generator())
    x0, eps = torch.randn(2, 256, 3, generator=generator(1))
    angle = arc.angle(t)
    x = add_noise(schedule, x0, eps, t) / bcast(arc.size(t), x0)

    def state(angle: Tensor) -> Tensor:
        return bcast(angle.cos(), x0) * x0 + bcast(angle.sin(), x0) * 0.5 * eps

    assert float((x - state(angle)).abs().max()) < 3e-6
    h = 1e-4
    moved = (state(angle.double() + h) - state(angle.double() - h)) / (2 * h)
    assert float((arc.velocity(Prediction(x0, eps), t) - moved).abs().max()) < 1e-5
    torch.testing.assert_close(angle.tan() * 0.5, level(schedule, t), rtol=1e-4, atol=0)
    assert bool((angle > 0).all()) and bool((angle < math.pi / 2).all())


def test_how_fast_the_angle_turns() -> None:
    t = 0.05 + 0.9 * torch.rand(64, generator=generator(), dtype=torch.float64)
    torch.testing.assert_close(Arc(Bent(), 1.0).turn(t), math.pi * t, rtol=1e-12, atol=0)
    other = Arc(Bent(), 0.3)
    slope = (other.angle(t + 1e-6) - other.angle(t - 1e-6)) / 2e-6
    torch.testing.assert_close(other.turn(t), slope, rtol=1e-7, atol=1e-7)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(other.angle(ends), ends * math.pi / 2, atol=1e-12, rtol=0)


@pytest.mark.parametrize("schedule", [EDM(variance_preserving=True), RectifiedFlow()], ids=["preconditioned", "flow"])
def test_the_velocity_of_a_network_is_that_of_its_answer(schedule: Any) -> None:
    """x0 = cos x - sin velocity; and at the clean end it is x itself, whatever the network says."""
    ring = Ring(schedule)
    student, arc = ring.few_step("consistency", 2).denoiser, Arc(schedule, 0.5)
    x, cond = torch.randn(128, 2, generator=generator()), ring.encode(["any"] * 128)
    t = 0.25 + 0.74 * torch.rand(128, generator=generator(1))
    said = student(x, t, cond)
    angle, on_arc = arc.angle(t), x / bcast(arc.size(t), x)
    answer = bcast(angle.cos(), x) * on_arc - bcast(angle.sin(), x) * arc.velocity(said, t)
    torch.testing.assert_close(answer, said.x0, atol=2e-5, rtol=0)
    clean = torch.full((128,), 0.0 if isinstance(schedule, RectifiedFlow) else float(schedule.time(torch.tensor(2e-3))))
    torch.testing.assert_close(student(x, clean, cond).x0, x, atol=1e-5, rtol=1e-5)


# The tangent.


def slow_net() -> ToyNet:
    return ToyNet(generator(), octaves=3).double()


def states(rows: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """x, t and a direction, in float64."""
    x, to = torch.randn(2, rows, 2, generator=generator(1), dtype=torch.float64)
    return x, 0.1 + 0.85 * torch.rand(rows, generator=generator(2), dtype=torch.float64), to


def test_the_tangent_is_that_of_finite_differences() -> None:
    """In float64, through a network and a time that is not the angle; f is followed by a change of the angle."""
    net, arc, (x, t, to) = slow_net(), Arc(Bent(), 0.7), states()
    embeds = torch.ones(len(x), 2, 16, dtype=torch.float64)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return net(x, 1000 * t, {"prompt_embeds": embeds})

    def f(x: Tensor, t: Tensor) -> Tensor:
        angle = arc.angle(t)
        return bcast(angle.cos(), x) * x - bcast(angle.sin(), x) * velocity(x, t)

    angle, turn, h = arc.angle(t), arc.turn(t), 1e-6
    with torch.no_grad():
        said, found = tangent(velocity, x, t, to, angle, turn)
        ahead, behind = f(x + h * to, t + h / turn), f(x - h * to, t - h / turn)
    wanted = bcast(angle.cos(), x) * (ahead - behind) / (2 * h)
    torch.testing.assert_close(found, wanted, atol=1e-7, rtol=1e-7)
    assert torch.equal(said, velocity(x, t).detach()) and float(found.abs().mean()) > 0.1


def test_without_its_second_half_the_tangent_points_to_the_velocity() -> None:
    x, t, to = states()
    angle = t * math.pi / 2

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return x.sin() * bcast(t, x)

    _, found = tangent(velocity, x, t, to, angle, torch.ones_like(t), share=0.0)
    torch.testing.assert_close(found, bcast(angle.cos() ** 2, x) * (to - velocity(x, t)), atol=1e-14, rtol=0)
    halves = [tangent(velocity, x, t, to, angle, torch.ones_like(t), share)[1] for share in (0.0, 0.25, 1.0)]
    torch.testing.assert_close(halves[1], 0.75 * halves[0] + 0.25 * halves[2], atol=1e-14, rtol=0)


def mixture() -> MixtureDenoiser:
    means = torch.tensor([[0.8, 0.0], [-0.5, 0.6], [-0.2, -0.9]], dtype=torch.float64)
    return MixtureDenoiser(means, torch.full((3,), 0.4, dtype=torch.float64), torch.full((3,), 1 / 3), Bent())


def followed(arc: Arc, exact: MixtureDenoiser, x: Tensor, t: Tensor, steps: int) -> Tensor:
    """The clean end of the path through x on the arc at t, by ``steps`` moves of Heun's method in t."""

    def rate(x: Tensor, t: Tensor) -> Tensor:
        said = exact(x * bcast(arc.size(t), x), t, {})
        return arc.velocity(said, t) * bcast(math.pi * t, x)  # the angle of this path turns by pi t

    for step in range(steps):
        now, after = t * (1 - step / steps), t * (1 - (step + 1) / steps)
        first = rate(x, now)
        second = rate(x + bcast(after - now, x) * first, after)
        x = x + bcast(after - now, x) * (first + second) / 2
    return x


def test_the_exact_consistency_function_has_no_tangent() -> None:
    """Of a mixture, whose path is followed to its end by steps: what remains is of the steps and falls with their
    square. The answer of the denoiser itself has one."""
    arc, exact, (x, t, _) = Arc(Bent(), 1.0), mixture(), states()
    angle, turn = arc.angle(t), arc.turn(t)

    def velocity(f: Any) -> Any:
        def said(x: Tensor, t: Tensor) -> Tensor:
            angle = arc.angle(t)
            return (bcast(angle.cos(), x) * x - f(x, t)) / bcast(angle.sin(), x)

        return said

    to = arc.velocity(exact(x * bcast(arc.size(t), x), t, {}), t)

    def rest(steps: int) -> float:
        f = velocity(lambda x, t: followed(arc, exact, x, t, steps))
        return float(tangent(f, x, t, to, angle, turn)[1].abs().max())

    rests = [rest(50), rest(100)]
    assert rests[0] < 1e-3 and rests[1] < 0.3 * rests[0]
    denoiser = tangent(velocity(lambda x, t: exact(x, t, {}).x0), x, t, to, angle, turn)[1]
    assert float(denoiser.abs().mean()) > 0.1


def test_scaled_tangents() -> None:
    tangents = torch.randn(5, 4, 3, generator=generator()) * torch.logspace(-2, 2, 5)[:, None, None]
    size = tangents.flatten(1).square().mean(1).sqrt()
    found = scaled(tangents, 0.2)
    torch.testing.assert_close(found.flatten(1).square().mean(1).sqrt(), size / (size + 0.2))
    torch.testing.assert_close(
        nn.functional.normalize(found, dim=(1, 2)), nn.functional.normalize(tangents, dim=(1, 2))
    )
    assert torch.equal(scaled(tangents, math.inf), tangents)


# The method, on a Gaussian whose consistency function is known.


@dataclass(frozen=True)
class Known:
    """A ring of one mode, N(mean, 0.05^2), and a student that says its exact consistency function, but for a share of
    the denoiser's answer. (A multiple of the function would not change along the path either.)"""

    share: float = 0.0

    def ring(self) -> Ring:
        ring = Ring(RectifiedFlow(), modes=1)
        ring._student = _Exact(ring, self.share)  # type: ignore[assignment]
        return ring


@dataclass(frozen=True)
class _Exact:
    ring: Ring
    share: float

    @property
    def schedule(self) -> Any:
        return self.ring.schedule

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        alpha, sigma = bcast(self.schedule.alpha(t), x), bcast(self.schedule.sigma(t), x)
        mean = self.ring.exact.means[0]
        end = mean + 0.05 / ((0.05 * alpha) ** 2 + sigma**2).sqrt() * (x - alpha * mean)
        return consistent(torch.lerp(end, self.ring.exact(x, t, cond).x0, self.share), x, alpha, sigma)


def built(ring: Ring, **changes: Any) -> scm.SCM:
    common: dict[str, Any] = dict(data_std=0.5, warmup=0, tangent_c=math.inf, minibatch=10_000, updates=1)
    settings = scm.Settings(**common | changes)
    settings.check()
    pictures = dict(pictures=ring.pictures) if settings.needs_pictures else {}
    return settings.build(ring, None, generator(), **pictures)  # type: ignore[arg-type]


def first(method: scm.SCM, rows: int) -> Pairs:
    prompts = Prompts(["any"] * rows, torch.arange(rows), {})
    return next(next(iter(method.experience(prompts))))


@pytest.mark.parametrize("data", ["chains", "pictures"])
def test_the_exact_student_is_left_as_it_is(data: Any) -> None:
    """sCD: nothing is asked of it at any row (float32); of one that half says the denoiser's answer more is."""
    method = built(Known().ring(), data=data)
    pairs = first(method, 512)
    assert float(method.loss(pairs).total) / 512 < 1e-7
    wrong = built(Known(0.5).ring(), data=data)
    assert float(wrong.loss(first(wrong, 512)).total) / 512 > 1e-3


def test_without_a_teacher_the_exact_student_is_left_as_it_is_on_average() -> None:
    """sCT: the tangent is noise whose mean at a state is 0: its products with functions of the state are, to within
    four standard errors."""
    ring = Known().ring()
    method = built(ring, data="pictures", direction="data")
    pairs = first(method, 40_000)
    denoiser = method.policy.model.denoiser
    change = method.wanted(pairs) - method.said(denoiser, pairs.x, pairs.t, pairs.end, pairs.cond)
    assert float(change.abs().mean()) > 0.01
    for weight in (torch.ones(len(change)), pairs.t, pairs.x[:, 0], pairs.x[:, 1], pairs.x[:, 0] * pairs.t):
        products = change * bcast(weight, change)
        error = products.std(0) / len(products) ** 0.5
        assert bool((products.mean(0).abs() < 4 * error).all())
    wrong = built(Known(0.5).ring(), data="pictures", direction="data")
    change = wrong.wanted(pairs) - wrong.said(wrong.policy.model.denoiser, pairs.x, pairs.t, pairs.end, pairs.cond)
    products = change[:, 1] * pairs.x[:, 1]
    assert float(products.mean().abs() / (products.std() / len(products) ** 0.5)) > 10


def test_the_loss_moves_the_answer_against_its_change() -> None:
    """By hand: the gradient in F is -2 / D of the scaled tangent, and the share of the second half rises by update."""
    ring = Ring(RectifiedFlow(), fastest=4.0)
    method = built(ring, warmup=4, tangent_c=0.1)
    pairs = first(method, 32)
    shares = []
    for _ in range(6):
        said = method.said(method.policy.model.denoiser, pairs.x, pairs.t, pairs.end, pairs.cond).detach()
        shares.append(method.wanted(pairs) - said)
        method.after_step()
    full = dataclasses.replace(method, c=math.inf, warmup=0)
    said = full.said(full.policy.model.denoiser, pairs.x, pairs.t, pairs.end, pairs.cond).detach()
    raw = full.wanted(pairs) - said
    torch.testing.assert_close(shares[4], scaled(raw, 0.2), atol=1e-5, rtol=1e-4)
    assert torch.equal(shares[4], shares[5]) and not torch.allclose(shares[3], shares[4], atol=1e-3)
    begun = dataclasses.replace(method, c=math.inf, taught=0).wanted(pairs) - said
    angle = method.arc.angle(pairs.t)
    aim = (method.towards(pairs) / 0.5 - said) * bcast(angle.cos() ** 2, said)
    torch.testing.assert_close(begun, aim, atol=1e-5, rtol=1e-4)


def test_the_warm_up_goes_on_after_a_checkpoint() -> None:
    method = built(Ring(RectifiedFlow()), warmup=10)
    for _ in range(3):
        method.after_step()
    other = built(Ring(RectifiedFlow()), warmup=10)
    other.load_state_dict(method.state_dict())
    assert other.taught == 3 and method.state_dict() == {"made": 0, "taught": 3}


def test_the_teacher_s_velocity_is_guided() -> None:
    ring = Ring(RectifiedFlow(), classes=2, guidance_scale=3.0)
    method = built(ring)
    pairs = first(method, 16)
    pairs = dataclasses.replace(pairs, cond=ring.encode(["class 1"] * len(pairs.t)))
    null = {"label": torch.full_like(pairs.cond["label"], -1)}
    yes, no = (ring.exact(pairs.x, pairs.t, cond) for cond in (pairs.cond, null))
    guided = Prediction(*(n + 3 * (y - n) for y, n in zip(yes, no, strict=True)))
    torch.testing.assert_close(method.towards(pairs), method.arc.velocity(guided, pairs.t), atol=1e-5, rtol=1e-5)


# Where states come from.


@pytest.mark.parametrize("schedule", [RectifiedFlow(), EDM(variance_preserving=True)], ids=["flow", "edm"])
def test_states_lie_on_the_moves_of_the_teacher(schedule: Any) -> None:
    """At any share of a move: where the teacher goes if it stops there."""
    ring = Ring(schedule)
    kernel = EulerODE() if isinstance(schedule, RectifiedFlow) else DDIM(0.0)
    x, cond = torch.randn(256, 2, generator=generator()), ring.encode(["any"] * 256)
    t = 0.3 + 0.7 * torch.rand(256, generator=generator(1))
    s = (t * torch.rand(256, generator=generator(2))).where(torch.arange(256) % 4 > 0, 0.0)
    u = torch.lerp(s, t, 0.05 + 0.9 * torch.rand(256, generator=generator(3)))
    law, _ = kernel(ring.exact, x, t, s, cond)
    pairs = Pairs(x, t, law.mode, s, s, cond, torch.ones(256))
    stopped, _ = kernel(ring.exact, x, t, u, cond)
    torch.testing.assert_close(part_way(schedule, pairs, u), stopped.mode, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(part_way(schedule, pairs, t), x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(part_way(schedule, pairs, s), law.mode, atol=1e-5, rtol=1e-5)


def test_times_on_chains_are_anywhere() -> None:
    method = built(Ring(RectifiedFlow()), data="chains", inference_steps=10)
    t = first(method, 500).t
    assert len(t) == 5000 == len(t.unique()) or len(t.unique()) > 4900
    assert float(t.mean()) == pytest.approx(0.5, abs=0.02) and 0 < float(t.min()) < 0.01 and float(t.max()) > 0.99


def test_levels_are_lognormal() -> None:
    schedule = EDM()
    t, s, weight = Alone(Span(schedule, 1.0), -1.0, 1.4)(40_000, 0, generator())
    logs = (schedule.level(t) / 2).log()  # data of twice the papers' standard deviation
    assert float(logs.mean()) == pytest.approx(-1.0, abs=0.03) and float(logs.std()) == pytest.approx(1.4, abs=0.03)
    assert bool((s == 0).all()) and bool((weight == 1).all())


# What it is not for, and what it is.


def test_what_does_not_suit_is_refused_in_a_sentence() -> None:
    table = ToyTextToImage(ToyNet(generator()), torch.zeros(8, 16))
    with pytest.raises(
        ValueError, match=r"levels are a table \(DDPMTable\), and this method takes derivatives in time"
    ):
        scm.Settings().build(table, None, generator())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="direction is data, which needs pictures, and data is chains"):
        scm.Settings(direction="data").check()
    for wrong, said in (
        (dict(warmup=-1), "warmup is -1"),
        (dict(tangent_c=0.0), r"tangent_c 0\.0"),
        (dict(level_std=0.0), r"level_std 0\.0"),
        (dict(data_std=-1.0), r"data_std -1\.0; wanted above 0"),
        (dict(student_steps=20), "student_steps is 20; wanted fewer than inference_steps"),
    ):
        with pytest.raises(ValueError, match=said):
            scm.Settings(**wrong).check()  # type: ignore[arg-type]


def test_a_pipeline_is_taught() -> None:
    """Stable Diffusion 3 with random weights: a finite gradient in every adapter, from chains and by pictures."""
    model = wrap_pipeline(tiny.sd3_pipeline(), guidance_scale=2.0)
    model.add_lora(rank=2)
    settings = scm.Settings(prompts_per_step=2, inference_steps=3, student_steps=1, updates=1, warmup=0)
    method = settings.build(model, None, generator())  # type: ignore[arg-type]
    pairs = next(next(iter(method.experience(PromptSet(tiny.PROMPTS).batch([0, 1], 1)))))
    method.loss(pairs).total.backward()
    norms = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
    assert norms and all(bool(norm.isfinite()) for norm in norms) and float(sum(norms)) > 0
