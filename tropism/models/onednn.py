"""A twin of a network that computes the same in less time on a CPU, in float32 or bfloat16, with or without a LoRA.

The twin is a copy of the module tree that shares every tensor; nothing of the original is touched. In it

- linear layers are oneDNN's matrix products, the library that already does torch's convolutions. torch gives float32
  linear layers to MKL, which takes its AVX2 path on a processor that is not Intel's, at half the speed of AVX-512;
- a LoRA costs little: in float32 it is folded into the weight for each product, x (W + s B A)^T, in bfloat16 the base
  layer's product adds it. Only x is kept for the backward pass. PEFT passes over inputs and outputs several times more;
- a frozen feed-forward gate keeps its two halves apart and computes GELU again in the backward pass instead of keeping
  it; in float32 and without a graph, GELU and the product with it happen inside the matrix products;
- attention over few keys is written out in bfloat16, where the backward pass of torch's fused kernel is slow;
- Stable Diffusion 3 computes equal context tokens once (see ``joint_attention``).

Results differ from the original's by rounding, and do not depend on whether a graph is kept. In bfloat16 a LoRA's
weights stay float32 and what is multiplied are bfloat16 copies, as under autocast; against float32 the network is then
as exact as with PEFT. Backward passes are first-order only, and there is no forward-mode derivative: use the original
network for those.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, JointAttnProcessor2_0
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tropism.models.joint_attention import FEW_KEYS, MergedContext


def twin_pays(net: nn.Module) -> bool:
    """Whether a twin of ``net`` is faster here: weights of one of two types, AVX-512, and oneDNN in this torch."""
    first = next(net.parameters())
    weights = {parameter.dtype for name, parameter in net.named_parameters() if ".lora_" not in name}
    return (
        first.device.type == "cpu"
        and weights in ({torch.float32}, {torch.bfloat16})
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def twin(net: nn.Module) -> nn.Module:
    """The twin of ``net``. Tensors and hooks are shared, now and later; flags and processors are those of now."""
    copied = copy.copy(net)
    copied._modules = {name: None if child is None else _twin_of(child) for name, child in net._modules.items()}
    processor: Any = getattr(copied, "processor", None)
    if type(processor) is AttnProcessor2_0:
        copied.processor = ShortAttention()  # type: ignore[assignment]
    if type(processor) is JointAttnProcessor2_0:
        copied.processor = MergedContext()  # type: ignore[assignment]
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

    @property
    def weight(self) -> Tensor:
        """The layer's own, which some modules ask for its type."""
        weight: Tensor = self._layer[0].weight
        return weight

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in) -> (..., out); some networks name the argument."""
        layer = self._layer[0]
        base: Any = layer.base_layer if isinstance(layer, LoraLayer) else layer
        x, weight, bias = _as_autocast_wants(input, base.weight, base.bias)
        if not isinstance(layer, LoraLayer) or layer.disable_adapters or layer.merged:
            return linear(x, weight, bias)
        (name,) = layer.lora_A
        a, b, scale = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
        answer: Tensor = _Lora.apply(x, weight, bias, a, b, scale)  # type: ignore[no-untyped-call]
        return answer


class Gate(nn.Module):
    """GEGLU: (x W^T) GELU(x V^T), with W above V in one layer of the original network."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self._layer = (layer,)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (..., in) -> (..., out / 2)."""
        x, weight, bias = _as_autocast_wants(x, self._layer[0].weight, self._layer[0].bias)
        if weight.requires_grad:
            value_weight, gate_weight, value_bias, gate_bias = _halves(weight, bias)
            return linear(x, value_weight, value_bias) * F.gelu(linear(x, gate_weight, gate_bias))
        answer: Tensor = _Gate.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return answer


class ShortAttention(AttnProcessor2_0):
    """torch's fused attention, but in bfloat16 over at most ``FEW_KEYS`` keys its plain matrix products."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._plain = AttnProcessor()

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Hidden states (B, T, C) or (B, C, H, W), what is attended to (B, S, D) or nothing -> as hidden states."""
        keys = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        count = keys.shape[1] if keys.ndim == 3 else keys.shape[2] * keys.shape[3]
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else keys.dtype
        process = self._plain if dtype == torch.bfloat16 and count <= FEW_KEYS else super().__call__
        answer: Tensor = process(attn, hidden_states, encoder_hidden_states, *args, **kwargs)
        return answer


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias: x (..., in), weight (out, in), bias (out,)."""
    answer: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return answer


def _as_autocast_wants(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Inside autocast, all in its type; oneDNN's operator is unknown to it."""
    if not torch.is_autocast_enabled("cpu"):
        return x, weight, bias
    dtype = torch.get_autocast_dtype("cpu")
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


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
