"""Classifier-free guidance (2207.12598): null + w (cond - null), with w constant, scheduled in time, or per row.

w = 1 is no guidance (the Imagen and diffusers convention; LCM papers write w - 1). Outputs of a network in any of the
four targets determine a Prediction affinely at a given (x, t), and the weights 1 - w and w sum to 1, so that combining
Predictions is combining raw outputs, as diffusers' pipelines do. That fails for a clipped x0: clip outside guidance
(``denoisers.Clipped``).

Everything that perturbs the acting policy is a per-row tensor of ``cond``, so that a stored row can be evaluated again
under the policy that drew it. Entries whose name begins with "guidance" are for the scale and never reach the network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tropism.base import Cond, Denoiser, Prediction, Schedule, bcast, concat
from tropism.denoisers import END, TOLD, untold

Scale = Callable[[Tensor, Cond], Tensor]
"""scale(t (B,), cond) -> w (B,). It sees every entry of cond."""


def constant(w: float) -> Scale:
    """w at every time."""
    return lambda t, cond: torch.full_like(t, w)


def interval(w: float, low: float, high: float) -> Scale:
    """w for low <= t <= high, 1 (no guidance) elsewhere (2404.07724). ValueError unless 0 <= low < high <= 1."""
    if not 0 <= low < high <= 1:
        raise ValueError(f"wanted 0 <= low < high <= 1; got {low} and {high}")
    return lambda t, cond: torch.full_like(t, w).where((t >= low) & (t <= high), 1.0)


def step(low: float, high: float, until: float) -> Scale:
    """``low`` while t > until, ``high`` afterwards: DiffExp's dynamic guidance (2502.14070).

    A row's own entry cond["guidance_low"] (B,) takes the place of ``low``; NaN there leaves the row at ``high``.
    """
    if not 0 <= until <= 1:
        raise ValueError(f"until must be a time in [0, 1]; got {until}")

    def scale(t: Tensor, cond: Cond) -> Tensor:
        early = cond["guidance_low"].to(t) if "guidance_low" in cond else torch.full_like(t, low)
        if early.shape != t.shape:
            raise ValueError(f"guidance_low {tuple(early.shape)} must have one entry per row, {tuple(t.shape)}")
        return early.where((t > until) & ~early.isnan(), high)

    return scale


def network_cond(cond: Cond) -> dict[str, Tensor]:
    """The entries that the network sees."""
    return {name: value for name, value in cond.items() if not name.startswith("guidance")}


@dataclass(frozen=True, eq=False)
class Guided:
    """A denoiser guided away from ``null`` (one row: the empty prompt), in one forward pass of 2B rows.

    ``scale`` is a number (1 asks the conditional rows only, in a pass of B rows) or a ``Scale``. ``detach_null`` keeps
    gradients out of the null half, as Flow-GRPO's training does; the prediction is the same.

    Around a network that is told its guidance both halves are told the same (see ``told.interpolated``); any other
    network is not told.
    """

    inner: Denoiser
    null: Cond
    scale: float | Scale
    detach_null: bool = False

    def __post_init__(self) -> None:
        for name, value in self.null.items():
            if value.ndim == 0 or value.shape[0] != 1:
                raise ValueError(f"null must have one row; its entry {name!r} has shape {tuple(value.shape)}")

    @property
    def schedule(self) -> Schedule:
        """The inner denoiser's."""
        return self.inner.schedule

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        """x (B, ...), t (B,), cond rows (B, ...). Raises ValueError when cond and null have different entries."""
        rows = untold(self.inner, network_cond(cond))
        if not callable(self.scale) and self.scale == 1:
            return self.inner(x, t, rows)
        w = self.scale(t, cond) if callable(self.scale) else torch.full_like(t, self.scale)
        null = {name: value.expand(x.shape[0], *value.shape[1:]) for name, value in network_cond(self.null).items()}
        null |= {name: rows[name] for name in (END, TOLD) if name in rows}  # the same with and without the prompt
        both = self.inner(torch.cat([x, x]), torch.cat([t, t]), concat(rows, null))
        return Prediction(self._combined(both.x0, w), self._combined(both.eps, w))

    def _combined(self, half: Tensor, w: Tensor) -> Tensor:
        """(2B, ...) and (B,) -> (B, ...)."""
        cond, null = half.chunk(2)
        null = null.detach() if self.detach_null else null
        return null + bcast(w, cond) * (cond - null)
