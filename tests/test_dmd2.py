"""DMD2: what a step is against a closed form, who gets which gradient, where the student is asked, what is kept."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from distillers import points
from methods import Off, batch, toy
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tropism.base import Prediction, take
from tropism.checkpoint import load_checkpoint, save_checkpoint
from tropism.distillation.matching import Asked, FakeScore, Matching, direction, moved
from tropism.methods import dmd2
from tropism.models.own import OwnModel
from tropism.models.toy import ToyTextToImage
from tropism.randomness import row_generators, row_seeds
from tropism.schedules import RectifiedFlow, add_noise

SMALL: dict[str, Any] = dict(prompts_per_step=8, images_per_prompt=4, updates=2, warmup=1)


def built(model: ToyTextToImage, seed: int = 0, **changes: Any) -> Matching:
    settings = dmd2.Settings(**SMALL | changes)
    settings.check()
    pictures = {"pictures": points} if settings.needs_pictures else {}
    return settings.build(model, Off(), torch.Generator().manual_seed(seed), **pictures)


def first(method: Matching) -> Asked:
    return next(iter(next(iter(method.experience(batch())))))


def gradients(parameters: Any) -> Tensor:
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None] or [torch.zeros(0)])


# What a step is.


def belief(x: Tensor, t: Tensor, mean: Tensor, std: float) -> Tensor:
    """E[x0 | x] where x0 ~ N(mean, std^2)."""
    schedule = RectifiedFlow()
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
    return mean + gain * (x - alpha * mean)


@pytest.mark.parametrize("time", [0.2, 0.5, 0.9])
def test_the_direction_is_the_gradient_of_the_kl_of_two_gaussians(time: float) -> None:
    """With the rows' positive factors taken out: alpha^2 / sigma^2 of it is d KL / dx, for the mean and the spread of
    what a student says, by 2^17 points against autograd of the closed form in two dimensions."""
    rows, t = 2**17, torch.full((2**17,), time)
    generator = torch.Generator().manual_seed(0)
    mean, log_std = torch.tensor([0.3, -0.2], requires_grad=True), torch.tensor(-0.4, requires_grad=True)
    goal, goal_std = torch.tensor([-0.5, 0.1]), 0.4
    z, eps = torch.randn(2, rows, 2, generator=generator)
    x = mean + log_std.exp() * z
    noisy = add_noise(RectifiedFlow(), x.detach(), eps, t)
    real, fake = belief(noisy, t, goal, goal_std), belief(noisy, t, mean.detach(), float(log_std.detach().exp()))
    step = direction(x.detach(), real, fake) * (x.detach() - real).abs().mean(1, keepdim=True)
    ratio = ((1 - time) / time) ** 2
    found = torch.autograd.grad((ratio * step * x).sum() / rows, [mean, log_std])

    def kl() -> Tensor:
        own = (1 - time) ** 2 * log_std.exp() ** 2 + time**2
        other = (1 - time) ** 2 * goal_std**2 + time**2
        shift = ((1 - time) * (mean - goal)).square().sum()
        return 0.5 * (2 * own / other + shift / other - 2 - 2 * (own / other).log())

    for ours, exact in zip(found, torch.autograd.grad(kl(), [mean, log_std]), strict=True):
        torch.testing.assert_close(ours, exact, rtol=0.02, atol=0.003)


def test_a_row_is_measured_by_its_own_error() -> None:
    x, real, fake = torch.tensor([[1.0, 3.0], [2.0, 2.0]]), torch.zeros(2, 2), torch.tensor([[1.0, 0.0], [0.0, 4.0]])
    assert torch.equal(direction(x, real, fake), torch.tensor([[0.5, 0.0], [0.0, 2.0]]))
    assert torch.equal(direction(x, x, x), torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"shapes \(2, 2\), \(1, 2\) and \(2, 2\) must be the same"):
        direction(x, real[:1], fake)


def test_the_loss_moves_along_the_step() -> None:
    x, step = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    moved(x, step).sum().backward()
    torch.testing.assert_close(x.grad, step / 4)


def test_a_fake_score_that_is_the_teacher_says_nothing() -> None:
    """Bit by bit: an unguided teacher, and a fake score that has learnt nothing."""
    model = toy("flow")
    method = built(model, guidance_scale=1.0, warmup=0)
    loss = method.loss(first(method))
    loss.total.backward()
    assert float(loss.metrics["disagreement"]) == 0 and not gradients(model.parameters()).any()
    guided = built(toy("flow"), warmup=0)
    assert float(guided.loss(first(guided)).metrics["disagreement"]) > 0.1


# Who gets which gradient.


def test_student_and_fake_score_have_gradients_of_their_own() -> None:
    model = toy("flow")
    method = built(model)
    method.loss(first(method)).total.backward()
    own = gradients(model.parameters())
    assert own.any() and not len(gradients(method.fake.parameters))
    before, was = copy.deepcopy(method.fake.state_dict()), [p.detach().clone() for p in model.parameters()]
    method.after_step()
    assert method.fake.updates == int(before["updates"]) + 1
    assert not torch.equal(method.fake.parameters[0], before["net/0"])
    assert torch.equal(gradients(model.parameters()), own) and not len(gradients(method.fake.parameters))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), was, strict=True))


def test_the_fake_score_follows_the_student() -> None:
    """It denoises what a student that stands still says better and better."""
    method = built(toy("flow"), warmup=0, fake_updates=1, fake_learning_rate=3e-3)
    errors = []
    for _ in range(40):
        for update in method.experience(batch(32)):
            for asked in update:
                method.loss(asked)
            method.after_step()
            errors.append(method.fake.error)
    assert sum(errors[-10:]) < 0.8 * sum(errors[:10]), errors


def test_a_fake_score_needs_something_to_train() -> None:
    with pytest.raises(ValueError, match="the fake score has nothing to train; add an adapter"):
        FakeScore(nn.Identity(), 1e-3)


# Where the student is asked.


def test_states_are_those_of_the_students_own_chain() -> None:
    seen = set()
    for seed in range(12):
        method = built(toy("flow"), seed, student_steps=3)
        known = method.generator.clone_state()
        cond = method.policy.model.encode(batch().text)
        asked = method._ask(cond, None, 2)
        done = int(torch.randint(3, (), generator=known))
        generators = row_generators(row_seeds(32, known))
        x = method.policy.noise(32, generators)
        states = [x, *(move.x_next.detach() for move in method.policy.chain(x, cond, generators))]
        assert torch.equal(asked.x, states[done]) and torch.equal(asked.t, method.policy.ts[done].expand(32))
        assert float(asked.times.min()) >= 0.02 and float(asked.times.max()) <= 0.98
        seen.add(done)
    assert seen == {0, 1, 2}


def test_any_count_asks_where_any_student_is_asked() -> None:
    method = built(toy("flow"), student_steps=3, any_count=True)
    cond = take(method.policy.model.encode(batch().text), torch.arange(4))
    times = {round(float(method._ask(cond, None, 1).t[0]), 3) for _ in range(60)}
    assert times == {1.0, 0.667, 0.5, 0.333}


def test_rows_keep_their_real_samples() -> None:
    method = built(toy("flow"), adversarial_weight=0.1, minibatch=5)
    for update in method.experience(batch()):
        for asked in update:
            assert asked.x0 is not None and len(asked.x0) == len(asked.x) == len(asked.times) <= 5
    assert method.pictures is not None


# What is kept, and what a model goes back to.


class Saved:
    """A toy as a run would save it."""

    def __init__(self, model: ToyTextToImage) -> None:
        self.model = model

    def save_adapter(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.model.net.state_dict(), folder / "net.safetensors")

    def load_adapter(self, folder: Path) -> None:
        self.model.net.load_state_dict(load_file(folder / "net.safetensors"))


def advance(method: Matching, optimizer: torch.optim.Optimizer) -> None:
    for update in method.experience(batch()):
        for asked in update:
            method.loss(asked).total.backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step()


@pytest.mark.parametrize("changes", [{}, {"adversarial_weight": 0.1, "fake_updates": 2}], ids=["plain", "adversary"])
def test_a_run_that_goes_on_is_the_same_bit_by_bit(changes: dict[str, Any], tmp_path: Path) -> None:
    model = toy("flow")
    method, optimizer = built(model, **changes), torch.optim.AdamW(model.parameters(), lr=1e-3)
    advance(method, optimizer)
    folder = save_checkpoint(tmp_path, 1, Saved(model), optimizer, method)  # type: ignore[arg-type]
    advance(method, optimizer)
    other = toy("flow")
    again, second = built(other, seed=5, **changes), torch.optim.AdamW(other.parameters(), lr=1e-3)
    load_checkpoint(folder, Saved(other), second, again)  # type: ignore[arg-type]
    advance(again, second)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    kept = again.fake.state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in method.fake.state_dict().items())
    with pytest.raises(ValueError, match="the fake score has other weights"):
        again.fake.load_state_dict({name: value for name, value in kept.items() if name != "net/0"})


class Network(nn.Module):
    """x + W told."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)

    def forward(self, x: Tensor, tau: Tensor, told: Tensor) -> Tensor:
        return x + self.first(told) + tau[:, None]  # type: ignore[no-any-return]


def own(full: bool) -> OwnModel:
    with torch.random.fork_rng(devices=[]):
        network = Network()
    model = OwnModel(network, lambda text: {"told": torch.ones(len(text), 3)}, lambda x: x, (3,))
    if full:
        model.train_full()
    else:
        model.add_lora(2, generator=torch.Generator().manual_seed(0))
    for parameter in model.parameters():
        parameter.data += 0.3
    return model


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_the_fake_score_begins_as_the_teacher(full: bool) -> None:
    """In a copy: the student stays as it is."""
    model = own(full)
    x, t, cond = torch.ones(2, 3), torch.full((2,), 0.5), model.encode(["a", "b"])

    def said(one: OwnModel) -> Prediction:
        with torch.no_grad():
            return one.denoiser(x, t, cond)

    now = said(model)
    with model.reference():
        before = said(model)
    assert not torch.equal(now.x0, before.x0)
    assert torch.equal(said(FakeScore.of(model, 1e-3, from_teacher=True).model).x0, before.x0)
    assert torch.equal(said(FakeScore.of(model, 1e-3, from_teacher=False).model).x0, now.x0)
    assert torch.equal(said(model).x0, now.x0)


# What is refused.


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"fake_updates": 0}, "fake_updates 0 and warmup 1; wanted between 0 and 1, at least 1, and 0 or more"),
        ({"fake_learning_rate": 0.0}, "fake_learning_rate is 0.0"),
        ({"warmup": -1}, "warmup -1"),
        ({"adversarial_weight": -1.0}, "adversarial_weight is -1.0"),
        ({"discriminator_width": 0}, "discriminator_width 0"),
        ({"any_count": True}, "any_count is given with student_steps 1; wanted at least 2"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        dmd2.Settings(**SMALL | changes).check()
