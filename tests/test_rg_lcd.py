"""RG-LCD: what its loss is made of, what the proxy learns, and that both are brought back by a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from methods import Off, batch, toy
from safetensors.torch import load_file, save_file
from torch import Tensor

from tropism.ascent import NoGradient
from tropism.distillation.proxy import Proxy, Table, drawn, pairs_of, said_and_scored
from tropism.methods import lcm, rg_lcd
from tropism.models.toy import PROMPTS, ToyTextToImage

SMALL: dict[str, Any] = dict(prompts_per_step=8, images_per_prompt=4, updates=2)
PROXY: dict[str, Any] = dict(variant="proxy", proxy_rounds=1, proxy_steps=3)


class Verdict(Off):
    """The same without a gradient."""

    differentiable = False

    def __call__(self, samples: Tensor, prompts: Sequence[str], **columns: Any) -> Tensor:
        return super().__call__(samples.detach(), prompts, **columns)


def built(model: ToyTextToImage, reward: Any, seed: int = 0, **changes: Any) -> rg_lcd.RewardGuided:
    settings = rg_lcd.Settings(**SMALL | changes)
    settings.check()
    return settings.build(model, reward, torch.Generator().manual_seed(seed))


def first(method: Any) -> Any:
    return next(iter(next(iter(method.experience(batch())))))


def test_the_direct_loss_is_the_distance_minus_the_reward() -> None:
    model = toy()
    method = built(model, Off(), variant="direct", reward_weight=0.5)
    pairs = first(method)
    plain = lcm.Settings(**SMALL).build(model, Off(), torch.Generator())
    said = model.few_step("consistency", 4).denoiser(pairs.x, pairs.t, pairs.cond).x0
    reward = Off()(said, pairs.prompts.text)
    ours, theirs = method.loss(pairs), plain.loss(pairs)
    torch.testing.assert_close(ours.total, theirs.total - 0.5 * reward.sum(), rtol=1e-6, atol=1e-5)
    assert ours.weight == theirs.weight and float(ours.metrics["reward_mean"]) == pytest.approx(
        float(reward.detach().mean())
    )


def test_rows_keep_their_prompts() -> None:
    """Pairs are shuffled; a reward is asked about the prompt that each was made for."""
    model = toy()
    for update in built(model, Off(), variant="direct").experience(batch()):
        for pairs in update:
            assert torch.equal(model.encode(pairs.prompts.text)["prompt_embeds"], pairs.cond["prompt_embeds"])


def test_missing_scores_carry_no_gradient() -> None:
    class Missing(Off):
        def __call__(self, samples: Tensor, prompts: Sequence[str], **columns: Any) -> Tensor:
            return super().__call__(samples, prompts) * float("nan")

    grads = []
    for settings, reward in ((rg_lcd.Settings(**SMALL, variant="direct"), Missing()), (lcm.Settings(**SMALL), Off())):
        model = toy()
        method = settings.build(model, reward, torch.Generator().manual_seed(0))
        method.loss(first(method)).total.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*grads)


def test_a_reward_without_gradient_needs_the_proxy() -> None:
    with pytest.raises(NoGradient, match=r"'off' has no gradient .* variant direct follows .* use variant proxy"):
        built(toy(), Verdict(), variant="direct")
    model = toy()
    method = built(model, Verdict(), **PROXY)
    pairs = first(method)
    method.loss(pairs).total.backward()
    assert method.proxy is not None and all(weight.grad is None for weight in frozen(method.proxy))
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    assert {"proxy_accuracy", "reward_mean", "reward_std"} <= pairs.info.keys()


def frozen(proxy: Proxy) -> list[torch.nn.Parameter]:
    """Its weights, with what its own last step has left."""
    proxy.adam.zero_grad()
    return list(proxy.net.parameters())


def test_the_proxy_learns_differences_in_the_units_of_the_reward() -> None:
    """A table whose reward is linear: afterwards p_i - p_j is r_i - r_j, and its gradient the slope."""
    model, generator = toy(), torch.Generator().manual_seed(0)
    policy = lcm.Settings().student(model, "consistency")
    proxy = Proxy(policy, 400, 0, 1e-2, generator)
    latents, cond = torch.randn(256, 2, generator=generator), model.encode(PROMPTS[:1] * 256)
    slope = torch.tensor([30.0, -10.0])
    table = Table(latents, cond, latents @ slope + 500, torch.zeros(256, dtype=torch.int64))
    proxy.fit(table)
    assert proxy.updates == 400 and proxy.scale == pytest.approx(float(table.reward.std(correction=0)))
    x = latents[:64].clone().requires_grad_()
    said = proxy(x, model.encode(PROMPTS[:1] * 64))
    apart, wanted = said - said.mean(), table.reward[:64] - table.reward[:64].mean()
    assert (apart - wanted).square().mean().sqrt() < 0.1 * wanted.std()
    (grad,) = torch.autograd.grad(said.sum(), x)
    assert torch.nn.functional.cosine_similarity(grad, slope[None]).mean() > 0.98
    assert proxy.agreement(table) > 0.97


def test_equal_rewards_are_no_order_to_be_known() -> None:
    """A table of ties has no accuracy; with one pair that differs, it is that pair's."""
    model = toy()
    proxy = Proxy(lcm.Settings().student(model, "consistency"), 1, 0, 1e-2, torch.Generator().manual_seed(0))
    latents, cond = torch.eye(4, 2), model.encode(PROMPTS[:1] * 4)
    p = proxy(latents, cond)
    group = torch.tensor([0, 0, 1, 1])
    tied = torch.tensor([1.0, 1.0, 5.0, 5.0])
    assert math.isnan(proxy.agreement(Table(latents, cond, tied, group)))
    for right in (True, False):
        reward = tied.clone()
        reward[0 if right == bool(p[0] > p[1]) else 1] += 1
        assert proxy.agreement(Table(latents, cond, reward, group)) == float(right)


def test_a_prompt_is_read_once_for_all_of_its_rows() -> None:
    """Blocks of rows of equal size, and the same numbers as a row each."""
    net, generator = drawn((4, 8, 8), 16, torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    x, tokens = torch.randn(6, 4, 8, 8, generator=generator), torch.randn(3, 7, 16, generator=generator)
    each = tokens.repeat_interleave(2, 0)
    torch.testing.assert_close(net(x, tokens), net(x, each), rtol=0, atol=1e-6)
    assert (net(x, tokens) - net(x, each.flip(0))).abs().max() > 1e-4
    reward, even = torch.zeros(6), torch.tensor([0, 0, 1, 1, 2, 2])
    assert torch.equal(Table(x, {"words": each}, reward, even).prompts()["words"], tokens)
    assert torch.equal(Table(x, {"words": each}, reward, torch.tensor([0, 0, 0, 1, 1, 2])).prompts()["words"], each)


def test_only_answers_to_one_prompt_with_scores_are_compared() -> None:
    reward = torch.tensor([1.0, math.nan, 3.0, 4.0, 5.0])
    table = Table(torch.zeros(5, 2), {}, reward, torch.tensor([0, 0, 0, 1, 1]))
    assert list(zip(*(each.tolist() for each in pairs_of(table)), strict=True)) == [(0, 2), (3, 4)]


def test_what_the_proxy_is_shown() -> None:
    """The clean sample of every move; the last is what is drawn."""
    model = toy()
    policy = lcm.Settings().student(model, "consistency")
    table = said_and_scored(policy, Off(), batch(1), torch.Generator().manual_seed(3))
    assert torch.equal(policy.draw(batch(1).text, torch.Generator().manual_seed(3)), table.latents[3::4])
    assert torch.equal(table.reward, Off()(table.latents, [text for text in batch(1).text for _ in range(4)]))


def test_the_network_takes_pictures_and_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    nets = [drawn((4, 8, 8), 16, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    x, tokens = torch.randn(3, 4, 8, 8), torch.randn(3, 7, 16)
    one, same, other = (net(x, tokens) for net in nets)
    assert one.shape == (3,) and torch.equal(one, same) and not torch.equal(one, other)
    for change in ((x.roll(1, 0), tokens), (x, tokens.roll(1, 0))):
        assert (nets[0](*change) - one).abs().min() > 1e-6


def test_a_proxy_goes_on_from_its_state(tmp_path: Any) -> None:
    method = built(toy(), Off(), **PROXY)
    proxy = method.proxy
    assert proxy is not None
    proxy.learn(method.policy, Off(), batch(), torch.Generator().manual_seed(1))
    save_file(proxy.state_dict(), tmp_path / "state.safetensors")
    other = built(toy(), Off(), seed=9, **PROXY).proxy
    assert other is not None
    other.load_state_dict(load_file(tmp_path / "state.safetensors"))
    for each in (proxy, other):
        each.learn(method.policy, Off(), batch(), torch.Generator().manual_seed(2))
    assert proxy.updates == other.updates == 9
    one, same = proxy.state_dict(), other.state_dict()
    assert one.keys() == same.keys() and all(torch.equal(value, same[name]) for name, value in one.items())
    with pytest.raises(ValueError, match="the proxy has other weights"):
        other.load_state_dict({**proxy.state_dict(), "net/last.weight": torch.zeros(1, 3)})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"reward_weight": -1.0}, "reward_weight is -1.0"),
        ({"proxy_steps": 0}, "proxy_steps is 0"),
        ({"images_per_prompt": 1, "student_steps": 1}, "images_per_prompt is 1; wanted at least 2"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        built(toy(), Off(), **changes)
