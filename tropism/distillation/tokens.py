"""What the distillations of token models share: the model they need, teacher's samples, and what is seen of a token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from tropism.base import Cond, take
from tropism.codebook import flow_to_code, nearest, posterior_mean
from tropism.policy import Policy
from tropism.transitions import Categorical

EARLIEST, LATEST = 0.02, 0.98  # times of the tokens' own noise


@runtime_checkable
class TokenModel(Protocol):
    """A ``base.Distillable`` whose states are tokens (B, L, d); see ``models.image_tokens``."""

    codes: Tensor  # (V, d)

    def flow(self, before: Tensor, drawn: Tensor, x: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """The mean (B, L, d) and the logits (B, L, V) of each position's code, from the tokens before it, which are
        noise where ``drawn`` (B, L), and from its own noisy point x (B, L, d) at t (B, L)."""
        ...

    def mean(self, before: Tensor, drawn: Tensor, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The mean alone."""
        ...

    def says(self, x: Tensor, drawn: Tensor, cond: Cond) -> Tensor:
        """(B, L, d) all tokens in one pass."""
        ...


def check_tokens(model: Any, method: str) -> None:
    """Raises ValueError for a model that does not draw tokens."""
    if not isinstance(model, TokenModel):
        raise ValueError(
            f"{method} distils models that draw image tokens, and this is a {type(model).__name__}; take dmd2 or lcm"
        )


@dataclass(frozen=True)
class Tokens:
    """Rows of tokens, and the noise that an update needs besides."""

    x: Tensor  # (N, L, d) noise, or codes of the teacher
    drawn: Tensor  # (N, L) bool: which of ``x`` are noise when the student is asked
    cond: Cond  # N rows
    times: Tensor  # (N, F, L) of the tokens' own noise, F draws
    eps: Tensor  # (N, F, L, d)
    wanted: Tensor  # (N, L) int64 codes that ``x`` is to become, where they are known; else 0
    info: Mapping[str, float] = field(default_factory=dict)

    def rows(self, index: Tensor) -> Tokens:
        """Those at index (n,)."""
        x, drawn, times, eps, wanted = (
            value[index] for value in (self.x, self.drawn, self.times, self.eps, self.wanted)
        )
        return Tokens(x, drawn, take(self.cond, index), times, eps, wanted, self.info)

    def noised(self, clean: Tensor, draw: int) -> Tensor:
        """(N, L, d) (1 - t) clean + t eps, by this draw of both."""
        t = self.times[:, draw, :, None]
        return (1 - t) * clean + t * self.eps[:, draw]


def tokens(
    policy: Policy, x: Tensor, drawn: Tensor, cond: Cond, draws: int, generator: torch.Generator, wanted: Tensor | None
) -> Tokens:
    """``x`` with ``draws`` fresh times, a time a position, and noises."""
    rows, length = x.shape[:2]
    times = torch.rand(rows, draws, length, generator=generator) * (LATEST - EARLIEST) + EARLIEST
    eps = policy.noise(rows * draws, generator).unflatten(0, (rows, draws))
    return Tokens(x, drawn, cond, times.to(x), eps, drawn.long() * 0 if wanted is None else wanted)


def snapped(x: Tensor, codes: Tensor) -> Tensor:
    """(N, L, d) the nearest codes, as the teacher reads what came before."""
    codes = codes.to(x)
    return codes[nearest(x, codes)]


def first_parts(rows: int, length: int, steps: int, generator: torch.Generator) -> Tensor:
    """(rows, length) bool, True from the position on at which one of ``steps`` moves, drawn for each row, begins."""
    begun = torch.randint(steps, (rows,), generator=generator) * length / steps
    return torch.arange(length) >= begun.round()[:, None]


@torch.no_grad()
def student_states(policy: Policy, cond: Cond, drawn: Tensor, generator: torch.Generator) -> Tensor:
    """(N, L, d) noise where ``drawn``, elsewhere what the student itself said in the moves before."""
    x = policy.noise(len(drawn), generator)
    ends = x if bool(drawn.all()) else _walked(policy, x, cond)
    return torch.where(drawn[..., None].to(x.device), x, ends)


def _walked(policy: Policy, x: Tensor, cond: Cond) -> Tensor:
    """(N, L, d) where the student's chains from x end; what a move decides stays."""
    parts = torch.arange(len(x)).split(policy.microbatch)
    return torch.cat([[*policy.chain(x[rows], take(cond, rows))][-1].x_next for rows in parts])


def _cached(teacher: Policy, cond: Cond, choose: Callable[[int, Tensor], Tensor]) -> Tensor | None:
    """(N, L, d) codes by cached keys and values; None where the teacher's network keeps none."""
    each = getattr(getattr(teacher.model, "model", None), "one_by_one", None)
    scale = teacher.model.guidance_scale if teacher.guidance is None else teacher.guidance
    if each is None or callable(scale):
        return None
    with teacher.model.reference():
        return each(cond, scale, choose)  # type: ignore[no-any-return]


@torch.no_grad()
def samples(teacher: Policy, prompts: Sequence[str], generator: torch.Generator) -> Tensor:
    """(N, L, d) codes that the teacher draws, by cached keys and values where its network has them."""

    def choose(place: int, logits: Tensor) -> Tensor:
        return Categorical(logits).sample(generator)

    parts = [list(prompts[first : first + teacher.microbatch]) for first in range(0, len(prompts), teacher.microbatch)]
    found = [codes for part in parts if (codes := _cached(teacher, teacher.model.encode(part), choose)) is not None]
    return torch.cat(found) if found else teacher.draw(prompts, generator)


@torch.no_grad()
def mapped(teacher: Policy, noise: Tensor, cond: Cond, codes: Tensor, steps: int) -> Tensor:
    """(N, L) the codes to which the flow brings noise (N, L, d), one position after another (2412.17153, section 3.2).

    The teacher is asked once a position (twice when it is guided), whatever ``steps`` the flow has.
    """

    def choose(place: int, logits: Tensor) -> Tensor:
        return flow_to_code(noise[:, place], logits.to(noise).log_softmax(-1), codes.to(noise), steps)

    if (cached := _cached(teacher, cond, choose)) is not None:
        return nearest(cached.to(noise), codes.to(noise))
    x, found, time = noise, torch.zeros(noise.shape[:2], dtype=torch.int64, device=noise.device), noise.new_ones(())
    for place in range(noise.shape[1]):
        found[:, place] = choose(place, teacher.denoiser(x, time.expand(len(x)), cond).x0[:, place])
        x = x.clone()
        x[:, place] = codes.to(noise)[found[:, place]]
    return found


@torch.no_grad()
def taught(teacher: Policy, before: Tensor, noisy: Tensor, rows: Tokens, draw: int) -> Tensor:
    """(N, L, d) the teacher's posterior means of noisy tokens after the codes ``before`` (N, L, d)."""
    logits = teacher.denoiser(before, noisy.new_ones(len(noisy)), rows.cond).x0.to(noisy)
    codes = teacher.kernel.codes.to(noisy)  # type: ignore[attr-defined]
    return posterior_mean(noisy, rows.times[:, draw].to(noisy), logits, codes)


def believed(model: TokenModel, before: Tensor, noisy: Tensor, rows: Tokens, draw: int) -> Tensor:
    """(N, L, d) a student's means of noisy tokens, of which those ``before`` (N, L, d) are no noise."""
    return model.mean(before, torch.zeros_like(rows.drawn), noisy, rows.times[:, draw], rows.cond)
