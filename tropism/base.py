"""The nouns of the house. Everything else in the library is a function or a value of these types.

Conventions: B items, K chain steps, ``...`` event dimensions. Time runs in [0, 1] and 1 is noise. Log-probabilities are
exact, float32, in nats, and summed over event dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, Self, TypeVar, runtime_checkable

import torch
from torch import Tensor

from tropism.randomness import Randomness

Cond = Mapping[str, Tensor]
"""What a denoiser is conditioned on: named tensors that all have the batch as their first dimension."""

WORDS = "prompt_embeds"
"""The entry of a ``Cond`` with what an encoder says of each token of the prompt, (B, L, D), where a model has one."""


Hops = Literal["consistency", "ode", "jump"]
"""How a few-step model moves: it noises its answer again, follows the path, or jumps along it to where it is told."""


def take(cond: Cond, index: Tensor) -> dict[str, Tensor]:
    """Rows ``index`` (an index or boolean tensor of shape (N,) or (B,)) of every entry."""
    return {name: value[index] for name, value in cond.items()}


def concat(*conds: Cond) -> dict[str, Tensor]:
    """Rows of several conditions below one another. Raises ValueError when they have different entries."""
    names = set(conds[0])
    for other in conds[1:]:
        if set(other) != names:
            raise ValueError(
                f"conditions have different entries: {sorted(names)} and {sorted(other)}; encode them alike"
            )
    return {name: torch.cat([cond[name] for cond in conds]) for name in conds[0]}


def bcast(value: Tensor, like: Tensor) -> Tensor:
    """A per-item value (B,) shaped (B, 1, ...) so that it multiplies ``like`` (B, ...)."""
    if value.shape[0] != like.shape[0] or value.ndim != 1:
        raise ValueError(
            f"a per-item value of shape {tuple(value.shape)} does not fit {tuple(like.shape)}; wanted (B,)"
        )
    return value.reshape(-1, *[1] * (like.ndim - 1))


class Prediction(NamedTuple):
    """What a denoiser believes at (x, t); both halves, so that no caller divides by alpha or sigma."""

    x0: Tensor  # (B, ...)
    eps: Tensor  # (B, ...)


class Schedule(Protocol):
    """x_t = alpha(t) x_0 + sigma(t) eps."""

    def alpha(self, t: Tensor) -> Tensor:
        """(B,) -> (B,), float32."""
        ...

    def sigma(self, t: Tensor) -> Tensor:
        """(B,) -> (B,), float32."""
        ...


class Denoiser(Protocol):
    """A belief about the clean sample and the noise, from a noisy sample."""

    @property
    def schedule(self) -> Schedule: ...

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        """x (B, ...), t (B,), cond rows (B, ...)."""
        ...


class Transition(Protocol):
    """The law of the next state: a value, not a sample."""

    @property
    def mode(self) -> Tensor:
        """(B, ...) where a deterministic solver goes."""
        ...

    @property
    def is_random(self) -> Tensor:
        """(B,) False where the step has no density."""
        ...

    @property
    def event_size(self) -> int: ...

    def sample(self, generator: Randomness = None) -> Tensor: ...

    def log_prob(self, x: Tensor) -> Tensor:
        """(B, ...) -> (B,), float32 nats; 0 where the step is not random."""
        ...

    def kl(self, other: Self) -> Tensor:
        """(B,) nats."""
        ...


class Kernel(Protocol):
    """One pure Markov step t -> s. Nothing is ever assigned to a kernel."""

    def __call__(
        self, denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, cond: Cond
    ) -> tuple[Transition, Prediction]:
        """x (B, ...), t (B,), s (B,) with s < t."""
        ...


@runtime_checkable
class Reward(Protocol):
    """Higher is better. Keeps the graph where it is differentiable. NaN means "no score for this sample", never 0."""

    name: str
    differentiable: bool

    def __call__(self, samples: Any, prompts: Sequence[str], **columns: Any) -> Tensor:
        """Samples (images: (B, 3, H, W) floats in [0, 1]) and B prompts -> (B,) float32."""
        ...


class Loss(NamedTuple):
    """A sum and the count that it stands for; only ``train`` divides."""

    total: Tensor  # ()
    weight: Tensor  # ()
    metrics: Mapping[str, Tensor]


Batch = TypeVar("Batch", contravariant=True)
Minibatch = TypeVar("Minibatch")


class Method(Protocol[Batch, Minibatch]):
    """A published algorithm: where its experience comes from, and the loss on a slice of it.

    ``experience`` yields optimizer updates, each an iterable of the minibatches whose gradients are summed for it; a
    minibatch may carry ``info``, statistics of the batch for the log.
    """

    def experience(self, batch: Batch) -> Iterator[Iterable[Minibatch]]: ...

    def loss(self, minibatch: Minibatch) -> Loss: ...

    def after_step(self) -> None: ...


@dataclass(frozen=True)
class Prompts:
    """One batch of work. Rows of one group share a prompt; whole groups stay together."""

    text: Sequence[str]  # B prompts, as written (rewards and statistics key on these)
    group: Tensor  # (B,) int64 group ids
    columns: Mapping[str, Sequence[Any]]  # metadata: B values a column


def pick(prompts: Prompts, rows: Tensor) -> Prompts:
    """Rows (N,) of a batch."""
    places = rows.tolist()
    columns = {name: [values[place] for place in places] for name, values in prompts.columns.items()}
    return Prompts([prompts.text[place] for place in places], prompts.group[rows], columns)


@dataclass(frozen=True)
class Rollout:
    """Chains that were run, and what they earned."""

    xs: Tensor  # (B, K+1, ...)
    ts: Tensor  # (K+1,)
    log_prob: Tensor  # (B, K) under the policy that acted
    mask: Tensor  # (B, K) False where the step was deterministic
    cond: Cond  # rows, exactly as the acting policy saw them
    reward: Tensor  # (B,) NaN = no score
    advantage: Tensor  # (B,) 0 where there is no score
    group: Tensor  # (B,)


class TextToImage(Protocol):
    """What a method needs to know of a pipeline; ``models`` has it for diffusers, ``models.toy`` for small points."""

    @property
    def denoiser(self) -> Denoiser:
        """Unguided; the trainable parameters (an adapter, or all) are inside."""
        ...

    @property
    def latent_shape(self) -> tuple[int, ...]: ...

    @property
    def guidance_scale(self) -> float:
        """The pipeline's default; 1 is no guidance."""
        ...

    def encode(self, prompts: Sequence[str]) -> Cond:
        """B prompts -> B rows; without gradients, cached by prompt."""
        ...

    def null(self) -> Cond:
        """One row: the empty prompt."""
        ...

    def phrases(self, prompts: Sequence[str]) -> Tensor:
        """(B, L) int64: which phrase of its prompt each token of cond["prompt_embeds"] belongs to; -1 for none."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> images (B, 3, H, W) in [0, 1]; keeps the graph."""
        ...

    def grid(self, steps: int) -> Tensor:
        """(steps + 1,) decreasing times, the first is noise and the last is clean, float32."""
        ...

    def parameters(self) -> list[torch.nn.Parameter]:
        """The trainable ones."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Inside, the denoiser is the model as it was before training."""
        ...


class Distillable(TextToImage, Protocol):
    """A model that can also be drawn with in few moves."""

    def few_step(self, hops: Hops, steps: int, guidance: float | None = None) -> Self:
        """The same network, and what is trained in it, drawn with in ``steps`` unguided moves on even times.

        With ``guidance`` the view's network is told a scale, this one unless cond[TOLD] says another; the model itself
        stays as it was. Raises ValueError for a model that is made for few steps already, for jumps of a network that
        cannot be told where to (``denoisers.FlowMap``), and for guidance of a network that cannot be told it.
        """
        ...

    def latents(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> clean latents (B, C, h, w), without gradients: ``decode`` backwards.

        Raises ValueError where there is no encoder, and for images of another size.
        """
        ...
