"""Token models and their one-step students (DD1, DD2), on a Markov chain whose law is known.

These methods do not suit the 2-D toy of ``distillers.py``; what its battery asks of a method is asked here.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import Tensor

from tropism.checkpoint import load_checkpoint, save_checkpoint
from tropism.codebook import flow_to_code, nearest, posterior_mean, score
from tropism.data.prompts import PromptSet
from tropism.distillation import Before
from tropism.distillation.tokens import first_parts, mapped
from tropism.methods import dd1, dd2
from tropism.models.image_tokens import CORNERS, chain_law, chain_model
from tropism.models.toy import ToyTextToImage
from tropism.policy import Policy, run_chains
from tropism.randomness import row_generators, row_seeds
from tropism.samplers import NextPart, NextToken, solver, stochastic_solver
from tropism.train import train
from tropism.transitions import Filled

SAME = 1e-12
SGD = functools.partial(torch.optim.SGD, lr=1e-2)
SMALL = dict(prompts_per_step=64, updates=1, minibatch=1000, sample_batch=1000)
CSD = dict(init_updates=0, fake_updates=1)
ROWS = [
    dd1.Settings(**SMALL),
    dd1.Settings(**SMALL, student_steps=2),
    dd2.Settings(**SMALL, init_updates=1000),
    dd2.Settings(**SMALL, **CSD),
    dd2.Settings(**SMALL, **CSD, student_steps=3),
]
NAMES = ["dd1", "dd1_two", "dd2_init", "dd2", "dd2_three"]
each = pytest.mark.parametrize("settings", ROWS, ids=NAMES)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(double: bool = False):
    model = chain_model(width=32)
    model.train_full()
    if double:
        model._net.double()
        model._trained.dtype = torch.float64
    return model


def built(settings, model, seed: int = 0):
    settings.check()
    return settings.build(model, None, generator(seed))


def prompts(rows: int = 40):
    return PromptSet(["sticky", "loose"]).batch([row % 2 for row in range(rows)], 1)


def weights(model) -> Tensor:
    return torch.cat([value.detach().flatten() for value in model.parameters()])


def one_step(settings, **changes) -> Tensor:
    model = made(double=True)
    before = weights(model)
    method = built(type(settings)(**(vars(settings) | changes)), model)
    train(method, [prompts()], SGD(model.parameters()), steps=1, max_norm=0)
    return weights(model) - before


# Closed forms.


def test_score_is_the_gradient_of_the_log_density():
    codes = torch.randn(7, 3, generator=generator(), dtype=torch.float64)
    log_p = torch.randn(50, 7, generator=generator(1), dtype=torch.float64).log_softmax(1)
    x = torch.randn(50, 3, generator=generator(2), dtype=torch.float64).requires_grad_()
    t = torch.linspace(0.05, 1, 50, dtype=torch.float64)
    square = (x[:, None] - (1 - t)[:, None, None] * codes).square().sum(-1)
    density = (log_p - square / (2 * t[:, None].square())).logsumexp(1)  # but for a constant of t
    (wanted,) = torch.autograd.grad(density.sum(), x)
    assert float((score(x.detach(), t, log_p, codes) - wanted).abs().max()) < 1e-10 * float(wanted.abs().max())


def test_posterior_mean_at_both_ends():
    """Of noise it is the mean of the law, whatever the constant in log p; of a clean code it is that code."""
    log_p = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    far = posterior_mean(torch.randn(5, 2, generator=generator()), torch.ones(5), log_p.expand(5, -1) + 3, CORNERS)
    assert torch.allclose(far, (log_p.exp()[:, None] * CORNERS).sum(0).expand(5, -1), atol=1e-6)
    near = posterior_mean(0.98 * CORNERS, torch.full((4,), 0.02), log_p.expand(4, -1), CORNERS)
    assert torch.allclose(near, CORNERS)


def test_codes_at_the_end_of_the_flow_have_the_law():
    """10,000 noises: within 1 % at every code. The same noise leads to the same code."""
    p = torch.tensor([0.05, 0.15, 0.3, 0.5])
    noise = torch.randn(10_000, 2, generator=generator(3))
    found = flow_to_code(noise, p.log().expand(10_000, -1), CORNERS)
    shares = torch.bincount(found, minlength=4) / 10_000
    assert float((shares - p).abs().max()) < 0.01
    assert torch.equal(found, flow_to_code(noise, p.log().expand(10_000, -1), CORNERS))
    with pytest.raises(ValueError, match="steps is 1; wanted at least 2"):
        flow_to_code(noise, p.log().expand(10_000, -1), CORNERS, 1)


def counts(tokens: Tensor) -> Tensor:
    """(N, 3, 2) codes -> (4, 4, 4) shares."""
    place = (nearest(tokens, CORNERS) * torch.tensor([16, 4, 1])).sum(1)
    return torch.bincount(place, minlength=64).reshape(4, 4, 4) / len(tokens)


def variation(tokens: Tensor, prompt: str) -> float:
    return float((counts(tokens) - chain_law(prompt)).abs().sum() / 2)


# The teacher as a chain.


def test_the_teachers_chain_has_its_law_and_its_probabilities():
    model = made()
    policy = Policy(model, solver(model.denoiser), 3, microbatch=5000)
    assert isinstance(policy.kernel, NextToken)
    cond = model.encode(["sticky"] * 4000)
    chains = run_chains(policy, policy.noise(4000, generator(1)), cond, row_generators(row_seeds(4000, generator(2))))
    assert variation(chains.final, "sticky") < 0.06  # of 4,000 exact draws: about 0.04
    index = nearest(chains.final, CORNERS)
    wanted = chain_law("sticky")[index[:, 0], index[:, 1], index[:, 2]].log()
    assert bool(chains.mask.all()) and torch.allclose(chains.log_prob.sum(1), wanted, atol=1e-5)


def test_a_move_of_another_length_is_refused():
    model = made()
    with pytest.raises(ValueError, match="steps is 2, but this model draws one of 3 tokens a move; wanted 3"):
        model.grid(2)
    with pytest.raises(ValueError, match="not one of 3 tokens"):
        NextToken(CORNERS)(model.denoiser, torch.zeros(1, 3, 2), torch.ones(1), torch.zeros(1), model.null())
    for hops in ("consistency", "jump"):
        with pytest.raises(ValueError, match=f"no {hops} hops: it is distilled by dd1 or dd2"):
            model.few_step(hops, 1)


def test_a_filled_state_is_exact():
    model = made()
    x, time = torch.randn(6, 3, 2, generator=generator()), torch.full((6,), 2 / 3)
    law, _ = NextToken(CORNERS)(model.denoiser, x, time, time - 1 / 3, model.encode(["sticky"] * 6))
    assert isinstance(law, Filled) and law.event_size == 1 and bool(law.is_random.all())
    state = law.sample(generator(1))
    assert torch.equal(state[:, [0, 2]], x[:, [0, 2]]) and torch.isin(state[:, 1], CORNERS).all()
    chances = []
    for code in CORNERS:
        filled = x.clone()
        filled[:, 1] = code
        chances.append(law.log_prob(filled).exp())
    assert torch.allclose(torch.stack(chances).sum(0), torch.ones(6), atol=1e-6)
    assert torch.equal(law.mode[:, 1], CORNERS[nearest(x[:, 0], CORNERS)])
    assert float(law.kl(law).abs().max()) == 0


def test_later_tokens_are_not_seen():
    """Neither by the logits nor by the student: what is said of a position depends on those before it."""
    model = made()
    x, cond = torch.randn(4, 3, 2, generator=generator()), model.encode(["loose"] * 4)
    drawn, t = torch.ones(4, 3, dtype=torch.bool), torch.full((4, 3), 0.7)
    other = x.clone()
    other[:, 2] += 1
    assert torch.equal(model.logits(x, cond), model.logits(other, cond))
    mean, changed = (model.flow(each, drawn, x, t, cond)[0] for each in (x, other))
    assert torch.equal(mean, changed)
    own = model.flow(x, drawn, other, t, cond)[0]
    assert torch.equal(own[:, :2], mean[:, :2]) and not torch.equal(own[:, 2], mean[:, 2])


def test_a_student_keeps_its_parts():
    model = made()
    student = model.few_step("ode", 3)
    policy = Policy(student, solver(student.denoiser), 3)
    assert isinstance(policy.kernel, NextPart)
    x = policy.noise(8, generator())
    moves = [*policy.chain(x, model.encode(["sticky"] * 8))]
    for place, move in enumerate(moves):
        assert torch.equal(move.x_next[:, place + 1 :], x[:, place + 1 :])
        assert torch.equal(move.x_next[:, :place], move.x[:, :place])
        assert torch.isin(move.x_next[:, : place + 1], CORNERS).all()
    drawn = first_parts(500, 3, 3, generator())
    assert {tuple(row) for row in drawn.tolist()} == {(True,) * 3, (False, True, True), (False, False, True)}


def test_mapped_noises_have_the_law():
    model = made()
    teacher = Policy(model, solver(model.denoiser), 3)
    cond = model.encode(["sticky"] * 4000)
    found = mapped(teacher, teacher.noise(4000, generator()), cond, CORNERS, 20)
    assert variation(CORNERS[found], "sticky") < 0.06


def test_the_teacher_of_a_run_is_drawn_with_token_by_token():
    """Also by whoever is given nothing but the model as it was, as evaluation and its divergence are."""
    model = made()
    was = Before(model)
    for kernel in (solver(was.denoiser), stochastic_solver(was.denoiser)):
        assert isinstance(kernel, NextToken) and torch.equal(kernel.codes, CORNERS)
    student = model.few_step("ode", 1)
    assert isinstance(solver(Before(student).denoiser), NextPart)


# What the battery asks of every method.


@each
def test_minibatches_change_nothing(settings):
    whole = one_step(settings)
    for size in (27, 11):
        assert float((one_step(settings, minibatch=size) - whole).norm() / whole.norm()) < SAME
    assert float((one_step(settings, sample_batch=7) - whole).norm() / whole.norm()) < SAME


@each
def test_inputs_are_not_changed_and_only_the_student_learns(settings):
    model = made()
    method, reference = built(settings, model), model.encode(["sticky"] * 4)
    with model.reference():
        before = model.flow(
            torch.zeros(4, 3, 2), torch.zeros(4, 3).bool(), torch.zeros(4, 3, 2), torch.ones(4, 3), reference
        )
    for update in method.experience(prompts()):
        for rows in update:
            stored = copy.deepcopy(rows)
            method.loss(rows).total.backward()
            for name in ("x", "drawn", "times", "eps", "wanted"):
                assert torch.equal(getattr(rows, name), getattr(stored, name))
        assert any(value.grad is not None and value.grad.any() for value in model.parameters())
        if hasattr(method, "fake"):
            assert all(value.grad is None for value in method.fake.parameters)
        method.after_step()
    with model.reference():
        after = model.flow(
            torch.zeros(4, 3, 2), torch.zeros(4, 3).bool(), torch.zeros(4, 3, 2), torch.ones(4, 3), reference
        )
    assert torch.equal(before[0], after[0])


@each
def test_a_run_goes_on_bit_by_bit(settings, tmp_path):
    if isinstance(settings, dd2.Settings) and settings.init_updates:
        settings = type(settings)(**(vars(settings) | {"init_updates": 2}))  # the stages change between the parts
    straight, broken = made(), made()
    one, other = built(settings, straight), built(settings, broken)
    first, second = torch.optim.Adam(straight.parameters(), lr=1e-3), torch.optim.Adam(broken.parameters(), lr=1e-3)
    train(one, [prompts()] * 4, first, steps=4)
    train(other, [prompts()] * 2, second, steps=2)
    folder = save_checkpoint(tmp_path, 2, broken, second, other)
    again = made()
    resumed, third = built(settings, again, seed=9), torch.optim.Adam(again.parameters(), lr=1e-3)
    load_checkpoint(folder, again, third, resumed)
    train(resumed, [prompts()] * 2, third, steps=4, first=2)
    assert torch.equal(weights(straight), weights(again))
    if hasattr(one, "fake"):
        assert all(torch.equal(a, b) for a, b in zip(one.fake.parameters, resumed.fake.parameters, strict=True))


def test_the_step_is_the_difference_of_two_scores():
    """Position by position at times of their own, the prefixes stopped and read as codes by the teacher: in autograd
    nothing else reaches what is said, and nothing at all the fake score."""
    model = made(double=True)
    method = built(ROWS[3], model)
    rows = next(iter(next(iter(method.experience(prompts())))))
    said = model.says(rows.x, rows.drawn, rows.cond).detach().requires_grad_()
    model.says = lambda *_: said
    method.policy = method.policy.with_(model=model)
    method.loss(rows).total.backward()
    t, q = rows.times[:, 0, :, None], said.detach()
    noisy, codes = (1 - t) * q + t * rows.eps[:, 0], CORNERS.double()
    log_p = model.logits(codes[torch.cdist(q, codes).argmin(-1)], rows.cond).log_softmax(-1)
    square = (noisy[:, :, None] - (1 - t)[..., None] * codes).square().sum(-1)
    real = (log_p - square / (2 * t.square())).softmax(-1) @ codes
    fake = method.fake.model.flow(q, torch.zeros_like(rows.drawn), noisy, t[..., 0], rows.cond)[0]
    wanted = (fake - real) / (q - real).abs().flatten(1).mean(1)[:, None, None] / q[0].numel()
    assert torch.allclose(said.grad, wanted.detach(), rtol=1e-6, atol=1e-12)
    assert all(value.grad is None for value in method.fake.parameters)
    assert t.std(1).min() > 0  # every position has its own time


# They learn.


def learnt(settings, steps: int, rate: float = 1e-3) -> float:
    model = made()
    method = built(settings, model)
    batch = PromptSet(["sticky"]).batch([0], 256)
    train(method, [batch] * steps, torch.optim.Adam(model.parameters(), lr=rate, betas=(0.0, 0.99)), steps=steps)
    policy = method.policy.with_(microbatch=10_000)
    noise = policy.noise(10_000, generator(7))
    return variation([*policy.chain(noise, model.encode(["sticky"] * 10_000))][-1].x_next, "sticky")


def test_students_beat_independent_tokens():
    """0.66 is what independent tokens are at, whatever they are trained by."""
    alone = float((torch.full((4, 4, 4), 1 / 64) - chain_law("sticky")).abs().sum() / 2)
    assert abs(alone - 0.66) < 0.01
    shared = dict(updates=1, passes=5, minibatch=256, sample_batch=4096)
    assert learnt(dd2.Settings(**shared, init_updates=200), 120) < 0.6
    assert learnt(dd1.Settings(**shared), 60) < 0.6


@pytest.mark.parametrize("kind", [dd1, dd2])
def test_what_makes_no_sense_is_refused(kind):
    toy = ToyTextToImage.train(1, seed=0)
    with pytest.raises(ValueError, match="distils models that draw image tokens, and this is a ToyTextToImage"):
        kind.Settings().build(toy, None, generator())
    with pytest.raises(ValueError, match="student_steps is 0"):
        kind.Settings(student_steps=0).check()


def test_settings_are_refused_in_one_sentence():
    with pytest.raises(ValueError, match="flow_steps is 1"):
        dd1.Settings(flow_steps=1).check()
    with pytest.raises(ValueError, match="fake_updates 0"):
        dd2.Settings(fake_updates=0).check()
