"""Every method, on the toy: it learns, and an update is what its batch says, however the batch is cut or ordered.

The networks of most checks compute in float64 (``toy(double=True)``), where results that should agree do so to 1e-12;
what remains of float32 is computed row by row and does not depend on how rows are batched.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import itertools
import math
import pkgutil

import pytest
import torch
from distillers import DISTILLED, apart, drawn
from methods import PROMPTS, ROWS, Off, Row, batch, evaluate, fit, weights
from torch import Tensor

import tropism.methods
from tropism.base import Loss, Prompts
from tropism.data.prompts import PromptSet
from tropism.methods.ddpo import DDPO
from tropism.rollout import gather, trainable
from tropism.train import NonFinite, NothingToLearn, train

SAME = 1e-12  # relative; measured: 6e-14
SGD = functools.partial(torch.optim.SGD, lr=1e-3)
rewarded = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
distilled = pytest.mark.parametrize("row", DISTILLED, ids=lambda row: row.name)
each = pytest.mark.parametrize("row", [*ROWS, *DISTILLED], ids=lambda row: row.name)


def built(row: Row, model, reward=None, seed=0):
    return row.build(model, Off() if reward is None else reward, torch.Generator().manual_seed(seed))


def one_step(row: Row, prompts: Prompts, reward=None, **changes) -> Tensor:
    """What one batch changes in the weights of a fresh float64 toy, by plain gradient descent, unclipped."""
    model = row.toy(double=True)
    before = weights(model)
    method = built(row.with_(**changes), model, reward)
    train(method, [prompts], SGD(model.parameters()), steps=1, max_norm=0)
    return weights(model) - before


def distance(a: Tensor, b: Tensor) -> float:
    """Relative to the larger."""
    return float((a - b).norm() / torch.maximum(a.norm(), b.norm()))


def test_every_method_has_a_row():
    modules = [
        importlib.import_module(f"tropism.methods.{m.name}") for m in pkgutil.iter_modules(tropism.methods.__path__)
    ]
    files = {module.__name__ for module in modules if hasattr(module, "Settings")}
    tokens = {"tropism.methods.dd1", "tropism.methods.dd2"}  # test_token_distillation.py asks the same of them
    assert files - tokens == {type(row.settings).__module__ for row in [*ROWS, *DISTILLED]}


@rewarded
def test_learns(row):
    model = row.toy()
    moves = row.few or 10
    before = evaluate(model, Off(), moves=moves)
    fit(row, model, Off(), row.steps)
    after = evaluate(model, Off(), moves=moves)
    assert -0.55 < before < -0.35 and after > row.floor, f"{before:.3f} -> {after:.3f}, wanted {row.floor}"


@distilled
def test_students_learn(row):
    """Below the ceilings, which are below what the untrained student does."""
    model = row.toy()
    untrained, goal = row.build(model, Off(), torch.Generator().manual_seed(0)), row.goal(model)
    start = {moves: apart(drawn(untrained.policy.with_(steps=moves)), goal) for moves, _ in row.ceilings}
    method = fit(row, model, Off(), row.steps)
    assert row.ceilings
    for moves, ceiling in row.ceilings:
        end = apart(drawn(method.policy.with_(steps=moves)), goal)
        assert end < ceiling < start[moves], f"{moves} moves: {start[moves]:.3f} -> {end:.3f}, wanted {ceiling}"
    if row.floor > -math.inf:
        points = drawn(method.policy.with_(steps=row.ceilings[0][0]))
        assert float(Off()(points, PROMPTS * (len(points) // 8)).mean()) > row.floor


def ragged(count: int, parts: int) -> int:
    """The largest minibatch that cuts ``count`` rows into ``parts``, the last one smaller."""
    return max(size for size in range(1, count) if -(-count // size) == parts and count % size)


@each
def test_minibatches_change_nothing(row):
    """All rows at once, two ragged minibatches and four: the same update."""
    row, prompts = row.with_(keep=0.5, minibatch=10_000, updates=1), batch()
    whole = one_step(row, prompts)
    first = next(iter(next(iter(built(row, row.toy()).experience(prompts)))))
    count = len(next(value for value in vars(first).values() if isinstance(value, Tensor)))
    for parts in (2, 4):
        assert distance(one_step(row, prompts, minibatch=ragged(count, parts)), whole) < SAME


@each
def test_sampling_batches_change_nothing(row):
    """How many chains run at once bounds memory and does not change the samples."""
    prompts = batch()
    assert distance(one_step(row, prompts, sample_batch=5), one_step(row, prompts, sample_batch=64)) < SAME


def tensors(value, name="") -> dict[str, Tensor]:
    """Every tensor inside dataclasses and mappings, but for what the method is to write: AlignProp's rewards."""
    if isinstance(value, Tensor):
        return {name: value}
    if dataclasses.is_dataclass(value):
        value = {
            field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.name != "rewards"
        }
    if not isinstance(value, dict):
        return {}
    return dict(itertools.chain(*(tensors(entry, f"{name}.{key}").items() for key, entry in value.items())))


@each
def test_inputs_are_not_changed(row):
    model, prompts = row.toy(), batch()
    prompts = dataclasses.replace(prompts, columns={"note": list(range(len(prompts.text)))})
    as_it_was = copy.deepcopy(prompts)
    method, optimizer = built(row, model), SGD(model.parameters())
    for update in itertools.islice(method.experience(prompts), 6):  # plain gradient descent diverges where it is long
        for minibatch in update:
            stored = tensors(minibatch)
            copies = {name: value.clone() for name, value in stored.items()}
            method.loss(minibatch).total.backward()
            assert len(stored) >= 3 and all(
                torch.equal(stored[name].nan_to_num(99.0), copies[name].nan_to_num(99.0)) for name in stored
            )
        optimizer.step()
        method.after_step()
    assert list(prompts.text) == list(as_it_was.text) and prompts.columns == as_it_was.columns
    assert torch.equal(prompts.group, as_it_was.group)


def interleaved(rounds: int, missing: int) -> Prompts:
    """``rounds`` times all prompts in turn, in eight groups; the images of the last ``missing`` rounds get no score."""
    rows = PromptSet(PROMPTS * rounds).batch(range(8 * rounds), 1)
    gone = [place >= 8 * (rounds - missing) for place in range(8 * rounds)]
    return Prompts(rows.text, torch.arange(8).repeat(rounds), {"missing": gone})


@rewarded
def test_images_without_a_score_are_as_if_they_were_not_there(row):
    """No gradient, no share in any statistic or count: the update is that of the batch without them."""
    with_them = one_step(row, interleaved(6, missing=2), updates=1)
    without = one_step(row, interleaved(4, missing=0), updates=1)
    assert without.norm() > 0 and distance(with_them, without) < SAME


@rewarded
def test_metrics_leave_missing_scores_out(row):
    seen = []
    model = row.toy()
    method = built(row.with_(minibatch=5), model)
    train(method, [interleaved(6, missing=2)], SGD(model.parameters()), steps=1, hooks=[seen.append])
    (step,) = seen
    assert step.metrics["reward_missing"] == 16 and step.images == 48
    assert all(value == value for value in step.metrics.values()), step.metrics
    assert -2 < step.metrics["reward_mean"] < 0 < step.metrics["reward_std"]


@pytest.mark.parametrize("row", [row for row in ROWS if hasattr(row.settings, "clip")], ids=lambda row: row.name)
def test_deterministic_moves_carry_no_gradient(row):
    """DDIM, DanceGRPO's SDE and hops end without noise: those cells are in no table, and their loss would have no
    gradient. Flow-GRPO's chain is random to the end; there the last move is left out by choice."""
    model = row.toy()
    method = built(row, model)
    assert isinstance(method, DDPO)
    rollout = method.rollout(batch())
    assert rollout.mask[:, :-1].all() and rollout.mask[:, -1].any() == (row.name == "flow_grpo")
    _, columns = trainable(rollout, 1.0, method.skip_last)
    last = method.policy.steps - 1
    assert set(columns.tolist()) == set(range(last))
    if row.name == "flow_grpo":
        return
    rows = torch.arange(len(rollout.reward))
    loss = method.loss(gather(rollout, rows, torch.full_like(rows, last), True, {}))
    loss.total.backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


@each
def test_only_the_parameters_change(row):
    model = row.toy()
    x = torch.randn(16, *model.latent_shape, generator=torch.Generator().manual_seed(3))
    t = torch.linspace(0.05, 0.95, 16)
    cond, tokens, null = model.encode(PROMPTS * 2), model.tokens.clone(), model.null()

    def beliefs() -> Tensor:
        with torch.no_grad(), model.reference():
            return torch.cat(list(model.denoiser(x, t, cond)))

    before, parameters = beliefs(), weights(model)
    fit(row, model, Off(), 1)
    assert torch.equal(beliefs(), before) and not torch.equal(weights(model), parameters)
    assert torch.equal(model.tokens, tokens) and torch.equal(model.null()["prompt_embeds"], null["prompt_embeds"])
    assert not model.tokens.requires_grad


@each
def test_one_seed_is_one_result(row):
    results = []
    for seed in (0, 0, 1):
        model = row.toy()
        train(built(row, model, seed=seed), [batch(2), batch(2, number=1)], SGD(model.parameters()), steps=2)
        results.append(weights(model))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


class Flat(Off):
    """The same for all images."""

    name = "flat"

    def __call__(self, samples, prompts, **columns):
        return samples.sum(1) * 0 - 1


class Silent(Off):
    """No score for any image."""

    name = "silent"

    def __call__(self, samples, prompts, **columns):
        return samples.sum(1) * float("nan")


BY_RANK = [row for row in ROWS if hasattr(row.settings, "clip") or hasattr(row.settings, "epochs")]
HOPELESS = [*itertools.product(BY_RANK, [Flat()]), *itertools.product(ROWS, [Silent()])]


@pytest.mark.parametrize(("row", "reward"), HOPELESS, ids=lambda value: getattr(value, "name", ""))
def test_nothing_to_learn_is_said_and_nothing_is_stepped(row, reward):
    """Not even weight decay. A method that follows the reward's gradient cannot tell a flat reward from an optimum."""
    model = row.toy()
    before = weights(model)
    with pytest.raises(NothingToLearn, match="step 1 has nothing to learn from"):
        fit(row, model, reward, 1)
    assert torch.equal(weights(model), before)


@each
def test_a_loss_that_is_not_finite_is_never_stepped(row):
    model = row.toy()
    method, before = built(row, model), weights(model)
    loss = method.loss
    method.loss = lambda minibatch: Loss(loss(minibatch).total * float("nan"), loss(minibatch).weight, {})
    with pytest.raises(NonFinite, match="the loss is nan at step 1"):
        train(method, [batch()], torch.optim.AdamW(model.parameters()), steps=1)
    assert torch.equal(weights(model), before)
