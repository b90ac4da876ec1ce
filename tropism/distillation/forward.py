"""Forward derivatives through a network: how its answer changes along the path, in one pass."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

# Torch keeps the level of forward derivatives, and the kind of attention, for the whole process.
_ONE = threading.Lock()


def derivable(model: object) -> None:
    """Has a pipeline's network called itself from now on, as its faster stand-in has no forward derivative."""
    bare = getattr(model, "bare_network", None)
    if bare is not None:
        bare()


def along(f: Callable[..., Tensor], at: tuple[Tensor, ...], to: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """(f, its derivative), (N, ...) each, at these inputs along these directions.

    Attention is computed in its plain form: the fused ones have no forward derivative.
    """
    with _ONE, sdpa_kernel(SDPBackend.MATH):
        found: Any = jvp(f, at, to)
    return found[0], found[1]
