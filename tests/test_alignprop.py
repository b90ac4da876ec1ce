"""Reward gradients through a window of the chain, against a chain written out; windows; DRaFT+'s optimum."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from methods import PROMPTS, Off, batch, toy
from policies import Line, seeded
from torch import Tensor

from tropism.ascent import NoGradient
from tropism.base import Prompts
from tropism.data.prompts import PromptSet
from tropism.methods import alignprop, draft, refl
from tropism.methods.alignprop import AlignProp
from tropism.models.toy import GaussianPolicy
from tropism.policy import Policy
from tropism.randomness import row_generators
from tropism.rewards.callables import as_reward
from tropism.samplers import DDIM, EulerODE
from tropism.schedules import ddpm_table
from tropism.train import train
from tropism.windows import LastK, LowVariance, OneStep, RandomCut, Span

STEPS = 6


def method_on(model, window, reward=None, eta=1.0, **fields) -> AlignProp:
    policy = Policy(model, DDIM(eta) if model.denoiser.target == "eps" else EulerODE(), STEPS)
    return AlignProp(policy, Off() if reward is None else reward, window, minibatch=64, generator=seeded(), **fields)


def draws_of(method, prompts):
    (update,) = method.experience(prompts)
    (draws,) = list(update)
    return draws


def gradient(model) -> Tensor:
    used = [parameter for parameter in model.parameters() if parameter.grad is not None]  # all but those for cond[END]
    found = torch.cat([parameter.grad.flatten() for parameter in used])
    for parameter in used:
        parameter.grad = None
    return found


# --- the gradient, against a chain written out ---


def chain_written_out(model, draws, eta: float, keep: int) -> tuple[Tensor, Tensor]:
    """Guided DDIM or Euler's method with the draws' own noise, in the network's float64; the state is detached before
    the last ``keep`` moves. Returns the last state and the last predicted x0."""
    noise = [torch.stack(rows).double() for rows in zip(*(_noise(seed) for seed in draws.seeds), strict=True)]
    flow = model.denoiser.target == "flow"
    ts = model.grid(STEPS)
    x, cond = noise[0], draws.cond["prompt_embeds"]
    null = model.null()["prompt_embeds"].expand_as(cond)
    for place in range(STEPS):
        t, s = ts[place : place + 1], ts[place + 1 : place + 2]
        if place < STEPS - keep:
            x = x.detach()
        number = model.schedule.net_time(t).expand(len(x))
        said, unsaid = model.net(x, number, {"prompt_embeds": cond}), model.net(x, number, {"prompt_embeds": null})
        out = unsaid + 2.0 * (said - unsaid)
        out = out if place >= STEPS - keep else out.detach()
        if flow:
            x0 = x - t.double() * out
            x = x + (s - t).double() * out
            continue
        at, as_ = model.schedule.alpha(t).double(), model.schedule.alpha(s).double()
        st, ss = model.schedule.sigma(t).double(), model.schedule.sigma(s).double()
        x0 = (x - st * out) / at
        std = eta * ss / st * (st**2 - (at / as_ * ss) ** 2).clamp(min=0).sqrt()
        x = as_ * x0 + (ss**2 - std**2).clamp(min=0).sqrt() * out + std * noise[place + 1]
    return x, x0


def _noise(seed: Tensor) -> list[Tensor]:
    (generator,) = row_generators(seed[None])
    return [torch.randn(2, generator=generator) for _ in range(STEPS + 1)]


@pytest.mark.parametrize("keep", [1, 3, STEPS])
@pytest.mark.parametrize(("target", "eta"), [("eps", 1.0), ("eps", 0.0), ("flow", 0.0)])
def test_last_k_is_backpropagation_cut_before_the_last_k_moves(target, eta, keep):
    """With K = all moves it is all of it: nothing before the first noise has a gradient."""
    model, prompts = toy(target, double=True), batch(2)
    method = method_on(model, LastK(keep), eta=eta)
    draws = draws_of(method, prompts)
    loss = method.loss(draws)
    loss.total.backward()
    got = gradient(model)
    end, _ = chain_written_out(model, draws, eta, keep)
    wanted_loss = -Off()(end, prompts.text).sum()
    wanted_loss.backward()
    wanted = gradient(model)
    assert loss.weight == 16 and loss.total.item() == pytest.approx(wanted_loss.item(), rel=1e-5)
    assert (got - wanted).norm() < 2e-5 * wanted.norm()


def test_windows_differ():
    """The gradients of the test above are not all the same."""
    grads = []
    for window in (LastK(1), LastK(3), LastK(STEPS)):
        model = toy()
        method = method_on(model, window)
        method.loss(draws_of(method, batch(2))).total.backward()
        grads.append(gradient(model))
    assert (grads[0] - grads[1]).norm() > 0.1 * grads[0].norm() and (grads[1] - grads[2]).norm() > 0.05 * grads[
        1
    ].norm()


class Seen(Off):
    """Remembers what it was asked about."""

    def __init__(self):
        self.samples = []

    def __call__(self, samples, prompts, **columns):
        self.samples.append(samples)
        return super().__call__(samples, prompts, **columns)


class SeenLine(Line):
    """Remembers what it was asked about."""

    def __init__(self):
        self.samples = []

    def __call__(self, samples, prompts, **columns):
        self.samples.append(samples)
        return super().__call__(samples, prompts)


def test_refl_rewards_the_x0_that_is_predicted_at_its_move():
    model, reward = toy(double=True), Seen()
    method = method_on(model, OneStep(0.5, 0.51), reward, eta=0.0)
    draws = draws_of(method, batch(2))
    assert draws.span == Span(3, 4, jump=True)
    method.loss(draws).total.backward()
    got = gradient(model)
    policy = method.policy
    moves = list(policy.chain(policy.noise(16, row_generators(draws.seeds)), draws.cond, seeded()))
    with torch.no_grad():
        believed = policy.denoiser(moves[3].x.detach(), moves[3].t, draws.cond).x0
    torch.testing.assert_close(reward.samples[0], believed)
    assert (moves[-1].x_next - believed).abs().max() > 0.01
    prediction = policy.denoiser(moves[3].x.detach(), moves[3].t, draws.cond)
    (-Off()(prediction.x0, draws.prompts.text).sum()).backward()
    assert (got - gradient(model)).norm() < 1e-5 * got.norm()


@pytest.mark.parametrize("repeats", [0, 1, 3])
def test_low_variance_scores_once_and_once_more_for_each_repeat(repeats):
    reward = Seen()
    method = method_on(toy(), LowVariance(repeats), reward, eta=0.0)
    draws = draws_of(method, batch(2))
    loss = method.loss(draws)
    assert len(reward.samples) == 1 + repeats
    assert all(samples.requires_grad for samples in reward.samples)
    assert len({tuple(samples.flatten().tolist()) for samples in reward.samples}) == 1 + repeats
    mean = torch.stack([Off()(samples, draws.prompts.text) for samples in reward.samples]).mean(0)
    torch.testing.assert_close(-loss.total, mean.sum())
    torch.testing.assert_close(draws.rewards, mean.detach())


def test_low_variance_repeats_the_last_move_of_the_very_chain():
    """On a schedule that ends noisy, as Stable Diffusion's, the repeats end as noisy as the sample itself. A model that
    knows x0 leaves no other spread than that of the level it ends at."""
    schedule = ddpm_table(1000, 0.00085, 0.012, "scaled_linear", set_alpha_to_one=False)
    model, reward = GaussianPolicy(["here"], torch.zeros(1, 2), std=1e-4, schedule=schedule), SeenLine()
    method = AlignProp(Policy(model, DDIM(0.0), STEPS), reward, LowVariance(2), minibatch=4000, generator=seeded())
    method.loss(draws_of(method, PromptSet(["here"]).batch([0], 2000)))
    left = float(schedule.sigma(torch.zeros(1)))
    assert left > 0.02
    for samples in reward.samples:
        assert samples.std().item() == pytest.approx(left, rel=0.05)


# --- rewards that have no gradient ---


class Undeclared(Off):
    """Says that it is differentiable, and is not."""

    def __call__(self, samples, prompts, **columns):
        return super().__call__(samples.detach(), prompts)


def test_a_reward_without_a_gradient_is_refused_with_what_to_do():
    says = "the reward 'blind' has no gradient.* use ddpo or raft"
    blind = as_reward(lambda images, prompts: [0.0] * len(prompts), name="blind")
    with pytest.raises(NoGradient, match=says):
        alignprop.Settings().build(toy(), blind, seeded())
    method = method_on(toy(), LastK(1), Undeclared())
    with pytest.raises(NoGradient, match="the reward 'off' has no gradient"):
        method.loss(draws_of(method, batch(1)))


# --- what is drawn, and when ---


def test_everything_is_drawn_once_a_batch():
    """The window too: micro-batches share it."""
    method = dataclasses.replace(method_on(toy(), RandomCut()), minibatch=5)
    spans = []
    for number in range(8):
        (update,) = method.experience(batch(2, number))
        draws = list(update)
        assert [len(part.rows) for part in draws] == [5, 5, 5, 1] and len({part.span for part in draws}) == 1
        assert torch.equal(torch.cat([part.rows for part in draws]), torch.arange(16))
        assert torch.equal(torch.cat([part.prompts.group for part in draws]), batch(2, number).group)
        assert len(torch.cat([part.seeds for part in draws]).unique()) == 16
        spans.append(draws[0].span)
    assert len(set(spans)) > 2


def test_columns_and_prompts_reach_the_reward_in_their_slices():
    asked = []

    class Columns(Off):
        def __call__(self, samples, prompts, **columns):
            asked.extend(zip(prompts, columns["number"], strict=True))
            return super().__call__(samples, prompts)

    method = dataclasses.replace(method_on(toy(), LastK(1), Columns()), minibatch=3)
    prompts = Prompts(PROMPTS, torch.arange(8), {"number": list(range(8))})
    for update in method.experience(prompts):
        for draws in update:
            method.loss(draws)
    assert asked == list(zip(PROMPTS, range(8), strict=True))


def test_a_loss_is_the_same_whenever_it_is_asked_for():
    method = method_on(toy(), LowVariance(1))
    draws = draws_of(method, batch(2))
    assert torch.equal(method.loss(draws).total, method.loss(draws).total)


def test_info_is_of_the_whole_batch_after_its_last_slice():
    method = dataclasses.replace(method_on(toy(), LastK(3)), minibatch=3)
    (update,) = method.experience(batch(2))
    for draws in update:
        method.loss(draws)
    assert draws.info["reward_mean"] == pytest.approx(float(draws.rewards.mean()))
    assert draws.info["reward_missing"] == 0 and draws.info["window"] == 3 and draws.rewards.shape == (16,)


# --- windows ---


def drawn(window, steps=20, count=2000):
    generator = seeded()
    return Counter(window(steps, generator) for _ in range(count))


def test_windows_draw_what_they_say():
    assert drawn(LastK(3), count=5) == {Span(17, 20): 5}
    assert drawn(LowVariance(4), count=5) == {Span(19, 20, repeats=4): 5}
    for window, lengths in ((RandomCut(), range(1, 21)), (RandomCut(5), range(1, 6))):
        found = drawn(window)
        assert set(found) == {Span(20 - k, 20) for k in lengths}
        assert min(found.values()) > 0.6 * 2000 / len(lengths)  # uniform
    found = drawn(OneStep(0.75, 1.0))
    assert set(found) == {Span(place, place + 1, jump=True) for place in range(15, 20)}
    assert min(found.values()) > 0.8 * 400


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_one_step_stays_in_short_chains(steps):
    assert all(0 <= span.first < span.last <= steps for span in drawn(OneStep(0.9, 1.0), steps, 50))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (draft.Settings(k=21), "k is 21; wanted 1 to 20, the number of sampling steps"),
        (draft.Settings(k=0), "k is 0"),
        (draft.Settings(k=2, repeats=1), "repeats is 1 and k 2"),
        (alignprop.Settings(longest=50), "longest is 50; wanted 1 to 20"),
        (alignprop.Settings(eta=1.5), "eta is 1.5"),
        (alignprop.Settings(kl_weight=-1.0), "kl_weight -1.0"),
        (refl.Settings(low=0.9, high=0.2), "low is 0.9 and high 0.2; wanted 0 <= low < high <= 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(settings, says):
    with pytest.raises(ValueError, match=says):
        settings.check()


def test_settings_build_the_published_methods():
    eps, flow = toy(), toy("flow")
    built = [kind.Settings().build(eps, Off(), seeded()) for kind in (alignprop, draft, refl)]
    assert [method.window for method in built] == [RandomCut(), LastK(1), OneStep(0.75, 1.0)]
    assert [method.policy.kernel for method in built] == [DDIM(1.0), DDIM(0.0), DDIM(0.0)]
    assert alignprop.Settings().build(flow, Off(), seeded()).policy.kernel == EulerODE()
    assert draft.Settings(repeats=2).build(eps, Off(), seeded()).window == LowVariance(2)


# --- DRaFT+ ---


def after_draft_plus(kl_weight: float, lr: float, steps: int) -> Tensor:
    """The mean that DRaFT+ (K = 1, no noise) moves N(0, 0.25 I) to."""
    model = GaussianPolicy(["here"], torch.zeros(1, 2))
    method = AlignProp(Policy(model, DDIM(0.0), 10), Line(), LastK(1), kl_weight=kl_weight, generator=seeded())
    work = [PromptSet(["here"]).batch([0], 4)] * steps
    train(method, work, torch.optim.SGD(model.parameters(), lr=lr), steps=steps, max_norm=0)
    return model.means.detach()[0]


def test_draft_plus_converges_to_a_shift_of_one_over_its_weight_and_draft_runs_away():
    """In closed form: with V = alpha^2 std^2 + sigma^2, the last move's x0 moves by c = 1 - alpha^2 std^2 / V times the
    shift of the mean and its eps by -sigma alpha / V times, so that reward minus penalty is greatest at shift = D c
    direction / (weight (sigma alpha / V)^2). The penalty is on eps; it is not the KL of the chain."""
    model = GaussianPolicy(["here"], torch.zeros(1, 2))
    t = model.grid(10)[-2:-1]
    at, st = model.schedule.alpha(t).double(), model.schedule.sigma(t).double()
    total = (at * model.std) ** 2 + st**2
    adds, stiffness = 1 - (at * model.std) ** 2 / total, (st * at / total) ** 2 / 2
    for weight in (0.3, 1.0, 3.0, 10.0):
        wanted = adds * Line.direction.double() / (weight * stiffness)
        shift = after_draft_plus(weight, lr=float(0.9 / (weight * stiffness)), steps=12)
        torch.testing.assert_close(shift.double(), wanted, rtol=1e-3, atol=1e-4 * float(wanted.norm()))
    few, many = (after_draft_plus(0.0, 1.0, steps) for steps in (5, 50))
    torch.testing.assert_close(many, 10 * few)
