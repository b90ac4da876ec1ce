"""The smallest clip model: the toy of ``toy.py`` for every frame, with mixers of frames between its layers.

A clip is four points of the plane (or more) that turn around the mode of their prompt: frame f is
mode + 0.25 (cos(a f) u + sin(a f) v), u and v standard normal, a = 0.4. So every frame alone has the law of the toy's
images exactly, and what a clip adds is motion alone: four points on a line through it,
x_{f+1} - 2 cos(a) x_f + x_{f-1} = 0 about the mode, which ``motion_error`` measures.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tropism.base import Cond, Denoiser, Hops
from tropism.denoisers import ConsistencyDenoiser, NetDenoiser, regression_target
from tropism.models.toy import MODES, PROMPTS, SPREAD, ToyNet, ToyTextToImage, _grid, _waves, linear
from tropism.schedules import Spacing, add_noise

FRAMES, TURN = 4, 0.4


class Mixer(nn.Module):
    """hidden (B * F, width) -> the same, once all frames of a clip have seen one another; at first nothing is added."""

    def __init__(self, generator: torch.Generator, width: int = 96, inner: int = 24, frames: int = FRAMES) -> None:
        super().__init__()
        self.frames = frames
        self.down, self.up = linear(width, inner, generator), linear(inner, width, generator)
        self.mix = linear(frames * inner, frames * inner, generator)
        for value in self.up.parameters():
            nn.init.zeros_(value)

    def forward(self, hidden: Tensor) -> Tensor:
        """Frames of one clip are neighbours."""
        seen = nn.functional.silu(self.down(hidden)).reshape(-1, self.mix.in_features)
        mixed = nn.functional.silu(self.mix(seen)).reshape(len(hidden), -1)
        return hidden + self.up(mixed)  # type: ignore[no-any-return]


def clips(prompts: Tensor, generator: torch.Generator, frames: int = FRAMES) -> Tensor:
    """(B, frames, 2) drawn clips of prompts (B,) by number."""
    u, v = torch.randn(2, len(prompts), 1, 2, generator=generator)
    angle = TURN * torch.arange(frames)[:, None]
    drawn: Tensor = MODES[prompts][:, None] + SPREAD * (angle.cos() * u + angle.sin() * v)
    return drawn


def motion_error(clips: Tensor, prompts: Tensor) -> Tensor:
    """(B,) how far clips (B, 4, 2) are from turning evenly, in units of ``SPREAD``: 0 for drawn ones, and for frames
    that know nothing of one another sqrt(4 (2 + 4 cos(a)^2)) = 4.64 in root mean square. Clips may have more frames."""
    x = (clips - MODES[prompts][:, None]) / SPREAD
    off = x[:, 2:] - 2 * math.cos(TURN) * x[:, 1:-1] + x[:, :-2]
    found: Tensor = torch.linalg.vector_norm(off.flatten(1), dim=1)
    return found


class ToyClips:
    """``base.Distillable`` on clips (B, F, 2) of an image toy: its weights stay, mixers (three) are trained.

    ``decode`` lays the frames side by side: (B, 2 F). ``train_motion`` adds what the image toy has learnt since, as a
    LoRA would; ``train_both`` trains that together with the mixers instead.
    """

    frame_axis = 1  # of latents (B, ...)
    guidance_scale: float = 2.0
    _spacing: Spacing = "leading"

    def __init__(self, image: ToyTextToImage, mixers: nn.ModuleList) -> None:
        self.image, self.tokens, self.mixers = image, image.tokens, mixers
        self.frames = int(mixers[0].frames)  # type: ignore[arg-type]
        self.latent_shape = (self.frames, 2)
        self._base = copy.deepcopy(image.net).requires_grad_(False)
        self._was = copy.deepcopy(mixers).requires_grad_(False)
        self._more: dict[str, Tensor] = {}  # what is added to the image toy's weights
        self._now = {"share": 1.0, "reference": 0.0}  # views share these
        self.schedule = image.schedule
        self.denoiser: Denoiser = NetDenoiser(self._output, self.schedule, image.target)

    def _output(self, x: Tensor, number: Tensor, cond: Cond) -> Tensor:
        """x (B, F, 2), number (B,) -> as x."""
        before = bool(self._now["reference"])
        rows = x.flatten(0, 1)
        embeds = cond["prompt_embeds"].to(x).flatten(1).repeat_interleave(self.frames, 0)
        hidden = torch.cat(
            [rows, _waves(number.repeat_interleave(self.frames), rows, self.image.net.octaves), embeds], dim=1
        )
        for place in range(len(self._base.layers)):
            if place:
                hidden = nn.functional.silu((self._was if before else self.mixers)[place - 1](hidden))
            weight, bias = (self._weight(f"layers.{place}.{name}", before) for name in ("weight", "bias"))
            hidden = nn.functional.linear(hidden, weight.to(x), bias.to(x))
        return hidden.reshape(x.shape)

    def _weight(self, name: str, before: bool) -> Tensor:
        own = self._base.get_parameter(name)
        return own if before or name not in self._more else own + self._now["share"] * self._more[name]

    @classmethod
    def train(
        cls, image: ToyTextToImage, steps: int = 2000, seed: int = 0, rows: int = 128, frames: int = FRAMES
    ) -> ToyClips:
        """Mixers of a frozen image toy, learnt from drawn clips: Adam, lr 3e-3 falling to 0, prompts as in the toy."""
        generator = torch.Generator().manual_seed(seed)
        made = cls(image, nn.ModuleList(Mixer(generator, frames=frames) for _ in range(3)))
        adam = torch.optim.Adam(made.parameters(), lr=3e-3)
        fall = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
        null = made.null()["prompt_embeds"]
        for _ in range(steps):
            prompt = torch.randint(len(PROMPTS), (rows,), generator=generator)
            x0, eps = clips(prompt, generator, frames), torch.randn(rows, *made.latent_shape, generator=generator)
            t = 0.001 + 0.999 * torch.rand(rows, generator=generator)
            keep = torch.rand(rows, generator=generator) >= 0.1
            told = made.encode([PROMPTS[i] for i in prompt])["prompt_embeds"].where(keep[:, None, None], null)
            noisy = add_noise(made.schedule, x0, eps, t)
            said = made._output(noisy, made.schedule.net_time(t), {"prompt_embeds": told})
            loss = (said - regression_target(image.target, made.schedule, x0, eps, t)).square().mean()
            adam.zero_grad()
            torch.autograd.backward(loss)
            adam.step()
            fall.step()
        return cls(image, made.mixers)

    # What is trained.

    @property
    def has_spatial(self) -> bool:
        """Whether something is added to the image toy's weights."""
        return bool(self._more)

    def train_motion(self, spatial: ToyNet | None = None) -> None:
        """Trains the mixers, beside the weights of a distilled image toy, frozen."""
        if spatial is not None:
            own = dict(self._base.named_parameters())
            self._more = {n: (p - own[n]).detach().clone() for n, p in spatial.named_parameters() if n in own}

    def train_both(self) -> None:
        """Trains the mixers and the image toy's weights together."""
        self._more = {name: nn.Parameter(torch.zeros_like(value)) for name, value in self._base.named_parameters()}

    @contextmanager
    def spatial(self, share: float) -> Iterator[None]:
        """Inside, what is added to the image toy's weights counts for ``share``."""
        before, self._now["share"] = self._now["share"], share
        try:
            yield
        finally:
            self._now["share"] = before

    def parameters(self) -> list[nn.Parameter]:
        """The mixers', and after ``train_both`` what is added to the image toy's weights."""
        return [*self.mixers.parameters(), *(value for value in self._more.values() if isinstance(value, nn.Parameter))]

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the denoiser is the clip model as it was, on the image toy as it was."""
        before, self._now["reference"] = self._now["reference"], 1.0
        try:
            yield
        finally:
            self._now["reference"] = before

    # As the image toy.

    def encode(self, prompts: Sequence[str]) -> Cond:
        """As the image toy's."""
        return self.image.encode(prompts)

    def null(self) -> Cond:
        """As the image toy's."""
        return self.image.null()

    def phrases(self, prompts: Sequence[str]) -> Tensor:
        """As the image toy's."""
        return self.image.phrases(prompts)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, F, 2) -> (B, 2 F), the frames side by side."""
        return latents.flatten(1)

    def latents(self, images: Tensor) -> Tensor:
        """(B, 2 F) -> (B, F, 2)."""
        points: Tensor = images.unflatten(1, (-1, 2))
        return points

    def grid(self, steps: int) -> Tensor:
        """(steps + 1,) as the image toy's."""
        return _grid(self.schedule, steps, self._spacing)

    def few_step(self, hops: Hops, steps: int, guidance: float | None = None) -> ToyClips:
        """The same network, unguided. Raises ValueError for jumps and for guidance: it is told one time and no more."""
        if guidance is not None:
            raise ValueError(f"guidance is {guidance}, and this toy cannot be told it; leave it out")
        if hops == "jump":
            raise ValueError("this toy is told one time, and cannot be told where to jump; take consistency or ode")
        view = copy.copy(self)
        view.guidance_scale, view._spacing = 1.0, "trailing"
        if hops == "consistency":
            view.denoiser = ConsistencyDenoiser(self.denoiser, None if self.image.target == "flow" else 10.0)
        return view
