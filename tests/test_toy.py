"""The closed forms against numerical integration, and the small trained model against the closed forms."""

import math
import time

import pytest
import torch

from tropism.base import TextToImage
from tropism.denoisers import END, TOLD
from tropism.guidance import Guided
from tropism.models.toy import (
    MODES,
    PROMPTS,
    SPREAD,
    GaussianDenoiser,
    GaussianPolicy,
    MixtureDenoiser,
    ToyTextToImage,
    guided_score,
)
from tropism.samplers import DDIM, EulerODE, FlowSDE, walk
from tropism.schedules import EDM, Cosine, RectifiedFlow, ddpm_table

TABLE = ddpm_table(1000, 0.00085, 0.012, "scaled_linear")
T = torch.tensor([0.0, 0.01, 0.3, 0.8, 1.0])
GRID = torch.linspace(-12, 12, 48_001, dtype=torch.float64)
STEP = 24 / 48_000


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mixture(schedule, dims=1):
    means = torch.tensor([[-1.0, 0.5], [0.5, -0.3], [2.0, 1.0]])[:, :dims]
    labels = torch.tensor([[1.0, 0.0, 0.0], [0.2, 0.3, 0.5]])
    return MixtureDenoiser(means, torch.tensor([0.3, 0.5, 0.2]), torch.tensor([0.5, 0.2, 0.3]), schedule, labels)


def data_density(model, label):
    """p(x_0) on GRID in float64, from the definition."""
    weights = (model.weights if label < 0 else model.labels[label]).double()
    each = torch.distributions.Normal(model.means[:, 0].double(), model.stds.double()).log_prob(GRID[:, None]).exp()
    return (each * weights / weights.sum()).sum(1)


@pytest.mark.parametrize("label", [-1, 0, 1])
@pytest.mark.parametrize("schedule", [TABLE, RectifiedFlow(), EDM(3.0)], ids=lambda value: type(value).__name__)
def test_mixture_posteriors_and_densities_are_integrals(schedule, label):
    model, x = mixture(schedule), torch.tensor([[0.3], [-1.2], [1.7]])
    t = torch.tensor([0.6, 0.8, 0.95] if isinstance(schedule, EDM) else [0.2, 0.5, 0.9])  # sigma well above the spacing
    cond = {"label": torch.full((3,), label)}
    got, density = model(x, t, cond), model.log_density(x, t, cond)
    prior = data_density(model, label)
    for row in range(3):
        alpha, sigma = schedule.alpha(t)[row].double(), schedule.sigma(t)[row].double()
        joint = prior * torch.distributions.Normal(alpha * GRID, sigma).log_prob(x[row].double()).exp()
        clean = (joint * GRID).sum() / joint.sum()
        assert density[row].item() == pytest.approx((joint.sum() * STEP).log().item(), abs=2e-5)
        assert got.x0[row].item() == pytest.approx(clean.item(), abs=2e-5)
        assert got.eps[row].item() == pytest.approx(((x[row].double() - alpha * clean) / sigma).item(), abs=2e-4)


@pytest.mark.parametrize("schedule", [TABLE, RectifiedFlow(), Cosine(), EDM()], ids=lambda value: type(value).__name__)
def test_halves_are_consistent_at_every_time_including_both_ends(schedule):
    x = randn(5, 2) * schedule.sigma(T).clamp(min=1)[:, None]
    for model in (GaussianDenoiser(torch.tensor([0.5, -1.0]), 0.7, schedule), mixture(schedule, 2)):
        x0, eps = model(x, T, {})
        assert x0.isfinite().all() and eps.isfinite().all()
        back = schedule.alpha(T)[:, None] * x0 + schedule.sigma(T)[:, None] * eps
        assert ((back - x).abs() < 2e-6 * (1 + x.abs())).all()


def test_scores_are_gradients_of_log_densities():
    model, t, cond = mixture(TABLE, 2), torch.tensor([0.01, 0.3, 0.8]), {"label": torch.tensor([1, -1, 0])}
    x = randn(3, 2).requires_grad_()
    (gradient,) = torch.autograd.grad(model.log_density(x, t, cond).sum(), x)
    torch.testing.assert_close(model.score(x, t, cond), gradient, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        model.score(x, t, cond), -model(x, t, cond).eps / TABLE.sigma(t)[:, None], rtol=1e-4, atol=1e-4
    )
    null = {"label": torch.tensor([-1, -1, -1])}
    product = -1.5 * model.log_density(x, t, null) + 2.5 * model.log_density(x, t, cond)
    (gradient,) = torch.autograd.grad(product.sum(), x)
    torch.testing.assert_close(guided_score(model, x, t, cond, null, 2.5), gradient, rtol=1e-4, atol=1e-4)


def test_a_gaussian_is_a_mixture_of_one():
    mean, x = torch.tensor([0.5, -1.0]), randn(5, 2)
    one = GaussianDenoiser(mean, 0.7, TABLE)
    same = MixtureDenoiser(mean[None], torch.tensor([0.7]), torch.ones(1), TABLE)
    for ours, theirs in zip(one(x, T, {}), same(x, T, {}), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one.score(x, T, {}), same.score(x, T, {}), rtol=1e-5, atol=1e-5)
    direction = torch.tensor([1.0, 2.0])
    (tilted, evidence), (mixed, mixed_evidence) = one.tilted(direction), same.tilted(direction)
    torch.testing.assert_close(tilted.mean, mixed.means[0])
    assert evidence == pytest.approx(mixed_evidence) == pytest.approx(0.5 - 2.0 + 0.49 * 5 / 2)
    assert tilted.mean.tolist() == pytest.approx([0.5 + 0.49, -1.0 + 0.98])


@pytest.mark.parametrize("strength", [-1.5, 0.7, 2.0])
def test_the_tilted_law_and_the_evidence_are_integrals(strength):
    model = mixture(TABLE)
    tilted, evidence = model.tilted(torch.tensor([strength]))
    weighted = data_density(model, -1) * (strength * GRID).exp()
    assert evidence == pytest.approx((weighted.sum() * STEP).log().item(), abs=1e-5)
    assert (data_density(tilted, -1) - weighted / (weighted.sum() * STEP)).abs().max() < 1e-5


def test_labels_need_a_table():
    model = MixtureDenoiser(torch.zeros(2, 1), torch.ones(2), torch.ones(2), TABLE)
    with pytest.raises(ValueError, match="this mixture has none"):
        model(randn(1, 1), torch.tensor([0.5]), {"label": torch.tensor([0])})


# ---- the trainable ones


def test_a_policy_is_its_means_and_remembers_the_first_ones():
    policy: TextToImage = GaussianPolicy(["left", "right"], torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
    cond, x, t = policy.encode(["right", "left", "right"]), randn(3, 2), torch.tensor([0.2, 0.6, 0.9])
    exact = GaussianDenoiser(torch.tensor([1.0, 0.0]), 0.5, policy.denoiser.schedule)
    before = policy.denoiser(x, t, cond)
    assert torch.equal(before.x0[[0, 2]], exact(x, t, {}).x0[[0, 2]])
    (means,) = policy.parameters()
    before.x0[0].sum().backward()
    assert (means.grad[0] == 0).all() and (means.grad[1] > 0).all()
    denoiser = policy.denoiser
    with torch.no_grad():
        means += 0.5
    assert not torch.equal(denoiser(x, t, cond).x0, before.x0)
    with policy.reference():
        assert torch.equal(denoiser(x, t, cond).x0, before.x0) and torch.equal(
            policy.denoiser(x, t, cond).x0, before.x0
        )
    assert not torch.equal(denoiser(x, t, cond).x0, before.x0)
    centre = GaussianDenoiser(torch.zeros(2), 0.5, exact.schedule)
    null = Guided(policy.denoiser, policy.null(), 0.0)(x, t, cond)
    torch.testing.assert_close(null.x0, centre(x, t, {}).x0)
    assert policy.phrases(["left", "right"]).shape == (2, 0)
    assert policy.latent_shape == (2,) and policy.decode(x) is x and policy.grid(7).shape == (8,)
    with pytest.raises(ValueError, match=r"means must be \(prompts, D\) = \(2, D\)"):
        GaussianPolicy(["a", "b"], torch.zeros(3, 2))


def test_a_policy_gradient_moves_a_policy_to_its_known_optimum():
    """REINFORCE on the chain, reward x_0, with the penalty known in closed form: the optimum is std^2 / beta."""
    policy, beta, std = GaussianPolicy(["p"], torch.zeros(1, 1), schedule=RectifiedFlow()), 0.5, 0.5
    (means,) = policy.parameters()
    adam, generator = torch.optim.Adam([means], lr=0.05), torch.Generator().manual_seed(0)
    cond, trail = policy.encode(["p"] * 256), []
    for _ in range(120):
        log_prob = torch.zeros(256)
        for move in walk(
            DDIM(1.0), policy.denoiser, torch.randn(256, 1, generator=generator), policy.grid(5), cond, generator
        ):
            x = move.x_next.detach()
            law, _ = DDIM(1.0)(policy.denoiser, move.x.detach(), move.t, move.s, cond)
            log_prob = log_prob + law.log_prob(x)
        reward = (
            x[:, 0] - beta * means.detach()[0, 0] * x[:, 0] / std**2
        )  # whose expected gradient is 1 - beta m / std^2
        loss = -((reward - reward.mean()) * log_prob).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        trail.append(means.item())
    assert sum(trail[60:]) / 60 == pytest.approx(std**2 / beta, abs=0.06)


@pytest.fixture(scope="module", params=["eps", "flow"])
def toy(request):
    before, start = torch.random.get_rng_state(), time.process_time()
    made = ToyTextToImage.train(steps=1000, seed=0, target=request.param)
    assert time.process_time() - start < 20
    assert torch.equal(before, torch.random.get_rng_state())
    return made


def flow(toy):
    return isinstance(toy.schedule, RectifiedFlow)


def test_a_thousand_steps_teach_all_eight_prompts(toy):
    """Against the exact denoiser walked by the same kernel on the same grid: discretisation is not its fault."""
    rows, kernel = 400, EulerODE() if flow(toy) else DDIM(1.0)
    cond, start = toy.encode([prompt for prompt in PROMPTS for _ in range(rows)]), randn(8 * rows, 2)
    exact = MixtureDenoiser(MODES, torch.full((8,), SPREAD), torch.ones(8), toy.schedule, torch.eye(8))
    label = {"label": torch.arange(8).repeat_interleave(rows)}
    with torch.no_grad():
        *_, made = walk(kernel, toy.denoiser, start, toy.grid(20), cond, torch.Generator().manual_seed(1))
        *_, wanted = walk(kernel, exact, start, toy.grid(20), label, torch.Generator().manual_seed(1))
    got, right = (toy.decode(move.x_next).reshape(8, rows, 2) for move in (made, wanted))
    assert (got.mean(1) - MODES).norm(dim=1).max() < 0.12
    assert (got.std(1) / right.std(1) - 1).abs().max() < 0.3
    assert ((got - MODES[:, None]).norm(dim=2) < 4 * SPREAD).double().mean() > 0.995


def test_the_null_row_is_the_whole_mixture(toy):
    with torch.no_grad():
        cond = {name: value.expand(2000, *value.shape[1:]) for name, value in toy.null().items()}
        kernel = FlowSDE() if flow(toy) else DDIM(1.0)
        *_, last = walk(kernel, toy.denoiser, randn(2000, 2), toy.grid(20), cond, torch.Generator().manual_seed(1))
    share = torch.cdist(last.x_next, MODES).argmin(1).bincount(minlength=8) / 2000
    assert share.min() > 0.04 and share.max() < 0.25


def test_the_toy_is_a_text_to_image_model(toy):
    model: TextToImage = toy
    assert model.latent_shape == (2,) and model.guidance_scale == 2.0 and len(PROMPTS) == 8
    grid = model.grid(10)
    assert grid.shape == (11,) and grid.dtype == torch.float32 and (grid.diff() < 0).all() and grid[-1] == 0
    cond = model.encode(["angle 0 radius 1", "angle 3 radius 2", "angle 0 radius 1"])["prompt_embeds"]
    assert cond.shape == (3, 2, 16) and not cond.requires_grad and torch.equal(cond[0], cond[2])
    assert model.null()["prompt_embeds"].shape == (1, 2, 16)
    assert model.phrases(PROMPTS[:3]).tolist() == [[0, 1]] * 3
    assert MODES[PROMPTS.index("angle 3 radius 2")].tolist() == [0.0, -2.0]
    with pytest.raises(
        ValueError, match=r"unknown prompts \['angle 9 radius 1'\]; this toy knows \['angle 0 radius 1'"
    ):
        model.encode(["angle 9 radius 1"])


def test_the_reference_stays_and_every_weight_trains(toy):
    x, t, cond = randn(4, 2), torch.tensor([0.2, 0.5, 0.8, 0.9]), toy.encode(PROMPTS[:4])
    assert torch.equal(toy.denoiser(x, t, cond).x0, toy.denoiser(x, t, {**cond, END: t}).x0)  # told, not yet heard
    cond = {**cond, END: t}
    cond[TOLD] = torch.full((4,), 2.0)
    denoiser, parameters = toy.denoiser, toy.parameters()
    before = denoiser(x, t, cond)
    before.x0.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in parameters)
    kept = [parameter.detach().clone() for parameter in parameters]
    try:
        with torch.no_grad():
            for parameter in parameters:
                parameter += 0.01
        with toy.reference(), pytest.raises(RuntimeError, match="inside"), toy.reference():
            assert torch.equal(denoiser(x, t, cond).x0, before.x0) and not denoiser(x, t, cond).x0.requires_grad
            raise RuntimeError("inside")
        assert not torch.equal(denoiser(x, t, cond).x0, before.x0)
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)
                parameter.grad = None


def test_training_depends_on_its_seed_only():
    a, b, c = (ToyTextToImage.train(steps=3, seed=seed).parameters() for seed in (0, 0, 1))
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    assert not torch.equal(a[0], c[0])
    assert math.prod(a[0].shape) == 96 * 50
