"""Walks with adaptive guidance: chains that remember what was said, and ask the network less for it.

``guidance.adaptive`` says what is remembered and what is done with it. The loop keeps that memory beside x, as it keeps
x, and hands the kernel a denoiser that knows its answer: any kernel walks, and guides may be around the guidance.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tropism.base import Cond, Denoiser, Kernel
from tropism.guidance.adaptive import Known, Linear, Memory, Partly, agreement, said
from tropism.guidance.cfg import Guided
from tropism.randomness import Randomness
from tropism.samplers.chain import Move, Walk, check_grid


def adaptive(threshold: float | None = None, linear: Linear | None = None) -> Walk:
    """``adaptive_walk`` with these, to be used in the place of ``samplers.walk``."""
    _check(threshold)
    return partial(adaptive_walk, threshold=threshold, linear=linear)


def _check(threshold: float | None) -> None:
    if threshold is not None and not -1 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}; wanted a cosine in [-1, 1], such as 0.99")


def step(
    kernel: Kernel,
    denoiser: Denoiser,
    x: Tensor,
    t: Tensor,
    s: Tensor,
    cond: Cond,
    memory: Memory,
    generator: Randomness = None,
    *,
    threshold: float | None = None,
    linear: Linear | None = None,
) -> tuple[Move, Memory]:
    """One move from x (B, ...) at t (B,) to s (B,), and what is remembered after it; ``memory.rows`` follows particles.

    Raises TypeError when there is no guidance in the denoiser.
    """
    guided = guidance_in(denoiser)
    told, null, after = said(guided, memory, linear, x, t, cond)
    known = Known(Partly(guided, memory.agreed), x, t, guided.joined(told, null, t, cond))
    transition, prediction = kernel(_replaced(denoiser, guided, known), x, t, s, cond)
    if threshold is not None and after.null[-1] is not None:
        after = replace(after, agreed=after.agreed | (agreement(told, null) >= threshold))
    return Move(x, t, s, transition, prediction, transition.sample(generator)), after


def adaptive_walk(
    kernel: Kernel,
    denoiser: Denoiser,
    x: Tensor,
    ts: Tensor,
    cond: Cond,
    generator: Randomness = None,
    *,
    threshold: float | None = None,
    linear: Linear | None = None,
) -> Iterator[Move]:
    """``samplers.walk`` with adaptive guidance; with neither setting it is ``walk``, to the last bit.

    ``threshold``: rows whose halves have reached this cosine of x0 are asked with their prompt alone from the next move
    on. ``linear``: fitted on this grid, foretells the half without prompt at its moves. A kernel with a second call a
    move (Heun) and a guide that wants a gradient ask for it, of the rows that have not agreed.

    Raises ValueError for what is no grid, a threshold that is no cosine, and coefficients of another grid; TypeError
    when there is no ``Guided`` in the denoiser.
    """
    _check(threshold)
    if linear is not None:
        linear.check(ts)
    for move, _ in _remembering(kernel, denoiser, x, ts, cond, generator, threshold, linear):
        yield move


def remembered(
    kernel: Kernel, denoiser: Denoiser, x: Tensor, ts: Tensor, cond: Cond, generator: Randomness = None
) -> Memory:
    """What fully guided chains from x (B, ...) remember at their end, for ``guidance.adaptive.fit_linear``."""
    *_, (_, memory) = _remembering(kernel, denoiser, x, ts, cond, generator, None, None)
    return memory


def _remembering(
    kernel: Kernel,
    denoiser: Denoiser,
    x: Tensor,
    ts: Tensor,
    cond: Cond,
    generator: Randomness,
    threshold: float | None,
    linear: Linear | None,
) -> Iterator[tuple[Move, Memory]]:
    check_grid(ts)
    x, ts = x.float(), ts.to(x.device, torch.float32)
    memory = Memory.fresh(x)
    for now, later in itertools.pairwise(ts):
        t, s = now.expand(x.shape[0]), later.expand(x.shape[0])
        move, memory = step(kernel, denoiser, x, t, s, cond, memory, generator, threshold=threshold, linear=linear)
        yield move, memory
        x = move.x_next


def guidance_in(denoiser: Any) -> Guided:
    """The ``Guided`` inside. Raises TypeError for none."""
    found = denoiser
    while found is not None and not isinstance(found, Guided):
        found = getattr(found, "inner", None)
    if found is None:
        raise TypeError(
            f"{type(denoiser).__name__} has no classifier-free guidance inside, of which a half could be left out; a "
            "model that is told its guidance, or is drawn with without, needs none of this"
        )
    return found


def _replaced(denoiser: Any, guided: Guided, known: Denoiser) -> Denoiser:
    """The denoiser with ``known`` in the place of ``guided``."""
    if denoiser is guided:
        return known
    changed: Denoiser = replace(denoiser, inner=_replaced(denoiser.inner, guided, known))
    return changed
