"""Guidance is what pipelines do to raw outputs, in one pass, and a stored row can be evaluated again exactly."""

import pytest
import torch
from diffusers import DDIMScheduler

from tropism.base import take
from tropism.denoisers import Clipped, ConsistencyDenoiser, NetDenoiser
from tropism.guidance import Guided, constant, interval, network_cond, step
from tropism.models.toy import GaussianDenoiser, MixtureDenoiser, guided_score
from tropism.samplers import DDIM, FlowSDE, walk
from tropism.schedules import EDM, RectifiedFlow, ddpm_table, flow_grid, table_grid

TABLE = ddpm_table(1000, 0.00085, 0.012, "scaled_linear")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Net:
    """A network that mixes its condition in, and remembers what it was called with."""

    def __init__(self):
        self.rows, self.names = [], set()

    def __call__(self, x, number, cond):
        self.rows.append(x.shape[0])
        self.names |= set(cond)
        number = number.to(x.dtype)[:, None]
        return torch.sin(2 * x + number / 300) + cond["c"] * x + cond["c"]


COND, NULL = {"c": randn(4, 3, seed=9)}, {"c": randn(1, 3, seed=8)}
T = torch.tensor([0.999, 0.7, 0.4, 0.02])


@pytest.mark.parametrize("target", ["eps", "x0", "v", "flow"])
@pytest.mark.parametrize("schedule", [TABLE, RectifiedFlow(), EDM(2.0)], ids=lambda value: type(value).__name__)
def test_guidance_combines_raw_outputs(target, schedule):
    net, w, x = Net(), 7.5, randn(4, 3)

    def combined(x, number, cond):
        null = net(x, number, {"c": NULL["c"].expand(4, 3)})
        return null + w * (net(x, number, cond) - null)

    wanted = NetDenoiser(combined, schedule, target)(x, T, COND)
    net.rows.clear()
    guided = Guided(NetDenoiser(net, schedule, target), NULL, w)
    got = guided(x, T, COND)
    assert net.rows == [8] and guided.schedule is schedule
    for ours, raw in zip(got, wanted, strict=True):
        assert (ours - raw).abs().max() < 2e-6 * (1 + w) * (1 + raw.abs().max())


def test_a_guided_consistency_model_combines_its_answers():
    net, x = Net(), randn(4, 3)
    inner = ConsistencyDenoiser(NetDenoiser(net, TABLE, "eps"))
    cond, null = inner(x, T, COND), inner(x, T, {"c": NULL["c"].expand(4, 3)})
    got = Guided(inner, NULL, 3.0)(x, T, COND)
    torch.testing.assert_close(got.x0, null.x0 + 3 * (cond.x0 - null.x0))


def test_scale_one_is_one_plain_pass():
    net, x = Net(), randn(4, 3)
    plain = NetDenoiser(net, TABLE, "eps")
    wanted = plain(x, T, COND)
    net.rows.clear()
    got = Guided(plain, NULL, 1.0)(x, T, {**COND, "guidance_low": torch.ones(4)})
    assert net.rows == [4] and net.names == {"c"}
    assert torch.equal(got.x0, wanted.x0) and torch.equal(got.eps, wanted.eps)


def test_entries_for_guidance_never_reach_the_network():
    net = Net()
    cond = {**COND, "guidance_low": torch.ones(4), "guidance_note": torch.zeros(4)}
    Guided(NetDenoiser(net, TABLE, "eps"), NULL, step(1.0, 5.0, 0.5))(randn(4, 3), T, cond)
    assert net.names == {"c"} and set(network_cond(cond)) == {"c"} and len(cond) == 3


def test_scale_functions():
    t = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
    assert constant(3.0)(t, {}).tolist() == [3.0] * 5
    assert interval(3.0, 0.25, 0.75)(t, {}).tolist() == [1.0, 3.0, 3.0, 3.0, 1.0]
    assert step(1.5, 5.0, 0.5)(t, {}).tolist() == [1.5, 1.5, 5.0, 5.0, 5.0]
    own = {"guidance_low": torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])}
    assert step(1.5, 5.0, 0.5)(t, own).tolist() == [1.0, 2.0, 5.0, 5.0, 5.0]
    with pytest.raises(ValueError, match=r"guidance_low \(2,\) must have one entry per row, \(5,\)"):
        step(1.5, 5.0, 0.5)(t, {"guidance_low": torch.ones(2)})
    with pytest.raises(ValueError, match="low < high"):
        interval(3.0, 0.7, 0.2)
    with pytest.raises(ValueError, match="until"):
        step(1.0, 5.0, 20)


def test_each_row_has_its_own_scale():
    denoiser, x = NetDenoiser(Net(), TABLE, "eps"), randn(4, 3)
    cond = {**COND, "guidance_low": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    together = Guided(denoiser, NULL, step(0.0, 6.0, 0.5))(x, T, cond)
    for row, w in enumerate([1.0, 2.0, 6.0, 6.0]):
        alone = Guided(denoiser, NULL, constant(w))(x, T, COND)
        torch.testing.assert_close(together.x0[row], alone.x0[row], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("flow", [False, True])
def test_a_stored_row_has_ratio_one_under_the_policy_that_drew_it(flow):
    net = torch.nn.Linear(6, 3)
    schedule, target = (RectifiedFlow(), "flow") if flow else (TABLE, "eps")
    kernel, grid = (FlowSDE(), flow_grid(10, 3.0)) if flow else (DDIM(1.0), table_grid(1000, 10, "leading", 1))
    inner = NetDenoiser(lambda x, number, cond: net(torch.cat([x, cond["c"]], 1)), schedule, target)
    denoiser = Guided(inner, NULL, step(1.0, 5.0, 0.6))
    cond = {"c": randn(6, 3, seed=4), "guidance_low": torch.linspace(0, 5, 6)}
    with torch.no_grad():
        moves = list(walk(kernel, denoiser, randn(6, 3), grid, cond, torch.Generator().manual_seed(0)))
        old = torch.stack([move.transition.log_prob(move.x_next) for move in moves], 1)
    xs = torch.stack([moves[0].x, *(move.x_next for move in moves)], 1)
    for move in moves:  # the very same batch: bit for bit
        law, _ = kernel(denoiser, move.x, move.t, move.s, cond)
        assert torch.equal(law.log_prob(move.x_next), move.transition.log_prob(move.x_next))
    row, k = torch.tensor([5, 0, 3, 1, 2, 4]), torch.tensor([0, 7, 8, 3, 1, 5])  # rows and times shuffled together
    law, _ = kernel(denoiser, xs[row, k], grid[k], grid[k + 1], take(cond, row))
    ratio = (law.log_prob(xs[row, k + 1]) - old[row, k]).exp()
    assert (ratio - 1).abs().max() < 1e-4 * 0.2  # a fifth of the published clip, and summed over dimensions
    wrong, _ = kernel(Guided(inner, NULL, 5.0), xs[row, k], grid[k], grid[k + 1], take(cond, row))
    assert (wrong.log_prob(xs[row, k + 1]) - old[row, k]).abs().max() > 1e-3


def test_detach_null_keeps_the_value_and_drops_the_gradient():
    x, w = randn(4, 3), 4.0
    gradients, values = [], []
    for detach in (False, True):
        weight = torch.tensor(0.7, requires_grad=True)
        net = NetDenoiser(lambda x, number, cond, weight=weight: weight * cond["c"] * x, RectifiedFlow(), "flow")
        values.append(Guided(net, NULL, w, detach)(x, T, COND))
        values[-1].eps.sum().backward()
        gradients.append(weight.grad.item())
    slope = (1 - T[:, None]) * x  # d eps / d v = 1 - t
    null = (slope * NULL["c"]).sum().item()
    cond = (slope * COND["c"]).sum().item()
    assert torch.equal(values[0].x0, values[1].x0) and torch.equal(values[0].eps, values[1].eps)
    assert gradients == pytest.approx([w * cond + (1 - w) * null, w * cond], rel=1e-5)


def test_guiding_one_gaussian_away_from_another_is_a_third_gaussian():
    schedule, w = RectifiedFlow(), 3.0
    means = torch.tensor([[1.0, 0.0], [0.0, 0.5]])
    both = MixtureDenoiser(means, torch.tensor([0.4, 0.4]), torch.tensor([1.0, 1.0]), schedule, torch.eye(2))
    x, t, label = randn(4, 2), T, torch.zeros(4, dtype=torch.long)
    guided = Guided(both, {"label": torch.tensor([1])}, w)
    third = GaussianDenoiser(means[1] + w * (means[0] - means[1]), 0.4, schedule)
    got, wanted = guided(x, t, {"label": label}), third(x, t, {})
    torch.testing.assert_close(got.x0, wanted.x0, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.eps, wanted.eps, rtol=1e-5, atol=1e-5)
    score = guided_score(both, x, t, {"label": label}, {"label": label + 1}, w)
    torch.testing.assert_close(score, third.score(x, t, {}), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(score, -got.eps / schedule.sigma(t)[:, None], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("clip", [False, True])
def test_a_guided_chain_is_the_pipelines_loop(clip):
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=clip, steps_offset=1
    )
    scheduler.set_timesteps(50)
    net, w, x = Net(), 2.0, randn(4, 3)
    guided = Guided(NetDenoiser(net, TABLE, "eps"), NULL, w)
    denoiser = Clipped(guided) if clip else guided
    got = [
        move.x_next
        for move in walk(
            DDIM(1.0), denoiser, x, table_grid(1000, 50, "leading", 1), COND, torch.Generator().manual_seed(1)
        )
    ]
    generator = torch.Generator().manual_seed(1)
    for tau, ours in zip(scheduler.timesteps, got, strict=True):
        uncond, cond = net(
            torch.cat([x, x]), tau.expand(8), {"c": torch.cat([NULL["c"].expand(4, 3), COND["c"]])}
        ).chunk(2)
        x = scheduler.step(uncond + w * (cond - uncond), tau, x, eta=1.0, generator=generator).prev_sample
        assert (ours - x).abs().max() <= 1e-5 * (1 + x.abs().max())


def test_guidance_refuses_rows_and_entries_that_do_not_fit():
    denoiser = NetDenoiser(Net(), TABLE, "eps")
    with pytest.raises(ValueError, match=r"null must have one row; its entry 'c' has shape \(2, 3\)"):
        Guided(denoiser, {"c": torch.zeros(2, 3)}, 2.0)
    with pytest.raises(ValueError, match="different entries"):
        Guided(denoiser, {"d": torch.zeros(1, 3)}, 2.0)(randn(4, 3), T, COND)
    with pytest.raises(ValueError, match=r"wanted \(B,\)"):
        Guided(denoiser, NULL, lambda t, cond: torch.ones(1))(randn(4, 3), T, COND)
