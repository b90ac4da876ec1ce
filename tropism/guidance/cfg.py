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
ROW = "guidance_row"
"""The entry of cond (B,) that says of which prompt a row is, for guides that look it up."""


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
        if not callable(self.scale) and self.scale == 1:
            return self.inner(x, t, untold(self.inner, network_cond(cond)))
        return self.joined(*self.halves(x, t, cond), t, cond)

    def halves(self, x: Tensor, t: Tensor, cond: Cond, asked: Tensor | None = None) -> tuple[Prediction, Prediction]:
        """What is believed with the prompt and without it; x (B, ...), t (B,), in one pass of 2B rows.

        ``asked`` (B,) bool are the rows that are asked without their prompt, of which alone the pass then has a second
        copy; the other rows' second half is their first.
        """
        rows = untold(self.inner, network_cond(cond))
        again = x if asked is None else x[asked]
        if not len(again):
            alone = self.inner(x, t, rows)
            return alone, alone
        null = {name: value.expand(len(again), *value.shape[1:]) for name, value in network_cond(self.null).items()}
        for name in (END, TOLD):  # the same with and without the prompt
            if name in rows:
                null[name] = rows[name] if asked is None else rows[name][asked]
        times = torch.cat([t, t if asked is None else t[asked]])
        both = self.inner(torch.cat([x, again]), times, concat(rows, null))
        told = Prediction(both.x0[: len(x)], both.eps[: len(x)])
        rest = Prediction(both.x0[len(x) :], both.eps[len(x) :])
        if asked is None:
            return told, rest
        return told, Prediction(told.x0.index_put((asked,), rest.x0), told.eps.index_put((asked,), rest.eps))

    def joined(self, told: Prediction, null: Prediction, t: Tensor, cond: Cond) -> Prediction:
        """null + w (told - null) of both halves, (B, ...) each, with the scale at (t, cond)."""
        w = self.scale(t, cond) if callable(self.scale) else torch.full_like(t, self.scale)
        return Prediction(self._between(null.x0, told.x0, w), self._between(null.eps, told.eps, w))

    def _between(self, null: Tensor, told: Tensor, w: Tensor) -> Tensor:
        null = null.detach() if self.detach_null else null
        return null + bcast(w, told) * (told - null)
