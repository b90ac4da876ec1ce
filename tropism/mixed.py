"""Mixed flows, of points and their symbols (atoms and their kinds, the two sorts of columns of a table), drawn and
guided as in TFG-Flow (Lin et al. 2025, 2501.14216, algorithm 1).

The state is x (B, N, D), which goes on the straight path x_t = (1 - t) x_0 + t eps, and a symbol for each of N
positions, which is masked at time t with probability t, each by itself. One network sees both halves and says both; a
move is Euler's on the one half and reveals symbols of the other.

Guidance towards p(x, a) exp(value(x, a)), in every move: K whole candidates of the symbols are drawn from what the
network says and weighed by their values at the x_0 it believes in (``guidance.discrete``); symbols are revealed from
the weighted candidates, and one, drawn by its weight, stands beside x while x_0 follows the value's gradient
(``guidance.RewardGuided``, with ``rho`` the paper's variance guidance and with ``mu`` its mean guidance).

Departures from linhaowei1/TFG-Flow: 1 is noise; strengths are in nats, independent of the grid (``RewardGuided`` has
``through`` and ``beside`` for the paper's own); gradients are not clipped entry by entry, ``limit`` bounds a move;
nothing is centred here: a network that does not mind where a molecule lies takes the mean off what it gets and says,
which leaves the noise's mean in what is drawn (``target`` flow) or none (x0). ``joint`` is ours.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from tropism.base import Cond, Denoiser, Prediction
from tropism.denoisers import Target, to_prediction
from tropism.guidance import RewardGuided, Value
from tropism.guidance.discrete import revealed, reweighted
from tropism.randomness import Randomness, each_row, normal
from tropism.samplers import EulerODE
from tropism.schedules import RectifiedFlow, flow_grid
from tropism.transitions import Categorical

MixedNet = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""network(x (B, N, D), symbols (B, N) int64 with V where masked, t (B,)) -> (B, N, D), its ``target``, and logits
(B, N, V)."""

MixedValue = Callable[[Tensor, Tensor, Tensor], Tensor]
"""value(x0 (M, N, D), symbols (M, N), rows (M,) of the batch) -> (M,) nats, with its graph in x0 where a guide follows
it; NaN is no score."""

Guide = Callable[[Denoiser, Value], Denoiser]
"""``RewardGuided``, or a ``partial`` of it with other strengths."""


class Mixed(NamedTuple):
    """Drawn states."""

    x: Tensor  # (B, N, D) float32
    symbols: Tensor  # (B, N) int64 below V


def draw(
    network: MixedNet,
    rows: int,
    shape: tuple[int, int, int],
    steps: int = 50,
    value: MixedValue | None = None,
    *,
    count: int = 64,
    guide: Guide | None = RewardGuided,
    joint: bool = False,
    target: Target = "x0",
    generator: Randomness = None,
    device: torch.device | str = "cpu",
) -> Mixed:
    """``rows`` states of a mixed flow of ``shape``, N positions, D dimensions and V symbols, in ``steps`` even moves.

    Without a ``value`` the flow itself. With one, ``count`` candidates of the symbols are weighed in every move; 1
    leaves the symbols to the flow. ``guide`` is what x follows the value with; None leaves x to the flow, which a value
    of the symbols alone wants. ``joint`` lets the drawn candidate stand for the symbols altogether: the network is
    asked for x beside it instead of what is revealed so far, and what is revealed next is its symbols. The network must
    then know symbols that are less masked than t says, as one does that was trained with a time for each half.

    One generator seeds every row's own, so that a row depends on its seed alone. The network is asked once a move, and
    a second time for a gradient through it (``rho``; then there is a pass back as well) or for ``joint``. The value is
    asked for ``count`` candidates a row and move, and for what the guide wants.

    Raises ValueError for ``rows``, ``steps``, ``count`` or a shape below 1 and for a network or a value whose answer
    has another shape, TypeError where a guide finds no gradient.
    """
    if min(rows, steps, count, *shape) < 1:
        raise ValueError(f"rows {rows}, steps {steps}, count {count} and shape {shape}; wanted all of them 1 or more")
    positions, dimensions, mask = shape
    generator = each_row(generator, rows)
    x = normal((rows, positions, dimensions), generator, torch.device(device))
    state = Mixed(x, torch.full((rows, positions), mask, device=x.device))
    step = _Step(network, mask, target, value, count, guide, joint)
    with torch.no_grad():
        for t, s in itertools.pairwise(flow_grid(steps, last=1 / steps).to(x.device)):
            state = step(state, t.expand(rows), s.expand(rows), generator)
    return state


@dataclass(frozen=True, eq=False)
class _Step:
    """One move of both halves."""

    network: MixedNet
    mask: int
    target: Target
    value: MixedValue | None
    count: int
    guide: Guide | None
    joint: bool

    def __call__(self, state: Mixed, t: Tensor, s: Tensor, generator: Randomness) -> Mixed:
        x, symbols = state
        law, known = self._asked(x, symbols, t)
        half: Denoiser = known
        if self.value is not None:
            value, believed = self.value, known(x, t, {}).x0
            found = reweighted(law, lambda a, rows: value(believed[rows], a, rows), self.count, generator)
            law = found.law
            if self.joint:
                law = Categorical(one_hot(found.chosen, self.mask).float().log())
                half = _Half(self.network, found.chosen, self.target)
            if self.guide is not None:
                half = self.guide(half, lambda x0, rows: value(x0, found.chosen[rows], rows))
        moved = EulerODE()(half, x, t, s, {})[0].mean
        return Mixed(moved, revealed(law, symbols, self.mask, (t - s) / t).sample(generator))

    def _asked(self, x: Tensor, symbols: Tensor, t: Tensor) -> tuple[Categorical, _Half]:
        """The law of all symbols, of which the revealed ones stay, and the continuous half."""
        output, logits = self.network(x, symbols, t)
        if logits.shape != (*symbols.shape, self.mask):
            raise ValueError(
                f"the network answered logits {tuple(logits.shape)}; wanted {(*symbols.shape, self.mask)}, one a symbol"
            )
        known = one_hot(symbols, self.mask + 1)[..., :-1].to(logits).log()
        law = Categorical(logits.where((symbols == self.mask)[..., None], known))
        said = to_prediction(self.target, _Half.schedule, output, x, t)
        return law, _Half(self.network, symbols, self.target, said)


@dataclass(frozen=True, eq=False)
class _Half:
    """The continuous half beside symbols that stay, as a denoiser; ``said`` is what was answered already."""

    network: MixedNet
    symbols: Tensor
    target: Target
    said: Prediction | None = None
    schedule: ClassVar[RectifiedFlow] = RectifiedFlow()

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        """x (B, N, D), t (B,). A guide that goes through the network has it asked again, with its graph."""
        if self.said is not None and not x.requires_grad:
            return self.said
        return to_prediction(self.target, self.schedule, self.network(x, self.symbols, t)[0], x, t)
