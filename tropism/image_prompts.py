"""Image prompts without a network: what is taken out of a picture's embedding, and which reference counts where.

InstantStyle (Wang et al. 2024, 2404.02733) subtracts a text from the embedding of a picture. MIP-Adapter (Huang et al.
2024, 2409.17920) adds what each of M references says, at every position weighed by how much the position belongs to the
reference's entity: out(p) = text(p) + g(p) sum_m w_m(p) h_m(p).
"""

from __future__ import annotations

import torch
from torch import Tensor


def without_content(images: Tensor, text: Tensor, strength: float = 1.0) -> Tensor:
    """images (..., D) - strength text (D,) or (..., D), both projections of one CLIP as they are (2404.02733).

    Raises ValueError for embeddings of different width, which are of different spaces.
    """
    if images.shape[-1] != text.shape[-1]:
        raise ValueError(
            f"the picture's embedding has {images.shape[-1]} numbers and the text's {text.shape[-1]}; wanted those of "
            "one CLIP"
        )
    return images - strength * text


def relevance(query: Tensor, key: Tensor, real: Tensor) -> Tensor:
    """A (B, M, P): how much of an entity's attention, softmax over *positions*, each position gets.

    query (B, H, P, d) of the positions, key (B, M, H, L, d) of the entities' tokens, of which ``real`` (B, M, L) bool
    are words. Means over heads and words; float32, without gradient; sums to 1 over positions. An entity without words
    raises ValueError.
    """
    if not bool(real.any(-1).all()):
        raise ValueError("an entity has no words; wanted a name, such as 'a circle'")
    logits = torch.einsum("bhpd,bmhld->bmhlp", query.detach().float(), key.detach().float())
    attention = (logits * query.shape[-1] ** -0.5).softmax(-1).mean(2)  # (B, M, L, P)
    words = real[..., None].float()
    found: Tensor = (attention * words).sum(2) / words.sum(2)
    return found


def weights(relevance: Tensor, gate: Tensor | None = None) -> Tensor:
    """g(p) w_m(p), (B, M, P): relevance (B, M, P) normalised over the M references, *after* heads and words were.

    ``gate`` (B, P) are logits of a learnt head, of which g is the sigmoid over its own mean over positions: where the
    pictures speak, not how loud. None is g = 1, the method without that head, in which the weights sum to 1 over M.
    """
    shares = relevance / relevance.sum(1, keepdim=True)
    if gate is None:
        return shares
    open_ = gate.float().sigmoid()
    return shares * (open_ / open_.mean(-1, keepdim=True))[:, None]
