"""From what a network was trained to say (eps, x0, v or flow) to what it believes: both halves, float32, never NaN.

This is the only place that divides by alpha or sigma. With x = alpha x0 + sigma eps, the four targets are
eps, x0, v = alpha eps - sigma x0 (Salimans and Ho 2022, 2202.00512, appendix D) and flow = eps - x0 (2209.03003).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from tropism.base import Cond, Denoiser, Prediction, Schedule, bcast
from tropism.codebook import nearest
from tropism.schedules import RectifiedFlow, add_noise, net_time

Target = Literal["eps", "x0", "v", "flow"]
Net = Callable[[Tensor, Tensor, Cond], Tensor]
"""net(x (B, ...), number (B,), cond) -> (B, ...); the number is ``net_time`` of the schedule."""
TOLD = "told_guidance"
"""The entry of cond (B,) from which a network that takes guidance as an input reads it (see ``takes_guidance``)."""


END = "end_time"
"""The entry of cond (B,) from which a network that is told two times reads the second: ``net_time`` of it (see
``takes_end``)."""


MEAN = "noise_mean"
"""The entry of cond (B, ...) that is the mean of the noise, for a network that was trained with one (``Shifted``)."""
MASK = "mask"
"""The entry of cond (B, ...), of ones and zeros, that says what of a state is there; what fills it up is 0."""


def _known(target: str) -> None:
    if target not in get_args(Target):
        raise ValueError(f"unknown target {target!r}; wanted one of {', '.join(get_args(Target))}")


def regression_target(target: Target, schedule: Schedule, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """What a network with this target should say: x0 and eps (B, ...), t (B,) -> (B, ...).

    It is also the inverse of ``to_prediction``: given both halves of a Prediction it returns the network's output.
    """
    _known(target)
    if x0.shape != eps.shape:
        raise ValueError(f"x0 {tuple(x0.shape)} and eps {tuple(eps.shape)} must have the same shape")
    if target == "v":
        return bcast(schedule.alpha(t), x0) * eps - bcast(schedule.sigma(t), x0) * x0
    return {"eps": eps, "x0": x0, "flow": eps - x0}[target]


def to_prediction(target: Target, schedule: Schedule, output: Tensor, x: Tensor, t: Tensor) -> Prediction:
    """Both halves, with x = alpha x0 + sigma eps, float32: output and x (B, ...), t (B,).

    At sigma = 0 the sample is its own x0 (and eps is 0 where the network does not say it). At alpha = 0 an eps output
    says nothing about x0: raises ValueError.
    """
    _known(target)
    if output.shape != x.shape:
        raise ValueError(f"the network answered {tuple(output.shape)} for x {tuple(x.shape)}; wanted the same shape")
    output, x = output.float(), x.float()
    alpha, sigma = bcast(schedule.alpha(t), x), bcast(schedule.sigma(t), x)
    if target == "v":
        norm = alpha**2 + sigma**2
        return Prediction((alpha * x - sigma * output) / norm, (sigma * x + alpha * output) / norm)
    if target == "flow":
        norm = alpha + sigma
        return Prediction((x - sigma * output) / norm, (x + alpha * output) / norm)
    if target == "x0":
        return consistent(output, x, alpha, sigma)
    if bool((alpha == 0).any()):
        raise ValueError(
            "an eps network says nothing at alpha = 0 (zero terminal SNR); start later or use a v, x0 or flow network"
        )
    return Prediction((x - sigma * output) / alpha, output)


def consistent(x0: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Prediction:
    """The Prediction at x whose clean half is x0; alpha and sigma fit x. At sigma = 0: x0 = x / alpha, eps = 0."""
    noisy = sigma > 0
    eps = ((x - alpha * x0) / sigma.where(noisy, 1.0)).where(noisy, 0.0)
    return Prediction(x0.where(noisy, x / alpha.where(alpha > 0, 1.0)), eps)


def consistent_with(eps: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor, x0: Tensor) -> Prediction:
    """The Prediction at x whose noise half is eps; alpha and sigma fit x. At alpha = 0, where that says nothing of the
    clean half, it is x0."""
    seen = alpha > 0
    return Prediction(((x - sigma * eps) / alpha.where(seen, 1.0)).where(seen, x0), eps)


@dataclass(frozen=True, eq=False)
class NetDenoiser:
    """A network as a Denoiser. ``dtype`` is what x is cast to before the network sees it; None leaves float32.

    ``takes_guidance`` says that the network was distilled from guided answers (2210.03142) and reads the scale from
    cond[TOLD], or takes its default where there is none. ``takes_end`` says that it reads a second time from cond[END].
    """

    net: Net
    schedule: Schedule
    target: Target
    dtype: torch.dtype | None = None
    takes_guidance: bool = False
    takes_end: bool = False

    def __post_init__(self) -> None:
        _known(self.target)

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        """x (B, ...), t (B,). Raises ValueError for an eps network at alpha = 0."""
        output = self.net(x if self.dtype is None else x.to(self.dtype), net_time(self.schedule, t), cond)
        return to_prediction(self.target, self.schedule, output, x, t)


def target_of(denoiser: Denoiser) -> Target:
    """What the network inside was trained to say; eps where it is not a ``NetDenoiser``'s."""
    while not isinstance(denoiser, NetDenoiser) and hasattr(denoiser, "inner"):
        denoiser = denoiser.inner
    return denoiser.target if isinstance(denoiser, NetDenoiser) else "eps"


def denoising_error(denoiser: Denoiser, x0: Tensor, eps: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """(B,) the mean squared error of what is said of x0 with noise eps at t, in the network's own target."""
    target, schedule = target_of(denoiser), denoiser.schedule
    prediction = denoiser(add_noise(schedule, x0, eps, t), t, cond)
    said = regression_target(target, schedule, prediction.x0, prediction.eps, t)
    return (said - regression_target(target, schedule, x0, eps, t)).square().flatten(1).mean(1)


def takes_guidance(denoiser: Denoiser) -> bool:
    """Whether its network is told the guidance, instead of being asked twice."""
    return bool(getattr(denoiser, "takes_guidance", False))


def untold(denoiser: Denoiser, cond: Cond) -> Cond:
    """cond without cond[TOLD] for a denoiser that takes no guidance: what its student is told is not for it."""
    return cond if takes_guidance(denoiser) else {name: value for name, value in cond.items() if name != TOLD}


@dataclass(frozen=True, eq=False)
class ConsistencyDenoiser:
    """A consistency model f = c_skip x + c_out x0, the inner denoiser's x0 held to f(x, 0) = x.

    c_skip = d^2 / (r^2 + d^2), c_out = r / sqrt(r^2 + d^2), with d = sigma_data and r = timestep_scaling * the
    network's timestep (2303.01469, eq. 5, in the discrete form of latent consistency models, 2310.04378). The noise
    half follows from f. ``timestep_scaling`` None takes the inner x0 as it is, as diffusers' FlowMatchLCMScheduler
    does: on a straight path x0 = x - t v has the boundary condition by itself.
    """

    inner: Denoiser
    timestep_scaling: float | None = 10.0
    sigma_data: float = 0.5

    @property
    def schedule(self) -> Schedule:
        """The inner denoiser's."""
        return self.inner.schedule

    @property
    def takes_guidance(self) -> bool:
        """As the inner denoiser."""
        return takes_guidance(self.inner)

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        """x (B, ...), t (B,). Raises TypeError when the schedule has no net_time."""
        if self.timestep_scaling is None:
            return self.inner(x, t, cond)
        x = x.float()
        scaled = net_time(self.schedule, t).float() * self.timestep_scaling
        total = scaled**2 + self.sigma_data**2
        skip, out = bcast(self.sigma_data**2 / total, x), bcast(scaled / total.sqrt(), x)
        answer = skip * x + out * self.inner(x, t, cond).x0
        return consistent(answer, x, bcast(self.schedule.alpha(t), x), bcast(self.schedule.sigma(t), x))


def takes_end(denoiser: Denoiser) -> bool:
    """Whether its network can be told a second time: where on the path it is asked to go."""
    return bool(getattr(denoiser, "takes_end", False))


@dataclass(frozen=True, eq=False)
class FlowMap:
    """A model that jumps from any time t to any s <= t along the path (2310.02279; flow maps, 2406.07507).

    What the inner denoiser believes at (x, t) when it is told s is such that alpha(s) x0 + sigma(s) eps is the state at
    s: for a network that says eps - x0 on a straight path this is x - (t - s) u, with u the mean velocity from s to t.
    Without cond[END] it is told t itself, where it is an ordinary denoiser. Raises ValueError for a network that cannot
    be told.
    """

    inner: Denoiser

    def __post_init__(self) -> None:
        if not takes_end(self.inner):
            raise ValueError(
                "the network of this model is told one time, and this method needs one that is told a second, where to "
                "jump; take lcm or mlcm, or a model of your own with takes_end"
            )

    @property
    def schedule(self) -> Schedule:
        """The inner denoiser's."""
        return self.inner.schedule

    @property
    def takes_guidance(self) -> bool:
        """As the inner denoiser."""
        return takes_guidance(self.inner)

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        """x (B, ...), t (B,), cond[END] (B,) as ``towards`` writes it."""
        return self.inner(x, t, cond if END in cond else towards(self, cond, t))


def is_flow_map(denoiser: Denoiser | None) -> bool:
    """Whether it jumps where it is told, also inside denoisers around it."""
    return denoiser is not None and (isinstance(denoiser, FlowMap) or is_flow_map(getattr(denoiser, "inner", None)))


def towards(denoiser: Denoiser, cond: Cond, end: Tensor) -> Cond:
    """cond (B rows) that tells a flow map the time ``end`` (B,); for any other denoiser cond as it is."""
    return {**cond, END: net_time(denoiser.schedule, end)} if is_flow_map(denoiser) else cond


@dataclass(frozen=True, eq=False)
class Preconditioned:
    """x0 = c_skip x + c_out F(c_in x, time) on a variance-exploding path (2206.00364, table 1), level = sigma / alpha.

    With ``floor`` the boundary of consistency models holds: x0 = x at that level (2303.01469, appendix C; 2310.14189).
    ``net`` gets ``net_time`` of the schedule, which for EDM's is ln(level) / 4.
    """

    net: Net
    schedule: Schedule
    sigma_data: float = 0.5
    floor: float = 0.0

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        """x (B, ...), t (B,). Below ``floor`` the level counts as ``floor``."""
        x, data = x.float(), self.sigma_data
        level = (self.schedule.sigma(t) / self.schedule.alpha(t)).clamp(min=self.floor)
        scale = (level**2 + data**2).sqrt()
        skip, out = data**2 / ((level - self.floor) ** 2 + data**2), (level - self.floor) * data / scale
        clean = x / bcast(self.schedule.alpha(t), x)
        said = self.net(bcast(1 / scale, x) * clean, net_time(self.schedule, t), cond)
        answer = bcast(skip, x) * clean + bcast(out, x) * said.float()
        return consistent(answer, x, bcast(self.schedule.alpha(t), x), bcast(self.schedule.sigma(t), x))


@dataclass(frozen=True, eq=False)
class Shifted:
    """What a denoiser trained with noise of mean m = cond[MEAN] (B, ...) says of noise of mean 0.

    Its path is x_t = alpha x_0 + sigma (z + m) with z ~ N(0, I) (2305.06908; m is what a score, a text or a coarse
    sample suggests). Less sigma m that is the path every kernel walks, so they are unchanged: a chain that starts at
    unit noise here starts at noise of mean m there, and noise that is drawn again has its mean by itself. x0 is the
    same, and so is the clean end.
    """

    inner: Denoiser

    @property
    def schedule(self) -> Schedule:
        """The inner denoiser's."""
        return self.inner.schedule

    @property
    def takes_guidance(self) -> bool:
        """As the inner denoiser."""
        return takes_guidance(self.inner)

    @property
    def takes_end(self) -> bool:
        """As the inner denoiser."""
        return takes_end(self.inner)

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        """x (B, ...), t (B,). Raises ValueError where cond has no mean of the shape of x."""
        mean = cond.get(MEAN)
        if mean is None or mean.shape != x.shape:
            got = "no" if mean is None else f"{tuple(mean.shape)}"
            raise ValueError(f"cond has {got} {MEAN} for x {tuple(x.shape)}; wanted one of the same shape")
        x0, eps = self.inner(x.float() + bcast(self.schedule.sigma(t), x) * mean.float(), t, cond)
        return Prediction(x0, eps - mean.float())


def has_mean(denoiser: Denoiser | None) -> bool:
    """Whether its noise has a mean, also inside denoisers around it."""
    return denoiser is not None and (isinstance(denoiser, Shifted) or has_mean(getattr(denoiser, "inner", None)))


@dataclass(frozen=True, eq=False)
class Clipped:
    """A denoiser whose x0 stays in [-bound, bound], as diffusers' clip_sample and thresholding do for pixel models.

    Goes outside guidance, where schedulers clip. ``quantile`` (Imagen, 2205.11487, section 2.3) clips each row at that
    quantile of |x0|, between 1 and ``bound``, and divides by it. The noise half stays the network's, as in
    DDIMScheduler: x = alpha x0 + sigma eps then no longer holds, unless ``rederive`` computes eps from the clipped x0,
    as DDPMScheduler does.
    """

    inner: Denoiser
    bound: float = 1.0
    quantile: float | None = None
    rederive: bool = False

    @property
    def schedule(self) -> Schedule:
        """The inner denoiser's."""
        return self.inner.schedule

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        """x (B, ...), t (B,)."""
        x0, eps = self.inner(x, t, cond)
        if self.quantile is None:
            x0 = x0.clamp(-self.bound, self.bound)
        else:
            size = bcast(x0.flatten(1).abs().quantile(self.quantile, dim=1).clamp(1.0, max(self.bound, 1.0)), x0)
            x0 = x0.clamp(-size, size) / size
        if not self.rederive:
            return Prediction(x0, eps)
        return consistent(x0, x.float(), bcast(self.schedule.alpha(t), x), bcast(self.schedule.sigma(t), x))


@dataclass(frozen=True, eq=False)
class TokenDenoiser:
    """A token model as a denoiser: what it believes of the clean tokens are logits, not points.

    ``logits(x (B, L, d), cond)`` -> (B, L, V): at each position what follows the codes before it. They are the clean
    half of the prediction, so that guidance combines logits (2406.06525, section 3.3); there is no noise half.
    """

    logits: Callable[[Tensor, Cond], Tensor]
    codes: Tensor  # (V, d)
    schedule: Schedule = field(default_factory=lambda: RectifiedFlow(num_train_timesteps=1))  # of one token's own path

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        """x (B, L, d); t is not read: no logits depend on what is not decided yet."""
        said = self.logits(x, cond)
        return Prediction(said, torch.zeros_like(said))


@dataclass(frozen=True, eq=False)
class OnePass:
    """A student that says all tokens at once, from the decided ones and noise for the others (2510.21003).

    ``says(x (B, L, d), drawn (B, L), cond)`` -> (B, L, d) points, ``drawn`` where x is noise; they are shown as the
    nearest codes. Without gradient for that reason.
    """

    says: Callable[[Tensor, Tensor, Cond], Tensor]
    codes: Tensor  # (V, d)
    schedule: Schedule = field(default_factory=lambda: RectifiedFlow(num_train_timesteps=1))

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        """x (B, L, d), t (B,): the first (1 - t) L positions are decided, and stay as they are."""
        known = ((1 - t) * x.shape[1]).round()
        drawn = torch.arange(x.shape[1], device=x.device) >= known[:, None]
        codes = self.codes.to(x)
        said = codes[nearest(self.says(x, drawn, cond), codes)]
        return Prediction(torch.where(drawn[..., None], said, x), torch.where(drawn[..., None], x, 0.0))
