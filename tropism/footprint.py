"""What a network call needs in memory, measured: every tensor that torch makes is counted while it lives.

Calls of one and of two rows give a line, base + rows x slope, for any number of rows. The same works on torch's meta
device, where tensors have shapes and no memory, so that a network can be measured that would not fit.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tropism.base import Cond


class Measurable(Protocol):
    """What is measured of a model."""

    @property
    def device(self) -> torch.device: ...

    @property
    def latent_shape(self) -> tuple[int, ...]: ...

    def net(self, x: Tensor, tau: Tensor, cond: Cond) -> Tensor:
        """(N, ...), (N,), N rows -> (N, ...)."""
        ...

    def decode(self, latents: Tensor) -> Tensor: ...

    def parameters(self) -> list[nn.Parameter]: ...


class Line(NamedTuple):
    """Bytes by rows."""

    base: float
    slope: float

    def at(self, rows: int) -> float:
        """Of so many rows."""
        return self.base + rows * self.slope if rows else 0.0


class Footprint(NamedTuple):
    """Bytes beyond the weights, their gradients and the inputs: the most at one time, or what a graph holds."""

    forward: Line  # the network without a graph
    held: Line  # what its graph holds until the backward pass
    backward: Line  # forward and backward pass
    decode: Line  # of latents, without a graph
    decode_held: Line
    decode_backward: Line


class LiveBytes(TorchDispatchMode):
    """Inside, ``now`` is the size of the storages that were made here and still live, ``peak`` the most it has been."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self._known:
                self._track(storage)
        return result

    def _track(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known[key] = weakref.ref(storage, lambda _: self._forget(key, size))
        self.now += size
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int, size: int) -> None:
        self._known.pop(key, None)
        self.now -= size


@contextmanager
def fused_on_meta() -> Iterator[None]:
    """Inside, attention on the meta device is as fused kernels do it: no matrix of scores is ever whole.

    torch's function is replaced for the time, since a mode of torch does not reach what checkpoints compute again.
    """
    plain = F.scaled_dot_product_attention

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *rest: Any, **named: Any) -> Tensor:
        if q.device.type != "meta":
            return plain(q, k, v, attn_mask, *rest, **named)
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return torch.as_tensor(fused(q, k, v, attn_mask=attn_mask)[0])

    F.scaled_dot_product_attention = attention  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in pytree.tree_leaves(values) if isinstance(value, Tensor)]


def saved_bytes(function: Callable[[], Any], known: Sequence[Tensor] = ()) -> int:
    """Size of the storages that autograd saves in ``function``, each counted once, without those of ``known``."""
    skip = {tensor.untyped_storage()._cdata for tensor in known}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in skip:
            found[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()  # kept until the end, so that no storage is reused
    del result
    return sum(found.values())


class Sizes(NamedTuple):
    """Of one call, in bytes."""

    forward: int
    held: int  # 0 without a graph
    backward: int


def call_sizes(function: Callable[[], Tensor], graph: bool) -> Sizes:
    """Peak of a call; with ``graph`` also what its graph and answer hold, and the peak with the backward pass."""
    with torch.set_grad_enabled(graph), LiveBytes() as live:
        answer = function()
        forward, held = live.peak, live.now
        if not graph:
            return Sizes(forward, 0, 0)
        answer.backward(torch.empty_like(answer))
        return Sizes(forward, held, live.peak)


def measure(model: Measurable, cond: Cond, *, graph_to_noise: bool = False) -> Footprint:
    """Calls the network and the decoder with one and two rows of ``cond`` (one row).

    ``graph_to_noise``: as when a reward is differentiated through a chain, gradients reach the latents. Gradients of
    parameters are afterwards what they were.
    """

    def net(rows: int, graph: bool) -> Sizes:
        x = torch.zeros(rows, *model.latent_shape, device=model.device, requires_grad=graph and graph_to_noise)
        tau = torch.ones(rows, device=model.device)
        repeated = {name: value.repeat(rows, *[1] * (value.ndim - 1)) for name, value in cond.items()}
        return call_sizes(lambda: model.net(x, tau, repeated), graph)

    def decode(rows: int, graph: bool) -> Sizes:
        latents = torch.zeros(rows, *model.latent_shape, device=model.device, requires_grad=graph)
        return call_sizes(lambda: model.decode(latents), graph)

    with ExitStack() as stack:
        stack.enter_context(_with_gradients(model.parameters()))
        if model.device.type == "meta":
            stack.enter_context(fused_on_meta())
        net(1, False)  # what is made at a first call and kept
        plain, train = _lines(net, False), _lines(net, True)
        seen, learnt = _lines(decode, False), _lines(decode, graph_to_noise)
    return Footprint(plain[0], train[1], train[2], seen[0], learnt[1], learnt[2])


def _lines(call: Callable[[int, bool], Sizes], graph: bool) -> list[Line]:
    one, two = call(1, graph), call(2, graph)
    return [Line(2 * a - b, b - a) for a, b in zip(one, two, strict=True)]


@contextmanager
def _with_gradients(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, every parameter has a gradient already, so that a backward pass makes none that stays."""
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient


def weight_bytes(parts: Mapping[str, Any], without: Sequence[Tensor] = ()) -> dict[str, int]:
    """Bytes of parameters and buffers of each network, each storage once, those of ``without`` left out."""
    seen = {id(tensor) for tensor in without}
    found = {}
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            own = [tensor for tensor in (*part.parameters(), *part.buffers()) if id(tensor) not in seen]
            seen |= {id(tensor) for tensor in own}
            found[name] = sum(tensor.nbytes for tensor in own)
    return found
