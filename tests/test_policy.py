"""The policy: what it draws does not depend on how it is batched, and how rewards see its samples."""

from __future__ import annotations

import math

import pytest
import torch
from methods import PROMPTS, Off, batch, toy

from tropism.base import Prompts, take
from tropism.guidance.cfg import constant
from tropism.policy import Policy, reward_statistics, run_chains, score_latents
from tropism.randomness import normal, row_generators, row_seeds
from tropism.samplers import DDIM, EulerODE, FlowSDE
from tropism.transitions import Categorical, Gaussian

TEXT = list(PROMPTS) * 3


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def policy_on(target="eps", *, double=True, **fields) -> Policy:
    kernel = DDIM(1.0) if target == "eps" else FlowSDE(0.7)
    return Policy(toy(target, double=double), kernel, 6, **fields)


# --- micro-batches ---


@pytest.mark.parametrize("microbatch", [1, 5, 7, 24, 100])
@pytest.mark.parametrize("target", ["eps", "flow"])
def test_microbatches_do_not_change_what_is_drawn(target, microbatch):
    """Chance included. The network is in float64, so that its rounding does not depend on the rows in a pass."""
    whole, parts = (policy_on(target, microbatch=size) for size in (64, microbatch))
    torch.testing.assert_close(parts.draw(TEXT, seeded()), whole.draw(TEXT, seeded()), rtol=0, atol=1e-6)
    x, cond = whole.noise(24, seeded(1)), whole.model.encode(TEXT)
    runs = [run_chains(policy, x, cond, row_generators(row_seeds(24, seeded(2)))) for policy in (whole, parts)]
    torch.testing.assert_close(runs[1].xs, runs[0].xs, rtol=0, atol=1e-6)
    torch.testing.assert_close(runs[1].log_prob, runs[0].log_prob, rtol=0, atol=1e-4)
    assert torch.equal(runs[1].mask, runs[0].mask)


def test_an_image_is_the_same_whatever_else_is_drawn():
    policy = policy_on()
    long, short = policy.draw(TEXT, seeded()), policy.draw(TEXT[:10], seeded())
    torch.testing.assert_close(long[:10], short, rtol=0, atol=1e-6)
    assert len(long.unique(dim=0)) == 24


def test_every_draw_is_new_and_a_seed_repeats_it():
    policy, generator = policy_on(), seeded()
    first, second = policy.draw(PROMPTS, generator), policy.draw(PROMPTS, generator)
    assert not torch.equal(first, second) and torch.equal(first, policy.draw(PROMPTS, seeded()))


# --- one generator a row ---


def test_rows_have_noise_of_their_own_and_draws_cost_one():
    """However many rows there are, the generator they come from moves on alike, and the first rows are the same."""
    a, b = seeded(), seeded()
    few, many = row_seeds(3, a), row_seeds(100, b)
    assert torch.equal(few, many[:3]) and len(many.unique()) == 100
    assert torch.equal(a.get_state(), b.get_state()) and not torch.equal(row_seeds(3, a), few)


def test_noise_of_rows_is_normal_and_independent():
    rows = row_generators(row_seeds(4000, seeded()))
    noise = torch.cat([normal((4000, 3), rows, torch.device("cpu")) for _ in range(2)], dim=1)
    assert noise.mean(0).abs().max() < 0.07 and (noise.std(0) - 1).abs().max() < 0.05
    assert (noise.T.corrcoef() - torch.eye(6)).abs().max() < 0.07
    assert abs(noise[1:].flatten() @ noise[:-1].flatten() / noise.numel()) < 0.03


def test_laws_take_a_generator_a_row_or_one_for_all():
    law = Gaussian(torch.zeros(4, 3), torch.ones(4))
    seeds = row_seeds(4, seeded())
    together = law.sample(row_generators(seeds))
    alone = [Gaussian(torch.zeros(1, 3), torch.ones(1)).sample(row_generators(seeds[i : i + 1])) for i in range(4)]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(law.sample(seeded()), torch.randn(4, 3, generator=seeded()))
    symbols = Categorical(torch.randn(4, 6, 11, generator=seeded()))
    assert torch.equal(
        symbols.sample(row_generators(seeds))[2:], Categorical(symbols.logits[2:]).sample(row_generators(seeds[2:]))
    )
    with pytest.raises(ValueError, match="3 generators for 4 rows; wanted one a row, or a single one"):
        law.sample(row_generators(seeds[:3]))


# --- chains ---


def test_chains_store_what_was_walked():
    policy = policy_on()
    x, cond = policy.noise(24, seeded(1)), policy.model.encode(TEXT)
    chains = run_chains(policy, x, cond, row_generators(row_seeds(24, seeded(2))))
    assert chains.xs.shape == (24, 7, 2) and torch.equal(chains.xs[:, 0], x)
    assert torch.equal(chains.final, chains.xs[:, -1]) and torch.equal(chains.ts, policy.ts)
    assert chains.mask[:, :-1].all() and not chains.mask[:, -1].any() and not chains.log_prob[:, -1].any()
    for place in range(6):
        t, s = (chains.ts[place + i].expand(24) for i in (0, 1))
        law, _ = policy.kernel(policy.denoiser, chains.xs[:, place], t, s, cond)
        torch.testing.assert_close(law.log_prob(chains.xs[:, place + 1]), chains.log_prob[:, place])
    assert not chains.xs.requires_grad and not chains.log_prob.requires_grad


def test_images_are_decoded_draws_from_the_noise_given():
    policy = policy_on(microbatch=5).with_(kernel=DDIM(0.0))
    policy.model.decode = lambda latents: latents + 10
    x = policy.noise(24, seeded())
    images = policy.images(TEXT, seeded(), x)
    assert torch.equal(images, policy.draw(TEXT, seeded(1), x) + 10) and not images.requires_grad


def test_guidance_is_the_models_unless_told_and_one_is_none():
    model, x, t = toy(), torch.randn(8, 2, generator=seeded()), torch.full((8,), 0.5)
    cond, null = model.encode(PROMPTS), model.null()["prompt_embeds"].expand(8, 2, 16)
    with torch.no_grad():
        eps = {w: Policy(model, DDIM(1.0), 5, guidance=w).denoiser(x, t, cond).eps for w in (None, 0.0, 1.0, 2.0, 3.0)}
        unsaid = model.denoiser(x, t, {"prompt_embeds": null}).eps
        said = model.denoiser(x, t, cond).eps
    assert torch.equal(eps[None], eps[2.0]) and torch.equal(eps[1.0], said)
    torch.testing.assert_close(eps[0.0], unsaid)
    torch.testing.assert_close(eps[3.0], unsaid + 3 * (said - unsaid))
    assert torch.equal(Policy(model, DDIM(1.0), 5, guidance=constant(3.0)).denoiser(x, t, cond).eps, eps[3.0])


def test_the_null_branch_can_be_kept_from_learning():
    model, x, t = toy(), torch.randn(8, 2, generator=seeded()), torch.full((8,), 0.5)
    cond = model.encode(PROMPTS)
    grads = []
    for detach in (False, True):
        policy = Policy(model, DDIM(1.0), 5, guidance=0.0, detach_null=detach)
        answer = policy.denoiser(x, t, cond).eps.sum()
        found = torch.autograd.grad(answer, model.parameters(), allow_unused=True)  # nobody tells cond[END]
        grads.append([gradient for gradient in found if gradient is not None])
    assert (
        len(grads[0]) == len(grads[1]) > 4
        and all(gradient.any() for gradient in grads[0])
        and not any(gradient.any() for gradient in grads[1])
    )


@pytest.mark.parametrize(("field", "value"), [("steps", 0), ("microbatch", 0)])
def test_counts_are_at_least_one(field, value):
    with pytest.raises(ValueError, match=f"{field} must be at least 1; got 0"):
        Policy(toy(), EulerODE(), **{"steps": 5, field: value})


# --- rewards ---


def test_scores_see_images_prompts_and_columns_and_no_graph():
    seen = {}

    class Asking(Off):
        def __call__(self, samples, prompts, **columns):
            seen.update(samples=samples, prompts=prompts, columns=columns, graph=torch.is_grad_enabled())
            return super().__call__(samples, prompts)

    policy, prompts = policy_on(), batch(1)
    policy.model.decode = lambda latents: 2 * latents
    prompts = Prompts(prompts.text, prompts.group, {"note": list("abcdefgh")})
    latents = torch.randn(8, 2, generator=seeded()).requires_grad_()
    reward = score_latents(policy, Asking(), latents, prompts)
    assert torch.equal(seen["samples"], 2 * latents) and seen["prompts"] == prompts.text
    assert seen["columns"] == {"note": list("abcdefgh")} and not seen["graph"]
    assert reward.shape == (8,) and not reward.requires_grad


def test_statistics_leave_out_what_is_missing():
    nan = math.nan
    reward = torch.tensor([1.0, 3.0, nan, 2.0, 2.0, nan, 7.0, nan, nan])
    group = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 3])
    stats = reward_statistics(reward, group)
    assert stats["reward_mean"] == 3 and stats["reward_missing"] == 4
    assert stats["reward_std"] == pytest.approx(torch.tensor([1.0, 3, 2, 2, 7]).double().std(correction=0).item())
    assert stats["zero_std_ratio"] == 0.5  # of groups 0 and 1; the others have no two scores
    nothing = reward_statistics(torch.full((4,), nan), torch.tensor([0, 0, 1, 1]))
    assert math.isnan(nothing["reward_mean"]) and nothing["reward_missing"] == 4 and nothing["zero_std_ratio"] == 0


def test_take_and_chain_of_some_rows_are_those_rows():
    policy = policy_on()
    x, cond = policy.noise(8, seeded()), policy.model.encode(PROMPTS)
    rows = torch.tensor([6, 1])
    own = row_seeds(8, seeded(1))
    *_, every = policy.chain(x, cond, row_generators(own))
    *_, some = policy.chain(x[rows], take(cond, rows), row_generators(own[rows]))
    torch.testing.assert_close(some.x_next, every.x_next[rows], rtol=0, atol=1e-6)
