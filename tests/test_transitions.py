"""Laws against torch.distributions in float64, and the rows that have no density."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributions

from tropism.transitions import Categorical, Gaussian


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(
    event=st.lists(st.integers(1, 4), max_size=3),
    rows=st.integers(1, 4),
    seed=st.integers(0, 2**20),
    per_row=st.booleans(),
)
def test_gaussian_is_torch_normal(event, rows, seed, per_row):
    shape = (rows, *event)
    mean, x, other = randn(*shape, seed=seed), randn(*shape, seed=seed + 1), randn(*shape, seed=seed + 2)
    std = randn(rows, seed=seed + 3).abs() + 0.05 if per_row else randn(*shape, seed=seed + 3).abs() + 0.05
    law, against = Gaussian(mean, std), Gaussian(other, std * 1.7)
    full = (std.reshape(rows, *[1] * len(event)) if per_row else std).double()
    exact = distributions.Independent(distributions.Normal(mean.double(), full.expand(shape)), len(event))
    exact_against = distributions.Independent(
        distributions.Normal(other.double(), 1.7 * full.expand(shape)), len(event)
    )
    assert law.log_prob(x).dtype == torch.float32
    torch.testing.assert_close(law.log_prob(x).double(), exact.log_prob(x.double()), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(
        law.kl(against).double(), distributions.kl_divergence(exact, exact_against), rtol=2e-5, atol=2e-5
    )
    assert law.event_size == math.prod(event) and torch.equal(law.mode, mean) and law.is_random.all()


def test_a_square_batch_takes_std_per_row():
    law = Gaussian(torch.zeros(3, 3), torch.tensor([1.0, 2.0, 4.0]))
    wanted = -1.5 * math.log(2 * math.pi) - 3 * torch.tensor([1.0, 2.0, 4.0]).log()
    torch.testing.assert_close(law.log_prob(torch.zeros(3, 3)), wanted)


def test_latents_of_an_image_keep_their_digits():
    mean, x = randn(2, 4, 64, 64), randn(2, 4, 64, 64, seed=1)
    exact = distributions.Normal(mean.double(), 0.03).log_prob(x.double()).flatten(1).sum(1)
    got = Gaussian(mean, torch.full((2,), 0.03)).log_prob(x).double()
    assert ((got - exact) / exact).abs().max() < 5e-7


def test_bfloat16_means_give_float32_log_probabilities():
    mean = randn(2, 1000).bfloat16()
    law = Gaussian(mean, torch.tensor([1e-3, 1.0]))
    got, exact = law.log_prob(mean.float() + 1e-3), Gaussian(mean.float(), law.std).log_prob(mean.float() + 1e-3)
    assert got.dtype == torch.float32 and got.isfinite().all() and torch.equal(got, exact)
    assert law.sample(torch.Generator().manual_seed(0)).dtype == torch.float32


def test_a_row_without_noise_has_no_density():
    mean = randn(3, 5).requires_grad_()
    law = Gaussian(mean, torch.tensor([0.0, 0.5, 0.0]))
    assert law.is_random.tolist() == [False, True, False]
    draw = law.sample(torch.Generator().manual_seed(0))
    assert torch.equal(draw[[0, 2]], mean[[0, 2]]) and not torch.equal(draw[1], mean[1])
    log_prob = law.log_prob(torch.full((3, 5), 9.0))
    assert log_prob[0] == 0 and log_prob[2] == 0 and log_prob[1] < -100
    log_prob.sum().backward()
    assert torch.equal(mean.grad[[0, 2]], torch.zeros(2, 5)) and (mean.grad[1] != 0).all()


def test_kl_without_density_is_zero_or_infinite_and_keeps_gradients_finite():
    mean = torch.zeros(3, 2, requires_grad=True)
    kl = Gaussian(mean, torch.tensor([0.0, 0.0, 1.0])).kl(Gaussian(torch.ones(3, 2), torch.tensor([0.0, 1.0, 1.0])))
    assert kl.tolist() == [0.0, math.inf, 1.0]
    kl[2].backward()
    assert mean.grad.tolist() == [[0.0, 0.0], [0.0, 0.0], [-1.0, -1.0]]


def test_samples_have_the_law():
    rows = 200_000
    draw = Gaussian(torch.full((rows,), 0.3), torch.full((rows,), 0.7)).sample(torch.Generator().manual_seed(3))
    assert abs(draw.mean().item() - 0.3) < 4 * 0.7 / rows**0.5
    assert abs(draw.var().item() - 0.49) < 4 * 0.49 * (2 / rows) ** 0.5
    again = Gaussian(torch.full((rows,), 0.3), torch.full((rows,), 0.7)).sample(torch.Generator().manual_seed(3))
    assert torch.equal(draw, again)


def test_a_sample_keeps_the_graph():
    mean, std = torch.zeros(4, 2, requires_grad=True), torch.ones(4, requires_grad=True)
    Gaussian(mean, std).sample(torch.Generator().manual_seed(0)).sum().backward()
    noise = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(mean.grad, torch.ones(4, 2))
    torch.testing.assert_close(std.grad, noise.sum(1))


@pytest.mark.parametrize("std", [(), (2,), (4, 1), (1, 3), (5, 3), (5, 3, 1)])
def test_gaussian_refuses_to_broadcast(std):
    with pytest.raises(ValueError, match=r"does not fit mean \(5, 4\)"):
        Gaussian(torch.zeros(5, 4), torch.ones(std))


def test_a_state_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"x has shape \(1, 4\), this law has \(5, 4\)"):
        Gaussian(torch.zeros(5, 4), torch.ones(5)).log_prob(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="this law has"):
        Categorical(torch.zeros(2, 3, 7)).log_prob(torch.zeros(2, 1, dtype=torch.long))
    with pytest.raises(ValueError, match=r"wanted \(B, ..., V\)"):
        Categorical(torch.zeros(7))


def test_categorical_is_torch_categorical():
    logits, other = 3 * randn(4, 6, 11), 3 * randn(4, 6, 11, seed=1)
    law, exact = Categorical(logits), distributions.Categorical(logits=logits.double())
    x = law.sample(torch.Generator().manual_seed(0))
    assert (
        x.shape == (4, 6) and law.event_size == 6 and law.is_random.all() and torch.equal(law.mode, logits.argmax(-1))
    )
    torch.testing.assert_close(law.log_prob(x).double(), exact.log_prob(x).sum(1), rtol=1e-6, atol=1e-5)
    kl = distributions.kl_divergence(exact, distributions.Categorical(logits=other.double())).sum(1)
    torch.testing.assert_close(law.kl(Categorical(other)).double(), kl, rtol=1e-6, atol=1e-5)


def test_forbidden_symbols_are_never_drawn_and_kl_stays_a_number():
    logits = torch.tensor([[0.0, -math.inf, 1.0]]).expand(50_000, 3)
    law = Categorical(logits)
    draw = law.sample(torch.Generator().manual_seed(0))
    share = (draw == 2).double().mean().item()
    wanted = math.e / (1 + math.e)
    assert not (draw == 1).any() and abs(share - wanted) < 4 * (wanted * (1 - wanted) / 50_000) ** 0.5
    assert law.kl(Categorical(torch.zeros(50_000, 3)))[0].isfinite()
    assert Categorical(torch.zeros(50_000, 3)).kl(law)[0] == math.inf


def test_symbols_of_a_row_with_a_generator_of_its_own_are_those_of_torch_multinomial():
    logits = randn(40, 6, 5)
    logits[:, :, 2] = -math.inf
    law = Categorical(logits)
    drawn = law.sample([torch.Generator().manual_seed(row) for row in range(40)])
    probs = law.log_probs.exp()
    alone = [torch.multinomial(probs[row], 1, generator=torch.Generator().manual_seed(row))[:, 0] for row in range(40)]
    assert torch.equal(drawn, torch.stack(alone)) and not (drawn == 2).any()
    with pytest.raises(ValueError, match="have no law somewhere: NaN, or every symbol forbidden"):
        Categorical(torch.full((1, 2, 3), -math.inf)).sample([torch.Generator()])
