"""A twin of a network that computes the same in less time on a CPU, in float32, with or without a LoRA.

The twin is a copy of the module tree that shares every tensor; nothing of the original is touched. In it

- linear layers are oneDNN's matrix products, the library that already does torch's convolutions. torch gives float32
  linear layers to MKL, which takes its AVX2 path on a processor that is not Intel's, at half the speed of AVX-512;
- a LoRA is folded: x (W + s B A)^T is one product and keeps only x for the backward pass, where PEFT makes two thin
  products more and passes over the output twice;
- a frozen feed-forward gate keeps its two halves apart, so that without a graph GELU and the product with it happen
  inside the matrix products, and with one GELU is computed again in the backward pass instead of being kept.

Results differ from the original's by float32 rounding. Backward passes are first-order only, and there is no
forward-mode derivative: use the original network for those.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def twin_pays(net: nn.Module) -> bool:
    """Whether a twin of ``net`` is faster here: float32 on an AVX-512 processor, with oneDNN in this torch."""
    first = next(net.parameters())
    return (
        first.device.type == "cpu"
        and all(parameter.dtype == torch.float32 for parameter in net.parameters())
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def twin(net: nn.Module) -> nn.Module:
    """The twin of ``net``. Tensors and hooks are shared, now and later; flags and processors are those of now."""
    copied = copy.copy(net)
    copied._modules = {name: None if child is None else _twin_of(child) for name, child in net._modules.items()}
    return copied


def _twin_of(child: nn.Module) -> nn.Module:
    if isinstance(child, nn.Linear | LoraLayer) and _linear_of(child) is not None:
        return Linear(child)
    if isinstance(child, GEGLU) and type(child.proj) is nn.Linear:
        return Gate(child.proj)
    return twin(child)


def _linear_of(layer: nn.Module) -> nn.Linear | None:
    """The plain linear layer that ``layer`` is, or that its plain LoRA adapts; None for anything else."""
    base: Any = layer.base_layer if isinstance(layer, LoraLayer) else layer
    if type(base) is not nn.Linear:
        return None
    if isinstance(layer, LoraLayer):
        plain = len(layer.lora_A) == 1 and not any(layer.use_dora.values()) and not any(layer.lora_bias.values())
        dropped = any(not isinstance(dropout, nn.Identity) for dropout in layer.lora_dropout.values())
        if not plain or dropped:
            return None
    return base


class Linear(nn.Module):
    """A linear layer, or one with a LoRA, of the original network, which is read at every call."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer: tuple[Any] = (layer,)  # in a tuple: not a submodule, its parameters are the original's

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (..., in) -> (..., out)."""
        layer = self._layer[0]
        if not isinstance(layer, LoraLayer):
            return linear(x, layer.weight, layer.bias)
        base: Any = layer.base_layer
        if layer.disable_adapters or layer.merged:
            return linear(x, base.weight, base.bias)
        (name,) = layer.lora_A
        a, b, scale = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
        answer: Tensor = _Lora.apply(x, base.weight, base.bias, a, b, scale)  # type: ignore[no-untyped-call]
        return answer


class Gate(nn.Module):
    """GEGLU: (x W^T) GELU(x V^T), with W above V in one layer of the original network."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self._layer = (layer,)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (..., in) -> (..., out / 2)."""
        layer = self._layer[0]
        if layer.weight.requires_grad:
            value_weight, gate_weight, value_bias, gate_bias = _halves(layer.weight, layer.bias)
            return linear(x, value_weight, value_bias) * F.gelu(linear(x, gate_weight, gate_bias))
        answer: Tensor = _Gate.apply(x, layer.weight, layer.bias)  # type: ignore[no-untyped-call]
        return answer


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias: x (..., in), weight (out, in), bias (out,)."""
    answer: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return answer


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None, then: str = "none") -> Tensor:
    algorithm = "none" if then == "gelu" else ""
    answer: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, then, [], algorithm)
    return answer


def _product_with(x: Tensor, other: Tensor, weight: Tensor, bias: Tensor | None, operation: str) -> Tensor:
    """x W^T + bias, then "add" or "mul" with ``other`` of the same shape."""
    answer: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, bias, operation)
    return answer


def _halves(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Rows of the value, rows of the gate, and their biases."""
    value_bias, gate_bias = (None, None) if bias is None else bias.chunk(2)
    value, gate = weight.chunk(2)
    return value, gate, value_bias, gate_bias


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, x if ctx.needs_input_grad[1] else None)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        weight, x = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        above = _rows(grads[0])
        return (
            _product(grads[0], weight.t()) if for_x else None,
            _product(above.t(), _rows(x).t()) if for_weight else None,
            above.sum(0) if for_bias else None,
        )


class _Lora(torch.autograd.Function):
    """x (W + s B A)^T + bias with gradients for x, A (rank, in) and B (out, rank)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        if x.dtype == torch.float32:
            return _product(x, torch.addmm(weight, b, a, alpha=scale), bias)
        a, b = a.to(x.dtype), (scale * b).to(x.dtype)
        return _product_with(x, _product(_product(x, a), b), weight, bias, "add")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        x, weight, a, b = ctx.saved_tensors
        above, below, scale = _rows(grads[0]), _rows(x), ctx.scale
        low_a, low_b = a.to(x.dtype), (scale * b).to(x.dtype)
        narrow = _product(above, low_b.t())
        back = None
        if ctx.needs_input_grad[0] and x.dtype == torch.float32:
            back = _product(grads[0], torch.addmm(weight, b, a, alpha=scale).t())
        elif ctx.needs_input_grad[0]:
            back = _product_with(above, _product(narrow, low_a.t()), weight.t(), None, "add").view_as(x)
        grad_a = narrow.t() @ below
        grad_b = (_product(below, low_a).t() @ above).t().float().mul(scale)
        return back, None, None, grad_a.float(), grad_b, None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        value_weight, gate_weight, value_bias, gate_bias = _halves(weight, bias)
        if not ctx.needs_input_grad[0] and x.dtype == torch.float32:  # fused, bfloat16 would round differently
            gate = _product(x, gate_weight, gate_bias, "gelu")
            return _product_with(x, gate, value_weight, value_bias, "mul")
        value, gate = _product(x, value_weight, value_bias), _product(x, gate_weight, gate_bias)
        ctx.save_for_backward(value, gate, weight)
        return F.gelu(gate).mul_(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        value, gate, weight = ctx.saved_tensors
        value_weight, gate_weight, _, _ = _halves(weight, None)
        grad_value = F.gelu(gate).mul_(grads[0])
        grad_gate = torch.ops.aten.gelu_backward(value * grads[0], gate)
        through_gate = _product(grad_gate, gate_weight.t())
        return _product_with(grad_value, through_gate, value_weight.t(), None, "add"), None, None
