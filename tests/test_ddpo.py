"""DDPO against gradients in closed form, against an update written out image by image, and against TRL's formulas."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from methods import Off, batch, toy, weights
from policies import Line, all_cells, method_on, seeded
from torch import Tensor
from torch.distributions import Normal

from tropism.credit import group_relative
from tropism.data.prompts import PromptSet
from tropism.methods import dance_grpo, ddpo, flow_grpo
from tropism.methods.ddpo import DDPO, importance, score_function
from tropism.models.toy import GaussianPolicy, ToyTextToImage
from tropism.policy import Policy
from tropism.rollout import Cells
from tropism.samplers import DDIM
from tropism.train import train


class Recorder:
    """An objective that notes the log-ratios it is given."""

    def __init__(self, objective):
        self.objective, self.worst = objective, []

    def __call__(self, now, acting, advantage):
        self.worst.append(float((now - acting).detach().abs().max()))
        return self.objective(now, acting, advantage)


@pytest.fixture
def float64(monkeypatch):
    """The library, which computes laws in float32, computes them in float64."""
    toy()  # is trained before
    monkeypatch.setattr(Tensor, "float", Tensor.double)


# --- the ratio ---


@pytest.mark.parametrize(
    ("settings", "target"),
    [
        (ddpo.Settings(), "eps"),
        (ddpo.Settings(explore_guidance=1.0, explore_weights=(0.6, 1.4), explore_probability=0.7), "eps"),
        (flow_grpo.Settings(), "flow"),
        (dance_grpo.Settings(), "flow"),
        (dance_grpo.Settings(), "eps"),
    ],
    ids=["ddpo", "diffexp", "flow_grpo", "dance_flow", "dance_eps"],
)
def test_the_ratio_is_one_before_the_first_update_of_every_rollout_and_not_after(settings, target):
    """In float32, exactly, where minibatches mix images and times that were never in one pass while sampling."""
    model = toy(target)
    settings = dataclasses.replace(settings, inference_steps=10, sample_batch=16, minibatch=48, updates=2)
    method = settings.build(model, Off(), seeded())
    method.objective = recorder = Recorder(method.objective)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for number in range(3):
        recorder.worst.clear()
        train(method, [batch(8, number)], optimizer, steps=1)
        half = len(recorder.worst) // 2
        assert max(recorder.worst[:half]) == 0.0
        assert min(recorder.worst[half:]) > 1e-3


@pytest.mark.parametrize("minibatch", [1, 3, 1000])
def test_the_ratio_is_one_however_rows_are_batched(minibatch):
    """One row takes another matrix kernel than many: in float32 that shows; with the network in float64 it cannot."""
    for double, tolerance in ((False, 5e-5), (True, 2e-7)):
        method = method_on(toy(double=double), minibatch=minibatch)
        method.objective = recorder = Recorder(method.objective)
        for minibatches in method.experience(batch(1)):
            for cells in minibatches:
                method.loss(cells)
        assert max(recorder.worst) <= tolerance


def test_training_under_another_guidance_than_sampling_is_refused():
    method = method_on(toy())
    (minibatches,) = method.experience(batch(1))
    (cells,) = list(minibatches)
    method.policy = method.policy.with_(guidance=2.5)
    with pytest.raises(RuntimeError, match=r"log-ratio to the acting policy is \d.* before the first update, wanted 0"):
        method.loss(cells)
    method.loss(dataclasses.replace(cells, on_policy=False))  # after an update it is nobody's fault


def test_the_check_ends_with_the_first_update_and_comes_back_with_the_next_rollout():
    model = toy()
    method = method_on(model, updates=2, inner_epochs=2)
    flags = []
    for number in (0, 1):
        for minibatches in method.experience(batch(1, number)):
            flags.append({cells.on_policy for cells in minibatches})
            method.after_step()
    assert flags == [{True}, {False}, {False}, {False}] * 2


# --- gradients in closed form ---

MEANS = torch.tensor([[0.5, -1.0], [-0.3, 0.8]])
NAMES = ["left", "right"]


def law(model: GaussianPolicy, x: Tensor, t: Tensor, s: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The ancestral move of N(mean, std^2 I), in float64: its mean (N, 2), its std (N,), and d mean / d parameter (N,).

    q(x_s | x_t, x_0) averaged over what the model believes of x_0, so everything is linear in ``mean``.
    """
    at, st, as_, ss = (f(u).double() for u in (t, s) for f in (model.schedule.alpha, model.schedule.sigma))
    total = (at * model.std) ** 2 + st**2
    std = (ss / st) * (st**2 - (at / as_ * ss) ** 2).sqrt()  # 0 at the clean end
    along = (ss**2 - std**2).sqrt()
    slope = as_ * (1 - at**2 * model.std**2 / total) - along * st * at / total
    residual = (x.double() - at[:, None] * mean) / total[:, None]
    x0, eps = mean + (at * model.std**2)[:, None] * residual, st[:, None] * residual
    return as_[:, None] * x0 + along[:, None] * eps, std, slope


def gaussian_rollout(objective, count=6, steps=5, per_dimension=True, **fields):
    model = GaussianPolicy(NAMES, MEANS)
    method = DDPO(
        Policy(model, DDIM(1.0), steps), Line(), group_relative, objective, per_dimension=per_dimension, **fields
    )
    method.generator = seeded()
    prompts = PromptSet(NAMES).batch([0, 1], count)
    return model, method, method.rollout(prompts), (torch.arange(2)).repeat_interleave(count)


@pytest.mark.parametrize("objective", [score_function, importance(1e-4)], ids=["sf", "is"])
@pytest.mark.parametrize("per_dimension", [True, False])
def test_the_gradient_is_the_policy_gradient(objective, per_dimension):
    """Both objectives, at ratio 1, of one rollout: minus the sum of A d log p / d mean, written out."""
    model, method, rollout, label = gaussian_rollout(objective, per_dimension=per_dimension)
    cells = all_cells(method, rollout)
    loss = method.loss(cells)
    loss.total.backward()
    row = rollout.mask.nonzero(as_tuple=True)[0]
    mean, std, slope = law(model, cells.x, cells.t, cells.s, MEANS.double()[label[row]])
    force = cells.advantage.double() * slope / std**2 / (2 if per_dimension else 1)
    wanted = torch.zeros(2, 2, dtype=torch.float64)
    wanted.index_add_(0, label[row], -force[:, None] * (cells.x_next.double() - mean))
    assert loss.weight == len(row) == 2 * 6 * 4
    torch.testing.assert_close(model.means.grad.double(), wanted, rtol=2e-5, atol=2e-5 * float(wanted.abs().max()))


def test_the_expected_gradient_is_that_of_the_expected_reward():
    """E[r d log p], summed over moves, is d E[r] / d mean, which a chain of linear Gaussians has in closed form."""
    count, steps = 200_000, 4
    model = GaussianPolicy(NAMES[:1], MEANS[:1])
    method = DDPO(Policy(model, DDIM(1.0), steps), Line(), objective=score_function, per_dimension=False)
    cond = model.encode(NAMES[:1] * count)
    with torch.no_grad():
        moves = list(method.policy.chain(torch.randn(count, 2, generator=seeded()), cond, seeded(1)))
    reward = Line()(moves[-1].x_next, ())
    for x, t, s, transition, _, x_next in moves[:-1]:
        log_prob = transition.log_prob(x_next)
        method.loss(Cells(x, t, s, x_next, log_prob, reward - reward.mean(), cond, False)).total.backward()
    # From E[x] = 0, E[x_next] = keep E[x] + slope mean. The last move has no log-probability: no slope of its own.
    drift = torch.zeros(1, dtype=torch.float64)
    for place, (t, s) in enumerate(itertools.pairwise(method.policy.ts)):
        keep, _, slope = law(model, torch.ones(1, 1), t[None], s[None], torch.zeros(1, 1).double())
        drift = drift * keep[0] + (slope if place < steps - 1 else 0)
    wanted = -drift * Line.direction.double()
    got = model.means.grad[0].double() / count  # each entry within 0.8 % of the norm (one standard error)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0.04 * float(wanted.norm()))
    assert drift.item() > 0.5


def test_log_probabilities_are_exact_sums_and_per_dimension_divides_them():
    _, method, rollout, _ = gaussian_rollout(importance())
    model, label = method.policy.model, torch.arange(2).repeat_interleave(6)
    rows, columns = rollout.mask.nonzero(as_tuple=True)
    x, after = rollout.xs[rows, columns], rollout.xs[rows, columns + 1]
    mean, std, _ = law(model, x, rollout.ts[columns], rollout.ts[columns + 1], MEANS.double()[label[rows]])
    wanted = Normal(mean, std[:, None].expand(-1, 2)).log_prob(after.double()).sum(1)
    torch.testing.assert_close(rollout.log_prob[rows, columns].double(), wanted, rtol=2e-5, atol=2e-5)
    cells = dataclasses.replace(all_cells(method, rollout), log_prob=torch.zeros(len(rows)), on_policy=False)
    seen = {}
    for per_dimension in (True, False):
        method.per_dimension = per_dimension
        method.objective = lambda now, acting, advantage: seen.setdefault(method.per_dimension, now)
        method.loss(cells)
    assert torch.equal(seen[True] * 2, seen[False])


def test_kl_is_nothing_at_the_start_and_that_of_gaussians_after_a_shift():
    model, method, rollout, label = gaussian_rollout(score_function, kl_weight=0.7)
    cells = all_cells(method, rollout, on_policy=False)
    assert method.loss(cells).metrics["kl"] == 0
    shift = torch.tensor([[0.3, -0.2], [0.05, 0.4]])
    with torch.no_grad():
        model.means += shift
    loss, plain = method.loss(cells), dataclasses.replace(method, kl_weight=0.0).loss(cells)
    rows = rollout.mask.nonzero(as_tuple=True)[0]
    _, std, slope = law(model, cells.x, cells.t, cells.s, MEANS.double()[label[rows]])
    wanted = (slope / std) ** 2 * shift.double()[label[rows]].square().sum(1) / 2 / 2  # of two dimensions
    assert loss.metrics["kl"].item() == pytest.approx(float(wanted.mean()), rel=1e-4)
    assert (loss.total - plain.total).item() == pytest.approx(0.7 * float(wanted.sum()), rel=1e-3)


# --- the whole update ---


def reference_update(model: ToyTextToImage, rollout, epochs: int, lr: float, clip: float, kl_weight: float) -> None:
    """DDPO-IS on stored chains, one image and one move at a time; guidance 2, clipped ratios of mean log-probabilities,
    the exact KL, gradients clipped to norm 1, plain descent."""
    rewards = rollout.reward.double()
    advantages = ((rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-6)).clamp(-5, 5)
    images, moves = rollout.mask.shape
    frozen = toy(double=True)
    null = model.null()["prompt_embeds"][0]

    def move_law(net, x, t, s, embeds):
        number = model.schedule.net_time(t[None])
        both = net(torch.stack([x, x]).double(), number.expand(2), {"prompt_embeds": torch.stack([embeds, null])})
        eps = both[1] + 2.0 * (both[0] - both[1])
        at, as_ = (model.schedule.alphas_cumprod[round(1000 * float(u)) - 1].item() for u in (t, s))
        variance = (1 - as_) / (1 - at) * (1 - at / as_)
        x0 = (x.double() - math.sqrt(1 - at) * eps) / math.sqrt(at)
        return Normal(math.sqrt(as_) * x0 + math.sqrt(1 - as_ - variance) * eps, math.sqrt(variance))

    with torch.no_grad():
        acting = {
            (i, k): move_law(frozen.net, rollout.xs[i, k], rollout.ts[k], rollout.ts[k + 1], embeds)
            for i, embeds in enumerate(rollout.cond["prompt_embeds"])
            for k in range(moves - 1)
        }
    for _ in range(epochs):
        total = 0.0
        for i, embeds in enumerate(rollout.cond["prompt_embeds"]):
            for k in range(moves - 1):
                now = move_law(model.net, rollout.xs[i, k], rollout.ts[k], rollout.ts[k + 1], embeds)
                after = rollout.xs[i, k + 1].double()
                ratio = (now.log_prob(after).mean() - acting[i, k].log_prob(after).mean()).exp()
                worst = min(ratio * advantages[i], ratio.clamp(1 - clip, 1 + clip) * advantages[i])
                kl = torch.distributions.kl_divergence(now, acting[i, k]).mean()
                total = total - worst + kl_weight * kl
        loss = total / (images * (moves - 1))
        used = list(model.net.layers.parameters())  # all but those for cond[END], which nobody tells
        gradients = torch.autograd.grad(loss, used)
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        with torch.no_grad():
            for parameter, gradient in zip(used, gradients, strict=True):
                parameter -= lr * gradient * min(1.0, 1.0 / float(norm))


def test_the_update_is_the_one_written_out(float64):
    """Two passes over a rollout: the second one has ratios other than 1, some of them beyond the clip range."""
    lr, clip, kl_weight, prompts = 1e-3, 1e-4, 0.1, batch(1)
    ours, theirs = toy(double=True), toy(double=True)
    options = dict(inference_steps=4, inner_epochs=2, clip=clip, kl_weight=kl_weight, minibatch=7)
    rollout = method_on(ours, **options).rollout(prompts)
    start, seen = weights(ours), []
    train(
        method_on(ours, **options), [prompts], torch.optim.SGD(ours.parameters(), lr=lr), steps=1, hooks=[seen.append]
    )
    reference_update(theirs, rollout, 2, lr, clip, kl_weight)
    change, wanted = weights(ours) - start, weights(theirs) - start
    assert seen[0].metrics["updates"] == 2 and seen[0].metrics["ratio_max"] > 1 + 2 * clip
    assert (change - wanted).norm() < 1e-6 * wanted.norm(), ((change - wanted).norm() / wanted.norm()).item()


def test_log_probabilities_and_loss_are_trls(float64):
    """TRL 0.11.4: ``scheduler_step`` of models/modeling_sd_base.py, ``calculate_loss`` and ``loss`` of
    trainer/ddpo_trainer.py, their formulas on the same states. Their loss is a mean, ours a sum and its count."""
    model, clip = toy(double=True), 1e-3
    method = method_on(model, clip=clip)
    rollout = method.rollout(batch(2))
    cells = dataclasses.replace(all_cells(method, rollout), on_policy=False)
    method.loss(cells).total.backward()
    torch.optim.SGD(model.parameters(), lr=2e-6).step()

    alpha_prod = model.schedule.alphas_cumprod.double()
    at, before = (alpha_prod[(1000 * u).round().long() - 1][:, None] for u in (cells.t, cells.s))
    x, after = cells.x.double(), cells.x_next.double()
    with torch.no_grad():
        noise = method.policy.denoiser(cells.x, cells.t, cells.cond).eps
    clean = (x - (1 - at) ** 0.5 * noise) / at**0.5
    std = ((1 - before) / (1 - at) * (1 - at / before)) ** 0.5
    mean = before**0.5 * clean + (1 - before - std**2) ** 0.5 * noise
    terms = -((after - mean) ** 2) / (2 * std**2) - std.log() - torch.tensor(2 * math.pi).sqrt().log()
    log_prob, acting, advantage = terms.mean(1), cells.log_prob / 2, cells.advantage.double().clamp(-5, 5)
    ratio = (log_prob - acting).exp()
    wanted = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)).mean()

    seen, objective = [], method.objective
    method.objective = lambda now, *rest: (seen.append(now.detach()), objective(now, *rest))[1]
    loss = method.loss(cells)
    torch.testing.assert_close(seen[0], log_prob, rtol=1e-6, atol=1e-6)
    assert 0.1 < float(((ratio - 1).abs() > clip).double().mean()) < 0.9
    assert (loss.total / loss.weight).item() == pytest.approx(float(wanted), rel=1e-6)
    assert loss.metrics["approx_kl"].item() == pytest.approx(0.5 * float((log_prob - acting).square().mean()), rel=1e-4)
