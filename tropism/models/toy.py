"""Models whose answers are known: a Gaussian and a mixture in closed form, an instant trainable policy, and a 2-D toy.

The closed forms are perfect teachers: whatever goes wrong with them is the implementation's fault. ``ToyTextToImage``
is the smallest model with everything that a text-to-image pipeline has: prompts, embeddings, guidance, a trained
network, a reference.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from tropism.base import Cond, Denoiser, Hops, Prediction, Schedule, bcast
from tropism.denoisers import END, TOLD, ConsistencyDenoiser, FlowMap, NetDenoiser, regression_target
from tropism.schedules import DDPMTable, RectifiedFlow, Spacing, add_noise, ddpm_table, flow_grid, table_grid


@dataclass(frozen=True, eq=False)
class GaussianDenoiser:
    """Exact posterior means for x_0 ~ N(mean, std^2 I): mean (D,), std > 0, x (B, D)."""

    mean: Tensor
    std: float
    schedule: Schedule

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        """x (B, D), t (B,); cond is not read."""
        return gaussian_prediction(self.schedule, self.mean.to(x), self.std, x, t)

    def score(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Gradient of log p_t at x, (B, D)."""
        alpha, sigma = bcast(self.schedule.alpha(t), x), bcast(self.schedule.sigma(t), x)
        return -(x - alpha * self.mean.to(x)) / ((alpha * self.std) ** 2 + sigma**2)

    def tilted(self, direction: Tensor) -> tuple[GaussianDenoiser, float]:
        """The law p(x) exp(direction . x) / Z, again Gaussian, and log Z: direction (D,)."""
        evidence = direction @ self.mean + self.std**2 * direction @ direction / 2
        return GaussianDenoiser(self.mean + self.std**2 * direction, self.std, self.schedule), float(evidence)


def gaussian_prediction(schedule: Schedule, mean: Tensor, std: float, x: Tensor, t: Tensor) -> Prediction:
    """E[x_0 | x_t] and E[eps | x_t] for x_0 ~ N(mean, std^2 I): mean (D,) or (B, D), x (B, D), t (B,)."""
    alpha, sigma = bcast(schedule.alpha(t), x), bcast(schedule.sigma(t), x)
    residual = (x - alpha * mean) / ((alpha * std) ** 2 + sigma**2)
    return Prediction(mean + alpha * std**2 * residual, sigma * residual)


@dataclass(frozen=True, eq=False)
class MixtureDenoiser:
    """Exact posterior means for a mixture of M Gaussians: means (M, D), stds (M,), weights (M,), x (B, D).

    With ``labels`` (L, M), cond["label"] (B,) picks each row's component weights; -1, or no label, means ``weights``.
    """

    means: Tensor
    stds: Tensor
    weights: Tensor
    schedule: Schedule
    labels: Tensor | None = None

    def log_weights(self, rows: int, cond: Cond) -> Tensor:
        """(rows, M), normalised."""
        if "label" not in cond:
            return self.weights.log().log_softmax(0).expand(rows, -1)
        if self.labels is None:
            raise ValueError("cond has labels but this mixture has none; give it labels (L, M)")
        table = torch.cat([self.labels, self.weights[None]])
        return table[cond["label"]].log().log_softmax(1)

    def _parts(self, x: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor, Tensor]:
        """log of weight times density (B, M), residual over variance (B, M, D), alpha (B, 1)."""
        alpha, sigma = bcast(self.schedule.alpha(t), x), bcast(self.schedule.sigma(t), x)
        variance = (alpha * self.stds) ** 2 + sigma**2
        offset = x[:, None] - alpha[..., None] * self.means
        exponent = -(offset**2).sum(-1) / (2 * variance) - x.shape[1] / 2 * (2 * math.pi * variance).log()
        return self.log_weights(x.shape[0], cond) + exponent, offset / variance[..., None], alpha

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        """x (B, D), t (B,), cond {} or {"label": (B,) int64}."""
        logs, residual, alpha = self._parts(x, t, cond)
        share = logs.softmax(1)[..., None]
        x0 = self.means + alpha[..., None] * self.stds[:, None] ** 2 * residual
        return Prediction((share * x0).sum(1), bcast(self.schedule.sigma(t), x) * (share * residual).sum(1))

    def log_density(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """log p_t(x), (B,)."""
        return self._parts(x, t, cond)[0].logsumexp(1)

    def score(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Gradient of log p_t at x, (B, D)."""
        logs, residual, _ = self._parts(x, t, cond)
        return -(logs.softmax(1)[..., None] * residual).sum(1)

    def tilted(self, direction: Tensor) -> tuple[MixtureDenoiser, float]:
        """The unconditional law times exp(direction . x) / Z, again a mixture, and log Z: direction (D,)."""
        gain = self.means @ direction + self.stds**2 * (direction @ direction) / 2
        logs = self.weights.log().log_softmax(0) + gain
        means = self.means + self.stds[:, None] ** 2 * direction
        return MixtureDenoiser(means, self.stds, logs.softmax(0), self.schedule), float(logs.logsumexp(0))


def guided_score(
    model: GaussianDenoiser | MixtureDenoiser, x: Tensor, t: Tensor, cond: Cond, null: Cond, w: float
) -> Tensor:
    """The score of p_t(x | null)^(1 - w) p_t(x | cond)^w, what guidance follows: (B, D). null has B rows."""
    return (1 - w) * model.score(x, t, null) + w * model.score(x, t, cond)


class GaussianPolicy:
    """A trainable TextToImage without a network: prompt i's law is N(means[i], std^2 I), and the means are the
    parameters.

    Implements ``base.TextToImage`` on points (B, D). With reward a . x and a penalty beta KL(policy || reference) in
    x_0, the optimum is known: means[i] + std^2 a / beta. The null row is N(0, std^2 I) and is never trained.
    """

    guidance_scale = 1.0

    def __init__(
        self, prompts: Sequence[str], means: Tensor, std: float = 0.5, schedule: Schedule | None = None
    ) -> None:
        if means.ndim != 2 or means.shape[0] != len(prompts):
            raise ValueError(f"means must be (prompts, D) = ({len(prompts)}, D); got {tuple(means.shape)}")
        self.schedule = schedule if schedule is not None else ddpm_table(1000, 0.00085, 0.012, "scaled_linear")
        self.means, self.std = nn.Parameter(means.clone().float()), std
        self.latent_shape = (means.shape[1],)
        self._rows = {prompt: row for row, prompt in enumerate(prompts)}
        self._before, self._reference = self.means.detach().clone(), False

    @property
    def denoiser(self) -> Denoiser:
        """The policy itself, or inside ``reference()`` what it was."""
        return _PolicyDenoiser(self)

    def prediction(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        """x (B, D), t (B,), cond {"label": (B,)}."""
        table = self._before if self._reference else self.means
        return gaussian_prediction(
            self.schedule, torch.cat([table, torch.zeros_like(table[:1])])[cond["label"]], self.std, x, t
        )

    def encode(self, prompts: Sequence[str]) -> Cond:
        """{"label": (B,)}. Raises ValueError on an unknown prompt."""
        return {"label": torch.tensor(_places(prompts, self._rows))}

    def null(self) -> Cond:
        """One row, label -1."""
        return {"label": torch.tensor([-1])}

    def phrases(self, prompts: Sequence[str]) -> Tensor:
        """(B, 0): these prompts have no tokens."""
        return torch.zeros(len(prompts), 0, dtype=torch.int64)

    def decode(self, latents: Tensor) -> Tensor:
        """The points themselves, (B, D)."""
        return latents

    def grid(self, steps: int) -> Tensor:
        """(steps + 1,) times for the schedule: shifted flow levels, or a table's leading timesteps."""
        return _grid(self.schedule, steps)

    def parameters(self) -> list[nn.Parameter]:
        """The means, (prompts, D)."""
        return [self.means]

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the means are those of the start."""
        before, self._reference = self._reference, True
        try:
            yield
        finally:
            self._reference = before


@dataclass(frozen=True, eq=False)
class _PolicyDenoiser:
    policy: GaussianPolicy

    @property
    def schedule(self) -> Schedule:
        return self.policy.schedule

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        return self.policy.prediction(x, t, cond)


def _places(prompts: Sequence[str], known: Mapping[str, int]) -> list[int]:
    unknown = sorted(set(prompts) - set(known))
    if unknown:
        raise ValueError(f"unknown prompts {unknown}; this toy knows {list(known)}")
    return [known[prompt] for prompt in prompts]


def _grid(schedule: Schedule, steps: int, spacing: Spacing = "leading") -> Tensor:
    if isinstance(schedule, RectifiedFlow):
        return flow_grid(steps, schedule.shift, last=1 / steps)
    if isinstance(schedule, DDPMTable):
        return table_grid(schedule.size, steps, spacing, steps_offset=int(spacing == "leading"))
    return torch.linspace(1, 0, steps + 1)


PROMPTS = tuple(f"angle {angle} radius {radius}" for angle in range(4) for radius in (1, 2))
"""The eight prompts of the 2-D toy; prompt i's data are N(MODES[i], 0.25^2 I), the radius at angle * 90 degrees."""
MODES = torch.tensor([[(1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0)][a] for a in range(4) for _ in (1, 2)])
MODES = MODES * torch.tensor([1.0, 2.0] * 4)[:, None]
SPREAD = 0.25


class ToyNet(nn.Module):
    """A SiLU network: x (B, 2), number (B,), cond["prompt_embeds"] (B, 2, 16), two phrase tokens -> (B, 2).

    It can be told a second time, cond[END] (B,), and the guidance, cond[TOLD] (B,). The first ``octaves`` of the 8
    waves in which it sees a time are told; all are 100 radians fast, 3 are 3."""

    def __init__(self, generator: torch.Generator, width: int = 96, token: int = 16, octaves: int = 8) -> None:
        super().__init__()
        self.octaves = octaves
        sizes = (2 + 16 + 2 * token, width, width, width, 2)
        self.layers = nn.ModuleList(linear(a, b, generator) for a, b in itertools.pairwise(sizes))
        self.end, self.told = (nn.utils.skip_init(nn.Linear, 16, width, bias=False) for _ in range(2))
        for more in (self.end, self.told):
            nn.init.zeros_(more.weight)  # so that being told more changes nothing at first

    def forward(self, x: Tensor, number: Tensor, cond: Cond) -> Tensor:
        """``number``, and cond[END] if there is one, run over 0..1000; a scale of guidance over about 0..10."""
        told = torch.cat([x, _waves(number, x, self.octaves), cond["prompt_embeds"].to(x).flatten(1)], dim=1)
        hidden = self.layers[0](told)
        if END in cond:
            hidden = hidden + self.end(_waves(cond[END], x, self.octaves))
        if TOLD in cond:
            hidden = hidden + self.told(_waves(25 * cond[TOLD], x, self.octaves))
        for layer in self.layers[1:]:
            hidden = layer(nn.functional.silu(hidden))
        return hidden  # type: ignore[no-any-return]


def _waves(number: Tensor, x: Tensor, octaves: int) -> Tensor:
    """(B,) of 0..1000 -> (B, 16), as x in dtype and place; of the waves beyond so many octaves the start."""
    speeds = 2.0 ** torch.arange(8, device=x.device) * math.pi / 4
    angle = (number.to(x) / 1000)[:, None] * speeds.where(torch.arange(8, device=x.device) < octaves, 0.0).to(x)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """A linear layer drawn from this generator; the global one is not touched."""
    layer = nn.Linear(inputs, outputs, device="meta").to_empty(device="cpu")
    for value in (layer.weight, layer.bias):
        nn.init.uniform_(value, -(inputs**-0.5), inputs**-0.5, generator=generator)
    return layer


class ToyTextToImage:
    """``base.TextToImage`` on points in the plane: prompts ``PROMPTS``, images (B, 2), every weight of the network
    trainable.

    cond is {"prompt_embeds": (B, 2, 16)}: one token for the angle, one for the radius, learned with the network and
    then frozen, as a text encoder is; the null row holds both null tokens. Made by ``train``.
    """

    latent_shape = (2,)
    guidance_scale: float = 2.0
    _spacing: Spacing = "leading"

    def __init__(self, net: ToyNet, tokens: Tensor, target: Literal["eps", "flow"] = "eps") -> None:
        """``tokens`` (8, 16): four angles, their null, two radii, their null."""
        self.net, self.tokens, self.target = net, tokens, target
        flow = target == "flow"
        self.schedule = RectifiedFlow() if flow else ddpm_table(1000, 0.00085, 0.012, "scaled_linear")
        self._frozen, self._now = copy.deepcopy(net).requires_grad_(False), {"reference": False}  # views share these
        self.denoiser: Denoiser = NetDenoiser(self._output, self.schedule, target, takes_end=True)

    @property
    def network(self) -> ToyNet:
        """What is trained, or inside ``reference`` what it was."""
        return self._frozen if self._now["reference"] else self.net

    def _output(self, x: Tensor, number: Tensor, cond: Cond) -> Tensor:
        return self.network(x, number, cond)  # type: ignore[no-any-return]

    @classmethod
    def train(
        cls,
        steps: int = 4000,
        seed: int = 0,
        target: Literal["eps", "flow"] = "eps",
        rows: int = 256,
        octaves: int = 8,
    ) -> ToyTextToImage:
        """Adam on the mean squared error of the target, lr 2e-3 falling to 0, 10% of prompts dropped; its own
        generator. ``octaves`` as ``ToyNet``.

        About 2.5 ms a step on one core: 1,000 steps are a usable model, 4,000 a good one.
        """
        generator = torch.Generator().manual_seed(seed)
        net, tokens = ToyNet(generator, octaves=octaves), nn.Parameter(torch.randn(8, 16, generator=generator))
        toy = cls(net, tokens, target)
        adam = torch.optim.Adam([*net.parameters(), tokens], lr=2e-3, fused=True)
        fall = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
        for _ in range(steps):
            prompt = torch.randint(8, (rows,), generator=generator)
            x0 = MODES[prompt] + SPREAD * torch.randn(rows, 2, generator=generator)
            eps, t = torch.randn(rows, 2, generator=generator), torch.rand(rows, generator=generator)
            t = t if target == "flow" else 0.001 + 0.999 * t
            keep = torch.rand(rows, generator=generator) >= 0.1
            index = _token_index(prompt).where(keep[:, None], torch.tensor([4, 7]))
            noisy = add_noise(toy.schedule, x0, eps, t)
            said = net(noisy, toy.schedule.net_time(t), {"prompt_embeds": tokens[index]})
            loss = (said - regression_target(target, toy.schedule, x0, eps, t)).square().mean()
            adam.zero_grad()
            torch.autograd.backward(loss)
            adam.step()
            fall.step()
        return cls(net.eval(), tokens.detach(), target)

    def encode(self, prompts: Sequence[str]) -> Cond:
        """{"prompt_embeds": (B, 2, 16)}. Raises ValueError for what is not one of ``PROMPTS``."""
        index = torch.tensor(_places(prompts, {prompt: place for place, prompt in enumerate(PROMPTS)}))
        return {"prompt_embeds": self.tokens.detach()[_token_index(index)]}

    def null(self) -> Cond:
        """One row: both null tokens, (1, 2, 16)."""
        return {"prompt_embeds": self.tokens.detach()[None, [4, 7]]}

    def phrases(self, prompts: Sequence[str]) -> Tensor:
        """(B, 2): the first token is the angle's phrase, the second the radius's."""
        return torch.arange(2).expand(len(prompts), 2)

    def decode(self, latents: Tensor) -> Tensor:
        """The points themselves, (B, 2)."""
        return latents

    def grid(self, steps: int) -> Tensor:
        """(steps + 1,): even flow levels, or the table's leading timesteps with offset 1; of few steps its trailing."""
        return _grid(self.schedule, steps, self._spacing)

    def parameters(self) -> list[nn.Parameter]:
        """All of the network's; the tokens stay as they are."""
        return list(self.net.parameters())

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the denoiser is the network as it was when this object was made."""
        before, self._now["reference"] = self._now["reference"], True
        try:
            yield
        finally:
            self._now["reference"] = before

    def latents(self, images: Tensor) -> Tensor:
        """The points themselves, (B, 2)."""
        return images

    def few_step(self, hops: Hops, steps: int, guidance: float | None = None) -> ToyTextToImage:
        """The same network, unguided or told; a consistency model noises its answer again, a flow map is told where
        to."""
        view = copy.copy(self)
        view.guidance_scale, view._spacing = 1.0 if guidance is None else guidance, "trailing"
        if guidance is not None:
            assert isinstance(self.denoiser, NetDenoiser)
            view.denoiser = replace(self.denoiser, takes_guidance=True)
        if hops == "consistency":
            view.denoiser = ConsistencyDenoiser(view.denoiser, None if self.target == "flow" else 10.0)
        if hops == "jump":
            view.denoiser = FlowMap(view.denoiser)
        return view


def _token_index(prompt: Tensor) -> Tensor:
    """(B,) prompt numbers -> (B, 2) rows of the token table."""
    return torch.stack([prompt // 2, 5 + prompt % 2], dim=1)
