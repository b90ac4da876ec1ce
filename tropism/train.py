"""The loop: experience, loss, one division, a step. The only file that divides a loss and that knows of processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from tropism.base import Loss, Method
from tropism.processes import ALONE, Processes


class NonFinite(RuntimeError):
    """The loss or a gradient is NaN or infinite; nothing was stepped."""


class NothingToLearn(ValueError):
    """No image of a batch is better or worse than another."""


@dataclass(frozen=True)
class Step:
    """What one batch of experience came to."""

    step: int  # batches finished, from 1
    metrics: Mapping[str, float]
    seconds: float
    images: int  # of this batch, on all processes


Hook = Callable[[Step], None]
Rate = Callable[[int, int], float]
"""rate(batch, from 1, of how many) -> what the learning rate is multiplied by."""


@dataclass
class _Sums:
    """Weighted sums of metrics over the minibatches of one update or one batch."""

    weight: float = 0.0
    values: dict[str, float] = field(default_factory=dict)

    def add(self, loss: Loss) -> None:
        """Nothing where the loss stands for nothing: its metrics may be NaN."""
        weight = float(loss.weight)
        if not weight:
            return
        self.weight += weight
        for name, value in {"loss": loss.total.detach() / weight, **loss.metrics}.items():
            self.values[name] = self.values.get(name, 0.0) + weight * float(value)

    def means(self) -> dict[str, float]:
        return {name: value / max(self.weight, 1e-12) for name, value in self.values.items()}


def check_finite(value: Tensor, what: str, step: int) -> None:
    """Raises NonFinite naming ``what`` when ``value`` has a NaN or an infinity."""
    if not bool(torch.isfinite(value).all()):
        raise NonFinite(
            f"{what} is {float(value)} at step {step}; nothing was stepped and the last checkpoint is good: lower the "
            "learning rate, or keep the network in float32"
        )


def update(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[torch.nn.Parameter],
    weight: Tensor,
    *,
    max_norm: float,
    step: int,
    processes: Processes = ALONE,
) -> float | None:
    """Divides the summed gradients once by the all-reduced weight, clips, checks, steps. Returns the gradient's norm.

    The division is by what every process together stands for, so 1, 2 and 4 processes make the same update. When that
    is nothing, every process skips the update (not even weight decay happens) and the answer is None.
    """
    total = processes.summed(weight.detach())
    if not float(total):
        optimizer.zero_grad(set_to_none=True)
        return None
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if processes.count > 1:
        _sum_gradients(parameters, processes)
    for parameter in parameters:
        assert parameter.grad is not None
        parameter.grad.div_(total.to(parameter.grad))
    norm = clip_grad_norm_(parameters, max_norm if max_norm > 0 else float("inf"))
    check_finite(norm, "the gradient norm", step)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(norm)


def _sum_gradients(parameters: Sequence[torch.nn.Parameter], processes: Processes) -> None:
    """In one exchange; the other processes' gradients are added to those that are there."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    whole = processes.summed(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, part in zip(gradients, whole.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def train(
    method: Method[Any, Any],
    batches: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    first: int = 0,
    max_norm: float = 1.0,
    hooks: Sequence[Hook] = (),
    processes: Processes = ALONE,
    rate: Rate | None = None,
) -> None:
    """Batches of experience ``first`` + 1 to ``steps``; an optimizer step after each update that the method yields.

    ``max_norm`` 0 does not clip. ``rate`` says by what the learning rate is multiplied in a batch. Hooks see
    each finished batch, in order.

    Raises NonFinite, before anything is stepped, on a loss or gradient that is not finite; NothingToLearn when no image
    of a batch is better or worse than another.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, batch in zip(range(first + 1, steps + 1), batches, strict=False):
        started = time.perf_counter()
        if rate is not None:
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * rate(number, steps)
        sums, info, norms = _one_batch(method, batch, optimizer, parameters, max_norm, number, processes)
        metrics = {**_of_all(sums, info, processes), "grad_norm": sum(norms) / len(norms), "updates": float(len(norms))}
        seconds = time.perf_counter() - started
        report = Step(number, metrics, seconds, len(batch.text))
        for hook in hooks:
            hook(report)


def _of_all(sums: _Sums, info: Mapping[str, float], processes: Processes) -> dict[str, float]:
    """The metrics of a batch, each process counting by what its minibatches stand for."""
    if processes.count == 1:
        return {**info, **sums.means()}
    every = processes.every({"weight": sums.weight, "values": sums.values, "info": dict(info)})
    found = _Sums(sum(each["weight"] for each in every))
    for each in every:
        known = {name: each["weight"] * value for name, value in each["info"].items()}
        for name, value in (known | each["values"]).items():
            found.values[name] = found.values.get(name, 0.0) + value
    return found.means()


def _one_batch(
    method: Method[Any, Any],
    batch: Any,
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[torch.nn.Parameter],
    max_norm: float,
    number: int,
    processes: Processes,
) -> tuple[_Sums, dict[str, float], list[float]]:
    sums, info, norms = _Sums(), dict[str, float](), list[float]()
    for minibatches in method.experience(batch):
        weight = torch.zeros((), dtype=torch.float64)
        for minibatch in minibatches:
            loss = method.loss(minibatch)
            check_finite(loss.total.detach(), "the loss", number)
            loss.total.backward()
            sums.add(loss)
            info.update(getattr(minibatch, "info", {}))
            weight += loss.weight.detach().double().cpu()
        norm = update(optimizer, parameters, weight, max_norm=max_norm, step=number, processes=processes)
        if norm is not None:
            norms.append(norm)
            method.after_step()
    if not norms:
        raise NothingToLearn(
            f"step {number} has nothing to learn from: every reward is missing, or equal to the others of its prompt"
        )
    return sums, info, norms
