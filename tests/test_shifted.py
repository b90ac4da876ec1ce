"""Noise with a mean, in closed form: a chain of shifted noise is the chain of plain noise, translated."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from nets import FLOW, TABLE, randn
from torch import Tensor

from tropism.base import Cond, Prediction, Schedule, bcast
from tropism.denoisers import MEAN, ConsistencyDenoiser, NetDenoiser, Shifted, consistent, has_mean
from tropism.guidance import Guided
from tropism.models.toy import GaussianDenoiser
from tropism.samplers import DDIM, Consistency, Heun, Jump, walk
from tropism.schedules import EDM

M, S = torch.tensor([0.3, -0.7, 1.1]), 0.4  # data: N(M, S^2)
MU = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, -0.4]])  # of the noise, one a row
COND = {MEAN: MU}


@dataclass(frozen=True)
class Exact:
    """E[x_0 | x_t] and E[z + mu | x_t] for x_t = alpha x_0 + sigma (z + mu), from the joint Gaussian."""

    schedule: Schedule

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        alpha, sigma = bcast(self.schedule.alpha(t), x), bcast(self.schedule.sigma(t), x)
        off = (x - alpha * M - sigma * cond[MEAN]) / (alpha**2 * S**2 + sigma**2)
        return Prediction(M + alpha * S**2 * off, cond[MEAN] + sigma * off)


@dataclass(frozen=True)
class Flown:
    """The exact consistency function there: the end of the path on which x_t keeps its quantile."""

    schedule: Schedule

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Prediction:
        alpha, sigma = bcast(self.schedule.alpha(t), x), bcast(self.schedule.sigma(t), x)
        x0 = M + S / (alpha**2 * S**2 + sigma**2).sqrt() * (x - alpha * M - sigma * cond[MEAN])
        return consistent(x0, x, alpha, sigma)


@pytest.mark.parametrize(
    "schedule", [EDM(), EDM(variance_preserving=True), FLOW, TABLE], ids=lambda s: type(s).__name__
)
def test_less_its_mean_the_noise_is_plain(schedule: Schedule) -> None:
    plain = GaussianDenoiser(M, S, schedule)
    for time in (0.0, 0.02, 0.5, 1.0):
        t, x = torch.full((2,), time), randn(2, 3) * max(1.0, float(schedule.sigma(torch.tensor([time]))))
        said, wanted = Shifted(Exact(schedule))(x, t, COND), plain(x, t, {})
        torch.testing.assert_close(said.x0, wanted.x0, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(said.eps, wanted.eps, rtol=2e-5, atol=2e-5)
        rest = bcast(schedule.alpha(t), x) * said.x0 + bcast(schedule.sigma(t), x) * said.eps - x
        assert rest.abs().max() < 2e-5 * x.abs().max().clamp(min=1)


@pytest.mark.parametrize("kernel", [DDIM(0.0), DDIM(1.0), Heun(), Consistency(), Jump(0.5)], ids=repr)
def test_every_kernel_walks_the_translated_chain(kernel) -> None:
    schedule, x, ts = EDM(variance_preserving=True), randn(2, 3), torch.linspace(1, 0, 9)
    chains = [
        list(walk(kernel, denoiser, x, ts, cond, torch.Generator().manual_seed(1)))
        for denoiser, cond in ((Shifted(Exact(schedule)), COND), (GaussianDenoiser(M, S, schedule), {}))
    ]
    for ours, plain in zip(*chains, strict=True):
        torch.testing.assert_close(ours.x_next, plain.x_next, rtol=1e-4, atol=1e-4)
        gap = ours.transition.log_prob(ours.x_next) - plain.transition.log_prob(plain.x_next)
        assert gap.abs().max() < 2e-3


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_it_is_the_published_chain_of_shifted_noise(steps: int) -> None:
    """2305.06908, multi-step synthesis, by hand on its own path: start at SMAX (z + mu), noise again with z + mu."""
    schedule, ts = EDM(), torch.linspace(1, 0, steps + 1)
    exact = Flown(schedule)
    draws = torch.Generator().manual_seed(2)
    z = randn(2, 3, seed=5)
    x = 80.0 * (z + MU)
    for now, after in itertools.pairwise(ts):
        x0 = exact(x, now.expand(2), COND).x0
        x = x0 + schedule.sigma(after) * (torch.randn(2, 3, generator=draws) + MU) if after > 0 else x0
    denoiser = ConsistencyDenoiser(Shifted(exact), None)
    *_, last = walk(Consistency(), denoiser, 80.0 * z, ts, COND, torch.Generator().manual_seed(2))
    torch.testing.assert_close(last.x_next, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_samples_have_the_mean_of_the_data_exactly(steps: int) -> None:
    """Every step is affine in its noise, so that the chain of no noise at all is the mean. Without the mean in the
    noise that is drawn again each such step would add -S sigma / sqrt(S^2 + sigma^2) times it."""
    schedule, ts = EDM(), torch.linspace(1, 0, steps + 1)
    denoiser = ConsistencyDenoiser(Shifted(Flown(schedule)), None)

    def mean(forget: bool) -> Tensor:
        x = M.expand(2, 3)  # where the noisiest law of this path has its mean
        for now, after in itertools.pairwise(ts):
            law, _ = Consistency()(denoiser, x, now.expand(2), after.expand(2), COND)
            x = law.mean - (schedule.sigma(after) * MU if forget else 0.0)
        return x

    torch.testing.assert_close(mean(forget=False), M.expand(2, 3), rtol=1e-5, atol=1e-5)
    off = torch.zeros(2, 3)
    for sigma in schedule.sigma(ts[1:-1]):
        off = S / (S**2 + sigma**2).sqrt() * (off - sigma * MU)
    torch.testing.assert_close(mean(forget=True), M + off, rtol=1e-4, atol=1e-4)
    assert steps == 1 or off.abs().max() > 1


def test_many_samples_have_the_law_of_the_data() -> None:
    schedule, count = EDM(variance_preserving=True), 20_000
    cond = {MEAN: MU[:1].expand(count, 3)}
    denoiser = ConsistencyDenoiser(Shifted(Flown(schedule)), None)
    grid = torch.linspace(1, 0, 4)
    *_, last = walk(Consistency(), denoiser, randn(count, 3), grid, cond, torch.Generator().manual_seed(3))
    assert (last.x_next.mean(0) - M).abs().max() < 5 * S / count**0.5
    assert (last.x_next.std(0) / S - 1).abs().max() < 5 / (2 * count) ** 0.5


def test_guidance_shifts_each_side_by_its_own_mean() -> None:
    schedule, x, t = EDM(variance_preserving=True), randn(2, 3), torch.tensor([0.4, 0.8])
    said = Guided(Shifted(Exact(schedule)), {MEAN: torch.zeros(1, 3)}, 3.0)(x, t, COND)
    torch.testing.assert_close(said.x0, GaussianDenoiser(M, S, schedule)(x, t, {}).x0, rtol=1e-5, atol=1e-5)


def test_which_denoisers_have_a_mean_and_what_is_refused() -> None:
    shifted = Shifted(Exact(EDM()))
    assert has_mean(shifted) and has_mean(ConsistencyDenoiser(shifted, None)) and has_mean(Guided(shifted, {}, 1.0))
    assert not has_mean(GaussianDenoiser(M, S, EDM())) and not has_mean(None)
    assert Shifted(NetDenoiser(lambda *_: randn(2, 3), EDM(), "x0", takes_end=True)).takes_end
    for cond, got in (({}, "no"), ({MEAN: torch.zeros(1, 3)}, r"\(1, 3\)")):
        with pytest.raises(ValueError, match=f"cond has {got} noise_mean for x"):
            shifted(randn(2, 3), torch.tensor([0.4, 0.8]), cond)
