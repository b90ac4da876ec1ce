"""The loop on methods of a few lines: what divides, what clips, what is skipped, what hooks see and when."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from tropism.base import Loss, Prompts
from tropism.train import NonFinite, NothingToLearn, check_finite, train, update


def prompts(count=2, number=0) -> Prompts:
    return Prompts(["a"] * count, torch.zeros(count, dtype=torch.int64), {"number": [number] * count})


class Script:
    """A method that replays: each batch is a list of updates, each a list of (gradient of w, weight) minibatches."""

    def __init__(self, *batches, events=None):
        self.w, self.batches, self.seen = nn.Parameter(torch.zeros(2)), list(batches), []
        self.events = [] if events is None else events

    def experience(self, batch) -> Iterator[Iterator[tuple]]:
        self.seen.append(batch.columns["number"][0])
        for minibatches in self.batches.pop(0):
            yield iter(minibatches)

    def loss(self, minibatch) -> Loss:
        gradient, weight = minibatch
        self.events.append("loss")
        value = torch.tensor(float(weight))
        return Loss((self.w * torch.tensor(gradient)).sum(), value, {"first": torch.tensor(gradient[0])})

    def after_step(self):
        self.events.append("moved")


def sgd(method, **options):
    return torch.optim.SGD([method.w], lr=1.0, **options)


def run(method, optimizer=None, batches=None, steps=None, **options):
    seen = []
    batches = [prompts(number=n) for n in range(len(method.batches))] if batches is None else batches
    steps = len(batches) if steps is None else steps
    train(method, batches, optimizer or sgd(method), steps=steps, hooks=[seen.append], **options)
    return seen


# --- dividing ---


def test_gradients_are_divided_once_by_the_summed_weight():
    """Not minibatch by minibatch: (4 + 2) / (1 + 3), where means of means would be 4 / 1 / 2 + 2 / 3 / 2."""
    method = Script([[([4.0, 0.0], 1), ([2.0, 0.0], 3)]])
    run(method, max_norm=0)
    assert method.w.tolist() == [-1.5, 0.0]


def test_an_update_ends_with_its_minibatches():
    method = Script([[([1.0, 0.0], 1)], [([0.0, 2.0], 4), ([0.0, 2.0], 4)]])
    (step,) = run(method, max_norm=0)
    assert method.w.tolist() == [-1.0, -0.5] and step.metrics["updates"] == 2


def test_minibatches_are_made_when_they_are_needed():
    """After the step before them: what a method yields lazily sees the policy as it is."""
    states = []

    class Lazy(Script):
        def experience(self, batch):
            for _ in range(2):
                yield (states.append(self.w.tolist()) or ([1.0, 0.0], 1) for _ in range(2))

    run(Lazy([]), batches=[prompts()], max_norm=0)
    assert states == [[0.0, 0.0], [0.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]]


# --- clipping ---


@pytest.mark.parametrize(
    ("max_norm", "moved"), [(1.0, [-0.6, -0.8]), (2.0, [-1.2, -1.6]), (10.0, [-3.0, -4.0]), (0, [-3.0, -4.0])]
)
def test_gradients_are_clipped_after_the_division(max_norm, moved):
    method = Script([[([6.0, 8.0], 2)]])
    (step,) = run(method, max_norm=max_norm)
    assert method.w.tolist() == pytest.approx(moved, rel=1e-5)
    assert step.metrics["grad_norm"] == pytest.approx(5)


def test_the_norm_is_of_all_groups_of_parameters_together():
    method = Script([[([3.0, 0.0], 1)]])
    other, unused = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.ones(1))
    plain = method.loss
    method.loss = lambda minibatch: plain(minibatch)._replace(total=plain(minibatch).total + 4 * other.sum())
    optimizer = torch.optim.SGD([{"params": [method.w]}, {"params": [other, unused], "lr": 0.5}], lr=1.0)
    (step,) = run(method, optimizer, max_norm=1.0)
    assert step.metrics["grad_norm"] == pytest.approx(5)
    assert method.w.tolist() == pytest.approx([-0.6, 0]) and other.item() == pytest.approx(-0.4) and unused == 1


# --- steps, hooks, metrics ---


def test_steps_are_numbered_on_from_first_and_no_batch_is_taken_in_vain():
    method = Script(*[[[([1.0, 0.0], 1)]]] * 9)
    stream = (prompts(3, number) for number in range(100, 200))
    seen = run(method, batches=stream, first=3, steps=6)
    assert [step.step for step in seen] == [4, 5, 6] and method.seen == [100, 101, 102]
    assert next(stream).columns["number"][0] == 103
    assert [step.images for step in seen] == [3, 3, 3]
    assert run(method, batches=stream, first=6, steps=6) == [] and next(stream).columns["number"][0] == 104
    assert len(run(method, batches=[prompts(), prompts()], steps=50)) == 2  # the batches may end first


def test_hooks_see_each_finished_batch_in_their_order():
    events = []
    method = Script([[([1.0, 0.0], 1)], [([1.0, 0.0], 1)]], [[([1.0, 0.0], 1)]], events=events)
    hooks = [lambda step: events.append(f"a{step.step}"), lambda step: events.append(f"b{step.step}")]
    train(method, [prompts(), prompts()], sgd(method), steps=2, hooks=hooks)
    assert events == ["loss", "moved", "loss", "moved", "a1", "b1", "loss", "moved", "a2", "b2"]


def test_a_hook_that_stops_leaves_the_batch_finished():
    method = Script([[([1.0, 0.0], 1)]], [[([1.0, 0.0], 1)]])

    def stop(step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(method, [prompts(), prompts()], sgd(method), steps=2, max_norm=0, hooks=[stop])
    assert method.w.tolist() == [-1.0, 0.0] and len(method.batches) == 1


def test_metrics_are_means_by_weight_and_info_is_as_given():
    class Informed(tuple):
        @property
        def info(self):
            return {"reward_mean": 0.25}

    method = Script([[([2.0, 0.0], 1), ([6.0, 0.0], 3)], [Informed(([-4.0, 0.0], 4))]])
    (step,) = run(method, max_norm=0)
    assert step.metrics["first"] == pytest.approx((2 * 1 + 6 * 3 - 4 * 4) / 8)
    assert step.metrics["reward_mean"] == 0.25
    # The loss is the sum over the count: 0 for the first update (w is 0), -4 x -2 / 4 for the second.
    assert step.metrics["loss"] == pytest.approx((0 * 4 + 2 * 4) / 8)
    assert step.metrics["grad_norm"] == pytest.approx((2 + 1) / 2) and step.seconds >= 0


# --- nothing to learn ---


def test_an_update_that_stands_for_nothing_is_skipped():
    """No step, no weight decay, no moving target, no metrics (which may be NaN) and no gradient left for the next."""
    nothing = [([5.0, 5.0], 0)]
    method = Script([[([1.0, 0.0], 1)], nothing, [], [([0.0, 1.0], 1)]])
    with torch.no_grad():
        method.w += 1
    plain = method.loss
    method.loss = lambda minibatch: plain(minibatch)._replace(
        metrics={"mean": torch.tensor(math.nan if not minibatch[1] else 3.0)}
    )
    (step,) = run(method, sgd(method, weight_decay=0.5), max_norm=0)
    assert step.metrics["updates"] == 2 and step.metrics["mean"] == 3
    assert method.events.count("moved") == 2
    assert method.w.tolist() == [(1 - 1.5) * 0.5, 0.5 - (1 + 0.25)]


def test_a_minibatch_that_stands_for_nothing_changes_no_metric():
    method = Script([[([2.0, 0.0], 2), ([math.nan, 0.0], 0)]])
    plain = method.loss
    method.loss = lambda minibatch: plain(([2.0 if minibatch[1] else 0.0, 0.0], minibatch[1]))._replace(
        metrics={"mean": torch.tensor(minibatch[0][0])}
    )
    (step,) = run(method, max_norm=0)
    assert step.metrics["mean"] == 2 and method.w.tolist() == [-1.0, 0.0]


@pytest.mark.parametrize("updates", [[], [[]], [[], []], [[([1.0, 0.0], 0)]]])
def test_a_batch_that_stands_for_nothing_is_an_error_that_names_its_step(updates):
    method = Script([[([1.0, 0.0], 1)]], updates)
    with pytest.raises(NothingToLearn, match="step 2 has nothing to learn from: every reward is missing, or equal"):
        run(method, sgd(method, weight_decay=0.5), max_norm=0)
    assert method.w.tolist() == [-1.0, 0.0] and method.events.count("moved") == 1


# --- what is not finite ---


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_not_stepped(bad):
    method = Script([[([1.0, 0.0], 1), ([1.0, 0.0], 1)]])
    plain, losses = method.loss, []

    def loss(minibatch):
        losses.append(plain(minibatch))
        return losses[-1] if len(losses) == 1 else losses[-1]._replace(total=losses[-1].total + bad)

    method.loss = loss
    with pytest.raises(NonFinite, match=f"the loss is {bad} at step 1; nothing was stepped"):
        run(method)
    assert method.w.tolist() == [0.0, 0.0] and "moved" not in method.events


@pytest.mark.parametrize("max_norm", [0, 1.0])
def test_a_gradient_that_is_not_finite_is_not_stepped(max_norm):
    """The loss is 0; its gradient, that of a square root at 0, is infinite."""
    method = Script([[([1.0, 0.0], 1)]])
    method.loss = lambda minibatch: Loss(method.w.sum().sqrt(), torch.tensor(1.0), {})
    with pytest.raises(NonFinite, match=r"the gradient norm is (inf|nan) at step 1; nothing was stepped"):
        run(method, torch.optim.AdamW([method.w], lr=1.0), max_norm=max_norm)
    assert method.w.tolist() == [0.0, 0.0]


def test_check_finite_names_what_it_checked():
    check_finite(torch.tensor(1.0), "it", 1)
    with pytest.raises(
        NonFinite, match=r"it is nan at step 7; .*lower the learning rate, or keep the network in float32"
    ):
        check_finite(torch.tensor(math.nan), "it", 7)


# --- several processes ---


class TwoProcesses:
    """Stands in for two processes whose other one holds the same gradients, and a weight of 3."""

    count = 2

    def summed(self, value):
        return value + 3 if value.ndim == 0 else 2 * value


def test_gradients_of_all_processes_are_divided_by_what_they_stand_for_together():
    w = nn.Parameter(torch.zeros(2))
    (w * torch.tensor([2.0, 0.0])).sum().backward()
    norm = update(torch.optim.SGD([w], lr=1.0), [w], torch.tensor(1.0), max_norm=0, step=1, processes=TwoProcesses())
    assert norm == pytest.approx(1) and w.tolist() == [-1.0, 0.0]


def test_a_process_with_nothing_of_its_own_takes_part():
    """Its weight is 0 and it has no gradient yet: the step is that of the others, not a skip."""
    w = nn.Parameter(torch.zeros(2))
    norm = update(torch.optim.SGD([w], lr=1.0), [w], torch.tensor(0.0), max_norm=0, step=1, processes=TwoProcesses())
    assert norm == 0 and w.grad is None
