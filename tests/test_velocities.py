"""Mean velocities against a flow that is known: the mean-flow identity, halved jumps, and what rows are made of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from tropism.base import Prompts, bcast
from tropism.denoisers import END, NetDenoiser
from tropism.distillation.velocity import mean_velocity, unprompted, velocity
from tropism.methods import mean_flow, shortcut
from tropism.models.pipelines import wrap_pipeline
from tropism.models.ring import Ring
from tropism.models.toy import ToyNet
from tropism.schedules import RectifiedFlow

MEAN, STD = torch.tensor([1.5, -0.5], dtype=torch.float64), 0.4


def spread(t: Tensor) -> Tensor:
    return ((1 - t) ** 2 * STD**2 + t**2).sqrt()


def exact(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """u(x, t, r) of N(MEAN, STD^2), in the dtype of x: the state at r is known in closed form."""
    mean = MEAN.to(x)
    there = bcast(1 - r, x) * mean + bcast(spread(r) / spread(t), x) * (x - bcast(1 - t, x) * mean)
    return (x - there) / bcast(t - r, x)


def instant(x: Tensor, t: Tensor) -> Tensor:
    """E[eps - x0 | x at t]."""
    gain = bcast((t - (1 - t) * STD**2) / spread(t) ** 2, x)
    return gain * (x - bcast(1 - t, x) * MEAN.to(x)) - MEAN.to(x)


def states(rows: int = 64, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """x, t and r < t."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 2, generator=generator, dtype=dtype)
    t = 0.2 + 0.8 * torch.rand(rows, generator=generator, dtype=dtype)
    return x, t, 0.9 * t * torch.rand(rows, generator=generator, dtype=dtype)


def test_the_identity_of_mean_flows_is_exact() -> None:
    """In float64; and a wrong u is no fixed point."""
    x, t, r = states()
    v, u = instant(x, t), exact(x, t, r)
    assert float((mean_velocity(exact, x, t, r, v) - u).abs().max()) < 1e-13
    wrong = mean_velocity(lambda x, t, r: 1.1 * exact(x, t, r), x, t, r, v)
    assert float((wrong - 1.1 * u).abs().mean()) > 0.05


def test_the_mean_over_no_time_is_the_velocity() -> None:
    x, t, _ = states()
    v = torch.randn_like(x)
    net = ToyNet(torch.Generator().manual_seed(0)).double()
    assert torch.equal(mean_velocity(lambda x, t, r: told(net, x, t, r), x, t, t, v), v)
    near = exact(x, t, t - 1e-5)
    assert float((near - instant(x, t)).abs().max()) < 1e-3  # the limit that the exact u has


def told(net: ToyNet, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    embeds = torch.ones(len(x), 2, 16, dtype=x.dtype)
    return net(x, 1000 * t, {"prompt_embeds": embeds, END: 1000 * r})


def test_the_derivative_through_a_network_is_that_of_finite_differences() -> None:
    x, t, r = states()
    net = ToyNet(torch.Generator().manual_seed(0)).double()
    torch.nn.init.normal_(net.end.weight, generator=torch.Generator().manual_seed(1))
    v, h = torch.randn_like(x), 1e-6
    ahead, behind = told(net, x + h * v, t + h, r), told(net, x - h * v, t - h, r)
    wanted = v - bcast(t - r, x) * (ahead - behind) / (2 * h)
    with torch.no_grad():
        found = mean_velocity(lambda x, t, r: told(net, x, t, r), x, t, r, v)
    torch.testing.assert_close(found, wanted.detach(), atol=1e-7, rtol=1e-7)


@dataclass(frozen=True)
class Known:
    """A ring whose student is told the end and says the exact mean velocity (the velocity where there is no way)."""

    def ring(self) -> Ring:
        ring = Ring(RectifiedFlow(), classes=2, guidance_scale=3.0)

        def net(x: Tensor, number: Tensor, cond: Any) -> Tensor:
            t, r = number / 1000, cond[END] / 1000
            apart = (t - r).clamp(min=1e-3)
            said = exact(x, t, t - apart).where(bcast(t > r, x), instant(x, t))
            return said + 0.25 * bcast(cond["label"].float(), x)

        ring._student = NetDenoiser(net, ring.schedule, "flow", takes_end=True)
        return ring


def pairs(method: Any, ring: Ring, prompts: tuple[str, ...] = ("class 0", "class 1")) -> Any:
    rows = Prompts(list(prompts) * 128, torch.arange(128 * len(prompts)), {})
    return next(next(iter(method.experience(rows))))


def built(settings: Any, ring: Ring) -> Any:
    settings = replace(settings, minibatch=1000, updates=1, passes=1)
    settings.check()
    return settings.build(ring, None, torch.Generator().manual_seed(0), pictures=ring.pictures)


def test_two_halves_of_an_exact_jump_are_the_jump() -> None:
    ring = Known().ring()
    method = built(shortcut.Settings(guidance_scale=1.0, target_decay=0.0, longest=1024), ring)
    x, t, r = states(dtype=torch.float32)
    r = r / 2
    cond = ring.encode(["class 0"] * len(x))
    torch.testing.assert_close(method.halved(x, t, r, cond), exact(x, t, r), atol=2e-5, rtol=0)


def test_the_shortest_jumps_are_flow_matching() -> None:
    """Rows without a way have its target exactly; a jump tends to the velocity in proportion to its length."""
    ring = Known().ring()
    method = built(shortcut.Settings(guidance_scale=1.0, bootstrap=0.5), ring)
    rows = pairs(method, ring)
    still, wanted = rows.t == rows.s, method.wanted(rows)
    assert 90 < int(still.sum()) < 166
    assert torch.equal(wanted[still], (rows.eps - rows.x0)[still])
    assert not torch.isclose(wanted[~still], (rows.eps - rows.x0)[~still]).all(1).any()
    x, t, _ = states(dtype=torch.float32)
    cond = ring.encode(["class 0"] * len(x))
    gaps = [
        float((method.halved(x, t, t - length, cond) - instant(x, t)).norm() / length) for length in (1 / 16, 1 / 32)
    ]
    assert gaps[0] > 1 and gaps[1] == pytest.approx(gaps[0], rel=0.1)


def test_the_shortest_halves_of_a_shortcut_are_guided() -> None:
    """And no longer one: u says 0.25 more for each number of a class, and -0.25 without."""
    ring = Known().ring()
    x, _, _ = states(dtype=torch.float32)
    t, cond = torch.full((len(x),), 0.5), ring.encode(["class 1"] * len(x))
    plain, guided = (built(shortcut.Settings(guidance_scale=w, longest=8), ring) for w in (1.0, 3.0))
    for length, more in ((1 / 8, 2 * 0.5), (1 / 4, 0.0)):
        lengths = torch.full_like(t, length)
        gap = guided.half(x, t, lengths, cond) - plain.half(x, t, lengths, cond)
        torch.testing.assert_close(gap, torch.full_like(gap, more), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kappa", [0.0, 0.5])
def test_the_learnt_guidance_has_the_scale_that_was_asked_for(kappa: float) -> None:
    """Where the student says u_null + w (v - u_null) of a prompt, it is told to go on saying so, on average."""
    ring = Known().ring()
    method = built(mean_flow.Settings(kappa=kappa, drop=0.0), ring)
    assert method.scale == 3.0
    rows = pairs(method, ring, ("class 0", "class 1", "any"))
    v, label = rows.eps - rows.x0, rows.cond["label"]
    null = velocity(method.policy.model.denoiser, rows.x, rows.t, rows.t, {"label": torch.full_like(label, -1)})
    said = velocity(method.policy.model.denoiser, rows.x, rows.t, rows.t, rows.cond)
    wanted = 3 * (1 - kappa) * v + (1 - 3 * (1 - kappa) - kappa) * null + kappa * said
    dropped = label == -1
    assert 0 < int(dropped.sum()) < len(label)
    torch.testing.assert_close(method.guided(rows)[~dropped], wanted[~dropped], atol=1e-5, rtol=0)
    assert torch.equal(method.guided(rows)[dropped], v[dropped])
    assert torch.equal(unprompted(rows.cond, ring.null()), dropped)
    fixed = null + 3 * (v - null)  # said by a student that has learnt it
    assert (
        float((3 * (1 - kappa) * v + (1 - 3 * (1 - kappa) - kappa) * null + kappa * fixed - fixed).abs().max()) < 1e-4
    )


def test_times_are_drawn_as_the_papers_say() -> None:
    generator = torch.Generator().manual_seed(0)
    t, r, weight = mean_flow.Times(-0.4, 1.0, 0.75)(20_000, 0, generator)
    assert bool((r <= t).all()) and bool((r > 0).all()) and bool((t < 1).all()) and bool((weight == 1).all())
    assert float((r == t).float().mean()) == pytest.approx(0.75, abs=0.01)
    t, s, weight = shortcut.Times(0.25, 16)(20_000, 0, generator)
    long = s < t
    length = (t - s)[long]
    assert float(long.float().mean()) == pytest.approx(0.25, abs=0.01) and bool((s >= 0).all()) and bool((t <= 1).all())
    assert sorted(set(length.tolist())) == [1 / 8, 1 / 4, 1 / 2, 1]  # 2 / M to 1, alike often
    assert bool((t[long] / length).frac().eq(0).all())
    assert float((length == 1).float().mean()) == pytest.approx(0.25, abs=0.02)


def test_what_does_not_suit_is_refused_in_a_sentence() -> None:
    for kind in (mean_flow.Settings, shortcut.Settings):
        with pytest.raises(ValueError, match="is told one time, and this method needs one that is told a second"):
            kind().build(wrap_pipeline(tiny.sd3_pipeline()), None, torch.Generator(), pictures=None)
        with pytest.raises(ValueError, match="the path of EDM, and this method learns velocities of the straight one"):
            kind().build(Ring(), None, torch.Generator(), pictures=None)
        with pytest.raises(ValueError, match="updates is 9; wanted at most the 8 pictures of a step"):
            kind(prompts_per_step=8, updates=9).check()
        with pytest.raises(ValueError, match=r"drop is 1\.0; wanted 0 to below 1"):
            kind(drop=1.0).check()
    for wrong, said in (
        (mean_flow.Settings(kappa=1.0), r"kappa 1\.0; wanted 0 to 1, and 0 to below 1"),
        (mean_flow.Settings(weight_c=0.0), r"weight_c 0\.0; wanted above 0"),
        (shortcut.Settings(bootstrap=2.0), r"bootstrap is 2\.0"),
        (shortcut.Settings(longest=100), "longest is 100; wanted a power of 2"),
        (shortcut.Settings(student_steps=3), "student_steps is 3; wanted a power of 2 up to 128"),
    ):
        with pytest.raises(ValueError, match=said):
            wrong.check()
