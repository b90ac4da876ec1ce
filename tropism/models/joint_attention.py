"""Joint attention (Stable Diffusion 3) in which equal context tokens at the end are computed once.

Without a third text encoder, or with one that says nothing, the context ends in 256 rows that are equal in every image.
They have no positions and are never masked, so they stay equal through every layer: one row whose attention logit gains
log(256) is the same network, up to rounding, on a third of the tokens of a small picture.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional as F

FEW_KEYS = 256  # up to which plain matrix products are faster in bfloat16 than torch's fused kernel and its backward


class MergedContext:
    """A processor for ``Attention`` in which the last context token stands for ``repeats`` equal ones."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        repeats: int = 1,
        **_: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Image tokens (B, T, C), and context (B, S, C) or none -> the same shapes."""
        places = hidden_states.shape[1]
        q, k, v = _projected(hidden_states, attn.heads, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))
        if encoder_hidden_states is not None:
            layers = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            added = _projected(encoder_hidden_states, attn.heads, layers, (attn.norm_added_q, attn.norm_added_k))
            q, k, v = (torch.cat(pair, dim=2) for pair in zip((q, k, v), added, strict=True))
        alone = encoder_hidden_states is None or repeats == 1
        mixed = _attend(q, k, v, 0.0 if alone else math.log(repeats)).transpose(1, 2).flatten(2)
        image: Tensor = attn.to_out[1](attn.to_out[0](mixed[:, :places]))
        if encoder_hidden_states is None:
            return image
        context = mixed[:, places:]
        return image, context if attn.context_pre_only else attn.to_add_out(context)


def merges_context(net: nn.Module) -> bool:
    """Whether the joint attention of every block of ``net`` is ``MergedContext``."""
    blocks: Any = net.transformer_blocks
    return all(isinstance(block.attn.processor, MergedContext) for block in blocks)


def equal_at_the_end(context: Tensor) -> int:
    """How many of the last tokens of context (B, S, C) are equal in each of the B rows; at least 1."""
    same = (context[:, 1:] == context[:, :-1]).all(2).all(0)
    different = (~same).nonzero()
    return context.shape[1] if not len(different) else context.shape[1] - 1 - int(different[-1])


def _projected(x: Tensor, heads: int, layers: tuple[Any, ...], norms: tuple[Any, Any]) -> tuple[Tensor, ...]:
    """Query, key and value (B, heads, T, C / heads) of x (B, T, C)."""
    q, k, v = (layer(x).unflatten(-1, (heads, -1)).transpose(1, 2) for layer in layers)
    norm_q, norm_k = norms
    return q if norm_q is None else norm_q(q), k if norm_k is None else norm_k(k), v


def _attend(q: Tensor, k: Tensor, v: Tensor, gain: float) -> Tensor:
    """Attention in which the last key's logit gains ``gain``."""
    keys = k.shape[2]
    bias = torch.zeros(keys, device=q.device)
    bias[-1] = gain
    if q.dtype != torch.bfloat16 or keys > FEW_KEYS:
        mask = bias.to(q.dtype).expand(1, 1, 1, keys) if gain else None
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    logits = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5 + bias
    answer: Tensor = logits.softmax(-1).to(v.dtype) @ v
    return answer
