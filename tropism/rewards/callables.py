"""A plain callable is a reward.

Two shapes are in use and both are understood from the names in the signature:

- ``f(images, prompts, metadata) -> (scores, info)``: TRL's DDPO and AlignProp, kvablack/ddpo-pytorch, flow_grpo.
  ``metadata`` is a list of B dicts, one a sample, made from the columns.
- ``f(prompts, completions, **columns) -> scores``: TRL's GRPO. Every column comes as a keyword. May be ``async``.

Anything between works too: ``f(images)``, ``f(images, prompts)``, ``f(prompts, images, answer)``. The rules are in
``signatures``.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from tropism.base import Reward

from .scores import RewardError, Scores, to_values
from .signatures import arguments, parameters


def as_reward(function: Callable[..., Any], name: str | None = None, differentiable: bool | None = None) -> Reward:
    """``function`` as a reward; what already is one comes back as it is.

    Args:
        function: of any shape named at the top of this file, or an ``nn.Module`` (its ``forward`` is read).
        name: for logs and errors; the callable's own name by default.
        differentiable: True promises gradients to the samples and is checked on every call, False drops any graph,
            None keeps the graph that is there. The attribute is True only after a promise; ``probed`` makes one.

    Raises:
        RewardError: not a callable, or its signature does not say what it takes.
    """
    if name is None and differentiable is None and isinstance(function, Reward):
        return function
    return ScoredReward(function, name or _name(function), differentiable)


class ScoredReward:
    """A callable with the manners of a reward. See ``as_reward``; nothing is kept between calls."""

    def __init__(self, function: Callable[..., Any], name: str, differentiable: bool | None = None) -> None:
        self.name = name
        self.declared = differentiable
        self.differentiable = differentiable is True
        self._function = function
        self._parameters = parameters(function, name)

    def __call__(self, samples: Any, prompts: Sequence[str], **columns: Any) -> Tensor:
        """B samples, B prompts and columns of B values -> (B,) float32, on the samples' device. Raises RewardError."""
        return self.score(samples, prompts, **columns).values

    def score(self, samples: Any, prompts: Sequence[str], **columns: Any) -> Scores:
        """As ``__call__``, with the info mapping of a callable that returns ``(scores, info)``."""
        self._check_lengths(samples, prompts, columns)
        args, kwargs = arguments(self._parameters, samples, prompts, columns, self.name)
        raw, info = _split(self._run(args, kwargs))
        device = samples.device if isinstance(samples, Tensor) else None
        return Scores(self._graph(to_values(raw, len(prompts), f"reward '{self.name}'", device), samples), info)

    def probed(self, samples: Tensor, prompts: Sequence[str], **columns: Any) -> ScoredReward:
        """The same reward with ``differentiable`` found out: whether its scores of ``samples`` have a graph."""
        with torch.enable_grad():
            inputs = samples.detach().clone().requires_grad_()
            values = ScoredReward(self._function, self.name)(inputs, prompts, **columns)
        return ScoredReward(self._function, self.name, values.requires_grad)

    def _check_lengths(self, samples: Any, prompts: Sequence[str], columns: Mapping[str, Any]) -> None:
        for what, values in [("samples", samples), *((f"column '{key}'", value) for key, value in columns.items())]:
            got = len(values) if hasattr(values, "__len__") else None
            if got != len(prompts):
                found = f"{got} values" if got is not None else f"a {type(values).__name__}"
                raise RewardError(f"reward '{self.name}' got {found} as {what} for {len(prompts)} prompts")

    def _run(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        try:
            result = self._function(*args, **kwargs)
            return _wait(result) if inspect.isawaitable(result) else result
        except Exception as cause:
            said = str(cause).strip().split("\n")[0]
            raise RewardError(f"reward '{self.name}' raised {type(cause).__name__}: {said or 'no message'}") from cause

    def _graph(self, values: Tensor, samples: Any) -> Tensor:
        """Scores keep a graph only towards samples that ask for one."""
        wanted = isinstance(samples, Tensor) and samples.requires_grad and torch.is_grad_enabled()
        if not wanted or self.declared is False:
            return values.detach()
        if self.declared and not values.requires_grad:
            raise RewardError(
                f"reward '{self.name}' is declared differentiable but its scores have no graph; "
                "compute them from the samples with torch operations only"
            )
        return values


def _name(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "name", None) or getattr(function, "__name__", None)
    return name if isinstance(name, str) else type(function).__name__


def _split(result: Any) -> tuple[Any, Mapping[str, Any]]:
    """``(scores, info)`` taken apart; two scores in a tuple are not taken for one."""
    if isinstance(result, tuple) and len(result) == 2:
        scores, info = result
        if isinstance(info, Mapping):
            return scores, info
        if info is None and hasattr(scores, "__len__"):
            return scores, {}
    return result, {}


def _wait(awaitable: Awaitable[Any]) -> Any:
    """The value of an awaitable, also where a loop already runs (notebooks); the gradient mode goes along."""
    gradients = torch.is_grad_enabled()

    async def wait() -> Any:
        with torch.set_grad_enabled(gradients):
            return await awaitable

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait())
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, wait()).result()
