"""Distribution matching: a student learns where two scores disagree, the teacher's and that of its own samples.

DMD (2311.18828, eq. 7) and DMD2 (2405.14867): the gradient of KL(student's law || teacher's), both noised to a time t,
is the difference of their scores there. The teacher knows its own; a ``FakeScore``, a second network, keeps learning
the student's by denoising what the student says, and the two are trained in turn.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tropism.base import Cond, Distillable, Loss, Prompts, bcast, take
from tropism.checkpoint import load_optimizer, optimizer_state, under
from tropism.denoisers import denoising_error
from tropism.distillation.adversarial import Adversarial
from tropism.distillation.noised import Pictures
from tropism.distillation.recipe import carried
from tropism.policy import Policy
from tropism.processes import ALONE, Processes
from tropism.randomness import row_generators, row_seeds
from tropism.rollout import slices
from tropism.schedules import add_noise
from tropism.train import update

EARLIEST, LATEST = 0.02, 0.98  # times to which answers are noised: a share of the schedule (2405.14867's code)
SMALLEST = 1e-8


def direction(x: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """((x - real) - (x - fake)) / mean|x - real|, a mean a row: x, real and fake (N, ...) -> (N, ...), no gradient.

    ``real`` and ``fake`` are the clean samples that teacher and fake score believe in at one noised x. Up to the
    positive factor of a row it is the gradient of the KL in x (2311.18828, eq. 7 and 8).
    """
    if not x.shape == real.shape == fake.shape:
        raise ValueError(f"shapes {tuple(x.shape)}, {tuple(real.shape)} and {tuple(fake.shape)} must be the same")
    size = (x - real).flatten(1).abs().mean(1).clamp(min=SMALLEST)
    return ((fake - real) / bcast(size, x)).detach()


def moved(x: Tensor, step: Tensor) -> Tensor:
    """(N,) half the mean square to x - step, whose gradient in x (N, ...) is ``step`` over the number of dimensions."""
    return 0.5 * (x - (x - step).detach()).square().flatten(1).mean(1)


class FakeScore:
    """``model`` (anything with ``parameters``) that learns beside the student, with an Adam of its own.

    It is trained by sums of losses and never gets a gradient from the student's loss, nor the student one from its own.
    """

    def __init__(self, model: Any, learning_rate: float, betas: tuple[float, float] = (0.0, 0.99)) -> None:
        self.model = model
        self.parameters = list(model.parameters())
        if not self.parameters:
            raise ValueError("the fake score has nothing to train; add an adapter (or train all weights) first")
        self.optimizer = torch.optim.Adam(self.parameters, lr=learning_rate, betas=betas)
        self.updates, self.error = 0, 0.0

    @staticmethod
    def of(model: Distillable, learning_rate: float, from_teacher: bool) -> FakeScore:
        """A copy of the whole model; with ``from_teacher`` as it was before training, where it can go back."""
        twin = copy.deepcopy(model)
        if from_teacher and hasattr(twin, "forget"):
            twin.forget()
        return FakeScore(twin, learning_rate)

    def step(self, losses: Iterable[Tensor], processes: Processes = ALONE) -> float:
        """One update by minibatches of losses (n,) a row; their mean, also kept as ``error``."""
        total, rows = 0.0, 0
        for loss in losses:
            torch.autograd.backward(loss.sum())
            total, rows = total + float(loss.detach().sum()), rows + len(loss)
        weight = torch.tensor(float(rows), dtype=torch.float64)
        update(self.optimizer, self.parameters, weight, max_norm=1.0, step=self.updates, processes=processes)
        self.updates += 1
        self.error = total / max(rows, 1)
        return self.error

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors only: ``updates``, ``error``, ``net/<i>`` in parameter order and ``optimizer/<parameter>/<name>``."""
        weights = {f"net/{place}": value.detach().clone() for place, value in enumerate(self.parameters)}
        moments = {name: value.clone() for name, value in optimizer_state(self.optimizer)[0].items()}
        facts = {"updates": torch.tensor(self.updates), "error": torch.tensor(self.error, dtype=torch.float64)}
        return {**facts, **weights, **moments}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continues from ``state_dict()``. Raises ValueError, before any change, for weights of another shape."""
        weights = under("net", state)
        own = {str(place): value for place, value in enumerate(self.parameters)}
        if {name: value.shape for name, value in weights.items()} != {name: value.shape for name, value in own.items()}:
            raise ValueError("the fake score has other weights; wanted those of the same model")
        for name, value in own.items():
            value.copy_(weights[name])
        load_optimizer(self.optimizer, state, self.optimizer.state_dict()["param_groups"])
        self.updates, self.error = int(state["updates"]), float(state["error"])


@dataclass(frozen=True)
class Asked:
    """Rows of states at which the student is asked for a clean sample, and how its answers are noised again."""

    x: Tensor  # (N, ...) at t
    t: Tensor  # (N,)
    cond: Cond  # N rows
    times: Tensor  # (N, 1 + F) the first for the student's loss, the others for the fake score's
    eps: Tensor  # (N, 1 + F, ...)
    x0: Tensor | None = None  # (N, ...) a real sample of the prompt, where an adversary wants one
    info: Mapping[str, float] = field(default_factory=dict)

    def rows(self, index: Tensor) -> Asked:
        """Those at index (n,)."""
        x0 = None if self.x0 is None else self.x0[index]
        cond, times, eps = take(self.cond, index), self.times[index], self.eps[index]
        return Asked(self.x[index], self.t[index], cond, times, eps, x0, self.info)


@dataclass
class Matching:
    """The method: ``policy`` is the student, ``teacher`` the real score with its guidance, ``fake`` the student's own.

    An update asks the student at one of its own states (backward simulation, 2405.14867, section 4.4: what came before
    is drawn without gradient), the same move for all rows, then ``fake_updates`` times the fake score denoises what was
    said. With ``any_count`` an update first draws its number of moves. ``warmup`` updates of the fake score come before
    all others.
    """

    policy: Policy
    teacher: Policy
    fake: FakeScore
    generator: torch.Generator
    minibatch: int = 64
    updates: int = 1
    passes: int = 1
    fake_updates: int = 1
    warmup: int = 0
    any_count: bool = False
    adversary: Adversarial | None = None
    pictures: Pictures | None = None
    heard: list[tuple[Asked, Tensor]] = field(default_factory=list)

    @property
    def terms(self) -> Sequence[Any]:
        """For checkpoints."""
        return [self.fake] if self.adversary is None else [self.fake, self.adversary]

    def experience(self, batch: Prompts) -> Iterator[Iterator[Asked]]:
        """``updates`` slices of a batch a pass, each with fresh noise."""
        cond = self.policy.model.encode(batch.text)
        real = None if self.pictures is None else self._latents(batch)
        for _ in range(self.passes):
            order = torch.randperm(len(batch.text), generator=self.generator)
            for part in order.tensor_split(self.updates):
                parts = slices(torch.arange(len(part)), 1, self.minibatch, self.policy.processes)[0]
                while self.fake.updates < self.warmup:
                    self._warm(self._ask(take(cond, part), None, 1), parts)
                asked = self._ask(take(cond, part), None if real is None else real[part], 1 + self.fake_updates)
                self.heard.clear()
                yield (asked.rows(index) for index in parts)

    def loss(self, asked: Asked) -> Loss:
        """The sum over the rows of half the square of the step that lowers the KL, and the adversary's."""
        said = self._said(asked)
        step = direction(said.detach(), *self.beliefs(asked, said))
        self.heard.append((asked, said.detach()))
        total, metrics = moved(said, step).sum(), {"disagreement": step.flatten(1).abs().mean()}
        metrics["fake_error"] = torch.tensor(self.fake.error)
        if self.adversary is not None:
            added, more = self.adversary(self, asked, said)
            total, metrics = total + added, metrics | more
        return Loss(total, torch.tensor(float(len(said))), metrics)

    @torch.no_grad()
    def beliefs(self, asked: Asked, said: Tensor) -> tuple[Tensor, Tensor]:
        """(N, ...) and (N, ...): the clean samples that the teacher and the fake score believe in."""
        time = asked.times[:, 0]
        noisy = add_noise(self.policy.model.denoiser.schedule, said, asked.eps[:, 0], time)
        return self.teacher.denoiser(noisy, time, asked.cond).x0, self.fake.model.denoiser(noisy, time, asked.cond).x0

    def after_step(self) -> None:
        """The fake score catches up; the adversary's step."""
        for turn in range(self.fake_updates):
            self.fake.step((self._error(*each, 1 + turn) for each in self.heard), self.policy.processes)
        self.heard.clear()
        if self.adversary is not None:
            self.adversary.after_step(self)

    def _said(self, asked: Asked) -> Tensor:
        """(N, ...) the student's clean samples."""
        return carried(self.policy.model.denoiser, asked.x, asked.t, torch.zeros_like(asked.t), asked.cond)

    def _error(self, asked: Asked, said: Tensor, turn: int) -> Tensor:
        """(N,) how badly the fake score denoises what was said."""
        return denoising_error(self.fake.model.denoiser, said, asked.eps[:, turn], asked.times[:, turn], asked.cond)

    def _warm(self, asked: Asked, parts: Sequence[Tensor]) -> None:
        """An update of the fake score alone."""
        with torch.no_grad():
            said = [(rows, self._said(rows)) for rows in (asked.rows(index) for index in parts)]
        self.fake.step((self._error(*each, 0) for each in said), self.policy.processes)

    @torch.no_grad()
    def _ask(self, cond: Cond, real: Tensor | None, draws: int) -> Asked:
        """A state of each row (cond) on the student's own way, all after the same number of moves."""
        rows, steps, device = len(next(iter(cond.values()))), self.policy.steps, self.policy.device
        if self.any_count:
            steps = 1 + int(torch.randint(steps, (), generator=self.generator))
        done = int(torch.randint(steps, (), generator=self.generator))
        generators = row_generators(row_seeds(rows, self.generator))
        walker, x = self.policy.with_(steps=steps), self.policy.noise(rows, generators)
        if done:
            x = torch.cat([_after(walker, done, x, cond, generators, some) for some in _split(walker, rows)])
        at = walker.ts[done].expand(rows).to(device)
        times = torch.rand(rows, draws, generator=self.generator).mul(LATEST - EARLIEST).add(EARLIEST).to(device)
        eps = self.policy.noise(rows * draws, self.generator).unflatten(0, (rows, draws))
        return Asked(x, at, cond, times, eps, real)

    def _latents(self, batch: Prompts) -> Tensor:
        """(B, ...) of pictures of the prompts."""
        assert self.pictures is not None
        shown = self.pictures(batch, self.generator)
        return torch.cat([self.policy.model.latents(part) for part in shown.split(self.policy.microbatch)])  # type: ignore[attr-defined]


def _split(policy: Policy, rows: int) -> Sequence[Tensor]:
    parts: Sequence[Tensor] = torch.arange(rows).split(policy.microbatch)
    return parts


def _after(
    policy: Policy, moves: int, x: Tensor, cond: Cond, generators: Sequence[torch.Generator], rows: Tensor
) -> Tensor:
    """Rows (n,) of x after so many moves."""
    chain = policy.chain(x[rows], take(cond, rows), [generators[row] for row in rows])
    *_, last = itertools.islice(chain, moves)
    return last.x_next
