"""An exponential moving average of trainable parameters, and a way to run the model with it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn


class Ema:
    """shadow <- decay * shadow + (1 - decay) * parameter, kept in float32 beside each parameter.

    ``update`` after every optimizer step; inside ``swapped`` the parameters hold the average. The average starts at the
    parameters as they are now, so no bias correction is needed. Raises ValueError for a decay outside [0, 1).
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1); got {decay}; 0.99 to 0.9999 are usual")
        self.decay = decay
        self.updates = 0
        self._parameters = list(parameters)
        if not self._parameters:
            raise ValueError("there are no parameters to average; add an adapter (or train all weights) first")
        self._shadow = [parameter.detach().float().clone() for parameter in self._parameters]
        self._swapped = False

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the parameters. Raises RuntimeError inside ``swapped``."""
        if self._swapped:
            raise RuntimeError("update was called while the parameters hold the average; leave swapped() first")
        for shadow, parameter in zip(self._shadow, self._parameters, strict=True):
            shadow.lerp_(parameter.detach().to(shadow), 1 - self.decay)
        self.updates += 1

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the parameters hold the average; afterwards they are as before, bit by bit. Nesting is allowed."""
        if self._swapped:
            yield
            return
        backup = [parameter.detach().clone() for parameter in self._parameters]
        self._swapped = True
        try:
            self._write(self._shadow)
            yield
        finally:
            self._write(backup)
            self._swapped = False

    @torch.no_grad()
    def _write(self, values: Iterable[Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors only, as safetensors wants: ``updates`` () int64 and ``shadow.<i>`` in parameter order."""
        shadow = {f"shadow.{index}": value.clone() for index, value in enumerate(self._shadow)}
        return {"updates": torch.tensor(self.updates), **shadow}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continues from ``state_dict()``. Raises ValueError, before any change, when entries or shapes differ."""
        own = self.state_dict()
        if set(state) != set(own):
            raise ValueError(
                f"the state has {len(state) - 1} tensors, the average {len(own) - 1}; wanted the same model"
            )
        for name, value in own.items():
            if state[name].shape != value.shape:
                raise ValueError(f"{name} has shape {tuple(state[name].shape)}; wanted {tuple(value.shape)}")
        self.updates = int(state["updates"])
        for index, shadow in enumerate(self._shadow):
            shadow.copy_(state[f"shadow.{index}"])


class Parametrised(Protocol):
    """Something with trainable parameters."""

    def parameters(self) -> list[nn.Parameter]: ...


M = TypeVar("M", bound=Parametrised)


class Twin(Ema, Generic[M]):
    """An average that is a model of its own, so that gradients can flow through it to its inputs.

    ``model`` is a deep copy whose trainable parameters hold the average, in their own format, and are frozen. It costs
    the memory of a second model.
    """

    def __init__(self, model: M, decay: float) -> None:
        super().__init__(model.parameters(), decay)
        self.model = copy.deepcopy(model)
        own = self.model.parameters()
        self._shadow = [parameter.requires_grad_(False).data for parameter in own]  # written in place
