"""Models that draw a picture token by token, and their students that say all tokens at once.

The state is (B, L, d): codes where tokens are decided, noise where they are not. Drawing is a chain of L moves, each
with an exact law (``samplers.NextToken``), so that policies, evaluation and methods are those of any other model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from tropism.base import Cond, Hops
from tropism.denoisers import OnePass, TokenDenoiser
from tropism.models.own import Encode, OwnModel

Choose = Callable[[int, Tensor], Tensor]
"""choose(place, logits (B, V)) -> (B,) numbers of the codes there."""


class TokenNet(Protocol):
    """What ``ImageTokens`` asks of a network (an ``nn.Module``)."""

    codes: Tensor  # (V, d)
    length: int

    def logits(self, x: Tensor, cond: Cond) -> Tensor:
        """Codes (B, L, d) -> (B, L, V): of each position, after the codes before it."""
        ...

    def flow(self, before: Tensor, drawn: Tensor, x: Tensor, t: Tensor, cond: Cond, alone: bool = False) -> Tensor:
        """(B, L, d + V): of each position's code, what is believed when tokens ``before`` it (B, L, d) are seen, which
        are noise where ``drawn`` (B, L), and its own noisy point x (B, L, d) at t (B, L): its mean, and logits.
        ``alone``: the mean (B, L, d) without the logits, which cost the most where codes are many."""
        ...


class ImageTokens(OwnModel):
    """``network`` as a model; ``encode`` and ``decode`` as in ``OwnModel``, for tokens (B, L, d).

    The same network is teacher (``logits``) and student (``flow``): inside ``reference()`` both are as they were before
    training. A LoRA adapts what it can; the head of ``flow`` begins untrained, so students are trained in full.
    """

    def __init__(
        self,
        network: Any,
        encode: Encode,
        decode: Callable[[Tensor], Tensor],
        *,
        guidance_scale: float = 1.0,
        negative_prompt: str = "",
        latents: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        codes: Tensor = network.codes.detach().clone().float()
        super().__init__(
            network,
            encode,
            decode,
            (network.length, codes.shape[1]),
            guidance_scale=guidance_scale,
            steps=network.length,
            negative_prompt=negative_prompt,
            latents=latents,
        )
        self.codes = codes
        self.denoiser = TokenDenoiser(self.logits, codes)

    def logits(self, x: Tensor, cond: Cond) -> Tensor:
        """Codes (B, L, d) -> (B, L, V), float32 or better: of each position, after the codes before it."""
        return self._asked("logits", x, cond)

    def one_by_one(self, cond: Cond, scale: float, choose: Choose) -> Tensor | None:
        """(B, L, d) codes that ``choose`` picks by guided logits, from cached keys and values; None where the network
        has no ``draw`` (``token_gpt.TokenGPT`` has)."""
        if not hasattr(self._network(), "draw"):
            return None
        rows = len(next(iter(cond.values())))
        null = {name: value.expand(rows, *value.shape[1:]) for name, value in self.null().items()}
        return self._asked("draw", cond, None if scale == 1 else null, scale, None, choose)

    def flow(self, before: Tensor, drawn: Tensor, x: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """The mean (B, L, d) and the logits (B, L, V) of each position's code; arguments as ``TokenNet.flow``."""
        said = self._asked("flow", before, drawn, x, t, cond)
        return said[..., : self.codes.shape[1]], said[..., self.codes.shape[1] :]

    def mean(self, before: Tensor, drawn: Tensor, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The mean (B, L, d) of ``flow``, without its logits."""
        return self._asked("flow", before, drawn, x, t, cond, True)

    def says(self, x: Tensor, drawn: Tensor, cond: Cond) -> Tensor:
        """(B, L, d) all tokens in one pass, from codes (B, L, d) that are noise where ``drawn`` (B, L)."""
        return self.mean(x, drawn, x, drawn.to(x), cond)

    def _asked(self, name: str, *values: Any) -> Tensor:
        trained = self._trained
        if trained is None:
            said = getattr(self._network(), name)(*(self._cast(value, self._dtype) for value in values))
        else:
            with trained.precision():
                said = getattr(self._network(), name)(*(self._cast(value, trained.dtype) for value in values))
        return said if said.dtype == torch.float64 else said.float()  # type: ignore[no-any-return]

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        """Points in the network's format; flags and conditions as they are."""
        fits = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype) if fits else value

    def grid(self, steps: int) -> Tensor:
        """(steps + 1,) even times from 1 to 0. Raises ValueError unless a teacher has a move a token, and for a student
        of more moves than tokens."""
        length = self.latent_shape[0]
        if self.hops is None and steps != length:
            raise ValueError(f"steps is {steps}, but this model draws one of {length} tokens a move; wanted {length}")
        if steps > length:
            raise ValueError(f"steps is {steps}; wanted at most {length}, one for each token")
        return torch.linspace(1, 0, steps + 1)

    def few_step(self, hops: Hops, steps: int, guidance: float | None = None) -> Self:
        """A student that says all tokens at once, keeps the first 1 / steps of them, and says the rest anew.

        Raises ValueError for other hops than "ode": nothing else is without chance.
        """
        if hops != "ode":
            raise ValueError(
                f"a model of image tokens has no {hops} hops: it is distilled by dd1 or dd2, which say tokens at once"
            )
        return super().few_step(hops, steps, guidance)

    def _few_step_view(self, hops: Hops, steps: int) -> Self:
        view = copy.copy(self)
        view._guidance_scale = 1.0
        view.denoiser = OnePass(self.says, self.codes)
        return view

    def to(self, device: torch.device, dtype: torch.dtype) -> ImageTokens:
        """The network and its codes there."""
        super().to(device, dtype)
        self.codes = self.codes.to(device)
        self.denoiser = TokenDenoiser(self.logits, self.codes)
        return self


def waves(t: Tensor, count: int = 8) -> Tensor:
    """(...) times in [0, 1] -> (..., 2 count) sinusoids of pi 2^k t / 2."""
    angles = t[..., None] * torch.pi / 2 * 2.0 ** torch.arange(count, dtype=t.dtype, device=t.device)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class ChainNet(nn.Module):
    """Tokens of a Markov chain, whose logits are exact, and a small network that learns to say them at once.

    ``initial`` (V,) and ``transition`` (P, V, V) are probabilities, a table for each label; codes (V, d).
    """

    def __init__(
        self,
        initial: Tensor,
        transition: Tensor,
        codes: Tensor,
        length: int,
        width: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.length = length
        self.register_buffer("codes", codes)
        self.register_buffer("initial", initial.log())
        self.register_buffer("transition", transition.log())
        dimension, count = codes.shape[1], 4
        sizes = [length * (dimension + 2) + dimension + 2 * count + len(transition), width, width, width]
        self.count, self.layers = count, nn.ModuleList()
        for inside, outside in zip(sizes, [*sizes[1:], dimension + len(codes)], strict=True):
            layer = nn.Linear(inside, outside)
            bound = inside**-0.5
            for parameter in layer.parameters():
                parameter.data = (2 * torch.rand(parameter.shape, generator=generator) - 1) * bound
            self.layers.append(layer)

    def logits(self, x: Tensor, cond: Cond) -> Tensor:
        """(B, L, V), in closed form."""
        codes: Any = self.codes
        before = (x @ codes.T.to(x) - codes.to(x).square().sum(1) / 2).argmax(-1)[:, :-1]
        table: Any = self.transition
        later = table[cond["label"][:, None], before]
        first: Any = self.initial
        return torch.cat([first.expand(len(x), 1, -1), later], dim=1).to(x)

    def flow(self, before: Tensor, drawn: Tensor, x: Tensor, t: Tensor, cond: Cond, alone: bool = False) -> Tensor:
        """(B, L, d + V), or (B, L, d) ``alone``."""
        rows, length = before.shape[:2]
        seen = torch.ones(length, length, dtype=torch.bool, device=x.device).tril(-1)  # (which, of which position)
        told = torch.cat([before, drawn[..., None].to(before)], dim=-1)[:, None] * seen[..., None].to(before)
        place = torch.eye(length).to(before).expand(rows, -1, -1)
        table: Any = self.transition
        label = nn.functional.one_hot(cond["label"], len(table)).to(before)[:, None].expand(-1, length, -1)
        hidden = torch.cat([told.flatten(2), place, x, waves(t, self.count), label], dim=-1)
        for layer in self.layers[:-1]:
            hidden = nn.functional.silu(layer(hidden))
        said: Tensor = self.layers[-1](hidden)
        return said[..., : x.shape[-1]] if alone else said


STAYS = {"sticky": 0.85, "loose": 0.4}
CORNERS = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])


def chain_model(width: int = 128, length: int = 3, seed: int = 0) -> ImageTokens:
    """Three tokens of four codes, the corners of a square: "sticky" tokens are the one before with chance 0.85, "loose"
    ones with 0.4, else any of the others. The law of all 64 pictures is known (``chain_law``)."""
    tables = [torch.full((4, 4), (1 - stay) / 3).fill_diagonal_(stay) for stay in STAYS.values()]
    generator = torch.Generator().manual_seed(seed)
    network = ChainNet(torch.full((4,), 0.25), torch.stack(tables), CORNERS, length, width, generator)
    known = {name: place for place, name in enumerate([*STAYS])}

    def encode(prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"label": torch.tensor([known.get(prompt, 0) for prompt in prompts])}

    def shown(tokens: Tensor) -> Tensor:
        red, green = ((tokens.mT[:, :, None] + 1) / 2).split(1, dim=1)
        return torch.cat([red, green, torch.zeros_like(red)], dim=1)  # (B, 3, 1, L): a row of pixels

    return ImageTokens(network, encode, shown)


def chain_law(prompt: str, length: int = 3) -> Tensor:
    """(4,) * length probabilities of ``chain_model``'s pictures."""
    stay = STAYS[prompt]
    table = torch.full((4, 4), (1 - stay) / 3).fill_diagonal_(stay)
    law = torch.full((4,), 0.25)
    for _ in range(length - 1):
        law = law[..., None] * table
    return law
