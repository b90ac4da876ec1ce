"""Consistency training: its levels, chances and growth against closed forms, its gradient, its switches."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import tiny
import torch
from torch import Tensor

from tropism.base import Cond, bcast
from tropism.data.prompts import PromptSet
from tropism.denoisers import Preconditioned
from tropism.distillation import Pairs
from tropism.distillation.coupling import optimal
from tropism.distillation.curriculum import Neighbours, Span, doubling, karras, lognormal, rooted, uniform
from tropism.distillation.levels import highest, level, time_at
from tropism.ema import Ema
from tropism.losses.consistency import Cauchy, PseudoHuber
from tropism.methods import ct, ect, ict, slct
from tropism.models.pipelines import wrap_pipeline
from tropism.models.ring import OUTLIER, Ring
from tropism.schedules import EDM, Cosine, RectifiedFlow, ddpm_table

TABLE = ddpm_table(1000, 0.00085, 0.012, "scaled_linear")
SCHEDULES = [EDM(), EDM(variance_preserving=True), RectifiedFlow(), TABLE, Cosine()]
named = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
SMALL = dict(prompts_per_step=8, images_per_prompt=4, updates=1, passes=1, total_updates=100)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ring_pairs(settings: object, ring: Ring, rows: int = 64) -> tuple[object, Pairs]:
    """The method on the ring, and its first pairs."""
    method = settings.build(ring, None, generator(), pictures=ring.pictures)  # type: ignore[attr-defined]
    return method, next(next(method.experience(PromptSet(["any"]).batch([0], rows))))


# Levels.


@named
def test_times_of_levels_invert_the_schedule(schedule: object) -> None:
    levels = torch.logspace(-1.5, 1, 200)
    found = level(schedule, time_at(schedule, levels))  # type: ignore[arg-type]
    if schedule is TABLE:  # the nearest of its entries
        known = level(TABLE, torch.arange(1, 1001) / 1000)
        levels = known[(known[:, None] / levels).log().abs().argmin(0)]
    torch.testing.assert_close(found, levels, rtol=1e-3 if isinstance(schedule, Cosine) else 1e-5, atol=0)


def test_the_highest_level() -> None:
    assert highest(EDM(), 80.0) == pytest.approx(80.0) and highest(EDM(), 9.0) == 9.0
    assert highest(RectifiedFlow(), 80.0) == 80.0
    last = float(TABLE.alphas_cumprod[-1])
    assert highest(TABLE, 80.0) == pytest.approx(math.sqrt((1 - last) / last), rel=1e-5)
    assert math.isfinite(highest(ddpm_table(rescale_zero_terminal_snr=True), 1e9))


@named
def test_pairs_of_any_schedule_are_two_times(schedule: object) -> None:
    """From t = 1 to a clean end, s below t on a table as well, weights finite."""
    times = Neighbours(Span(schedule, 1.0), lambda made: 1281, uniform)  # type: ignore[arg-type]
    t, s, weight = times(20_000, 0, generator())
    assert (s < t).all() and float(s.min()) == 0 and float(t.max()) == 1
    assert weight.isfinite().all() and (weight > 0).all() and t.dtype == s.dtype == weight.dtype == torch.float32


def test_weights_are_one_over_the_distance_of_levels() -> None:
    ring = EDM()
    levels = karras(11)
    t, s, weight = Span(ring, 0.5).times(levels[2:], levels[1:-1])
    torch.testing.assert_close(ring.level(t), levels[2:].float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(1 / weight, ring.level(t) - ring.level(s), rtol=1e-4, atol=0)
    wide = Span(ring, 1.0)
    assert float(ring.level(wide.times(levels[4:5], levels[3:4])[0])) == pytest.approx(2 * float(levels[4]), rel=1e-5)


def test_levels_are_those_of_edm() -> None:
    levels = karras(18).flip(0)
    wanted = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
    assert levels.tolist() == pytest.approx(wanted, rel=1e-12)


# How they are drawn.


def test_the_number_of_levels_doubles() -> None:
    """10 to 1,280 over 400,000 updates: K' = 400,000 / 8 (2310.14189)."""
    count = doubling(10, 1280, 400_000)
    seen = [count(made) for made in (0, 49_999, 50_000, 100_000, 350_000, 400_000, 10**9)]
    assert seen == [11, 11, 21, 41, 1281, 1281, 1281]
    assert [doubling(10, 160, 4000)(made) for made in (0, 799, 800, 3200, 3999)] == [11, 11, 21, 161, 161]
    assert doubling(10, 30, 2)(5) == 31


def test_the_number_of_levels_grows_as_a_root() -> None:
    count = rooted(2, 150, 4000)
    assert count(0) == 2 and count(4000) == count(9000) == 151
    assert count(1000) == math.ceil(math.sqrt(0.25 * (151**2 - 4) + 4) - 1) + 1
    assert all(a <= b for a, b in itertools.pairwise(count(made) for made in range(0, 4001, 50)))


def test_chances_sum_to_one_and_are_those_of_a_lognormal_level() -> None:
    levels = karras(21)
    chances = lognormal(-1.1, 2.0)(levels)
    assert float(chances.sum()) == pytest.approx(1, abs=1e-12) and chances.shape == (20,)
    drawn = (torch.randn(400_000, generator=generator(), dtype=torch.float64) * 2.0 - 1.1).exp()
    drawn = drawn[(drawn > levels[0]) & (drawn < levels[-1])]
    seen = torch.histogram(drawn, levels)[0] / len(drawn)
    assert float((seen - chances).abs().max()) < 0.003  # four standard deviations of the largest
    pairs = Neighbours(Span(EDM(), 0.5), lambda made: 21, lognormal(-1.1, 2.0))
    t, _, _ = pairs(400_000, 0, generator(1))
    place = torch.searchsorted(levels, EDM().level(t).double() * 0.999)
    assert float((torch.bincount(place, minlength=21)[1:] / len(t) - chances).abs().max()) < 0.003


def test_the_ratio_of_levels_grows_in_stages() -> None:
    """As locuslab/ect: q 2, k 8, b 1; at first the lower levels are clean, later the ratio nears 1."""
    times = ect.Settings(**SMALL, data_std=0.5, stages=4).times(Ring())
    far = torch.tensor([0.01, 1.0, 50.0], dtype=torch.float64)
    expected = far * (1 - (1 + 8 * torch.sigmoid(-far)) / 8)
    assert torch.equal(times.nearer(far, 50), expected.clamp(min=0))
    assert times.nearer(far, 0).tolist() == pytest.approx([0, 0, 25], abs=1e-6)
    assert torch.equal(times.nearer(far, 10**6), times.nearer(far, 99))
    t, s, weight = times(5000, 0, generator())
    clean = s == 0
    assert 0.5 < float(clean.float().mean()) < 1
    levels = EDM().level(t)
    torch.testing.assert_close(weight[clean], 1 / levels[clean], rtol=1e-4, atol=0)
    torch.testing.assert_close(weight, 1 / (levels - EDM().level(s)), rtol=1e-3, atol=0)


# The loss.


def test_an_average_that_keeps_nothing_is_the_student() -> None:
    """The gradient of a target with decay 0 is that of the student itself without gradient, to the last bit."""
    gradients = []
    for target in (False, True):
        ring = Ring()
        method, pairs = ring_pairs(ict.Settings(**SMALL, data_std=0.5), ring)
        if target:
            method.target = Ema(ring.parameters(), 0.0)
            with torch.no_grad():
                for parameter in ring.parameters():
                    parameter.add_(0.01)  # what the average has to take over
            method.after_step()
        else:
            with torch.no_grad():
                for parameter in ring.parameters():
                    parameter.add_(0.01)
        asked = [parameter for parameter in ring.parameters() if parameter is not ring.net.told.weight]
        gradients.append(torch.autograd.grad(method.loss(pairs).total, asked))
    assert any(bool(each.any()) for each in gradients[0])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_where_the_nearer_level_is_clean_the_target_is_the_data() -> None:
    ring = Ring()
    method, pairs = ring_pairs(ect.Settings(**SMALL, data_std=0.5), ring, rows=256)
    wanted, clean = method.wanted(pairs), pairs.s == 0
    assert 0 < clean.sum() < 256
    assert torch.equal(wanted[clean], pairs.x0[clean]) and not torch.equal(wanted[~clean], pairs.x0[~clean])


def test_both_states_have_one_noise() -> None:
    ring = Ring()
    _, pairs = ring_pairs(ict.Settings(**SMALL, data_std=0.5), ring)
    for state, t in ((pairs.x, pairs.t), (pairs.y, pairs.s)):
        at = bcast(ring.schedule.alpha(t), state) * pairs.x0 + bcast(ring.schedule.sigma(t), state) * pairs.eps
        torch.testing.assert_close(state, at)


def test_the_average_of_ct_slows_down() -> None:
    """exp(s_0 ln(mu_0) / N): 0.95 with 2 pairs at first, closer to 1 with 150."""
    method = ct.Settings(**SMALL).build(Ring(), None, generator(), pictures=Ring().pictures)
    decays = []
    for made in (0, 50, 100):
        method.source.made = made
        method.after_step()
        decays.append(method.target.decay)
    counts = [rooted(2, 150, 100)(made) for made in (0, 50, 100)]
    assert decays == pytest.approx([0.95 ** (2 / count) for count in counts], rel=1e-12)
    assert decays[0] == pytest.approx(0.95) and decays[2] == pytest.approx(0.95 ** (2 / 151))


def test_the_boundary_holds_whatever_the_network_says() -> None:
    schedule = EDM(variance_preserving=True)

    def wild(x: Tensor, number: Tensor, cond: Cond) -> Tensor:
        return 1e3 * torch.ones_like(x)

    x = torch.randn(5, 3, generator=generator())
    t = schedule.time(torch.full((5,), 0.002))
    clean = Preconditioned(wild, schedule, 0.5, 0.002)(x, t, {}).x0
    torch.testing.assert_close(clean, x / schedule.alpha(t)[:, None], rtol=1e-4, atol=1e-3)
    loose = Preconditioned(wild, schedule, 0.5)(x, t, {}).x0
    assert float((loose - x).abs().min()) > 1


# sLCT's switches.


def test_distances_near_and_far() -> None:
    """The squares that both are of small differences, and the growth that tells them apart."""
    said = torch.tensor([[1e-3, 0.0], [3.0, 4.0], [300.0, 400.0]], dtype=torch.float64)
    zero, c = torch.zeros_like(said), 0.5
    huber, cauchy = PseudoHuber(c)(said, zero), Cauchy(c)(said, zero)
    assert huber.tolist() == pytest.approx([(r**2 + c**2) ** 0.5 - c for r in (1e-3, 5.0, 500.0)], rel=1e-6, abs=5e-8)
    assert cauchy.tolist() == pytest.approx([math.log1p(r**2 / (2 * c**2)) for r in (1e-3, 5.0, 500.0)], rel=1e-5)
    small = torch.tensor([[0.01, 0.0]])
    assert float(PseudoHuber(c)(small, 0 * small)) == pytest.approx(1e-4 / (2 * c), rel=1e-2)
    assert float(c * Cauchy(c)(small, 0 * small)) == pytest.approx(1e-4 / (2 * c), rel=1e-2)
    far = torch.tensor([[1e3, 0.0]], requires_grad=True)
    assert float(torch.autograd.grad(PseudoHuber(c)(far, 0 * far).sum(), far)[0][0, 0]) == pytest.approx(1, rel=1e-5)
    (slope,) = torch.autograd.grad(Cauchy(c)(far, torch.zeros(1, 2)).sum(), far)
    assert float(slope[0, 0]) == pytest.approx(2 / 1e3, rel=1e-5)


def test_c_falls_with_the_number_of_levels() -> None:
    assert slct.robust_c(11, 4096) == pytest.approx(0.0322, rel=0.01)
    assert slct.robust_c(641, 4096) == pytest.approx(0.00024, rel=0.02)
    assert slct.robust_c(11, 64) == pytest.approx(slct.robust_c(11, 4096) / 8)
    for adaptive, falls in ((True, True), (False, False)):
        method, _ = ring_pairs(slct.Settings(**SMALL, data_std=0.5, adaptive_c=adaptive), Ring())
        first = method.distance.c
        method.source.made = 100
        assert (method.distance.c < first / 100) is falls


def test_assignments_are_permutations_that_cost_no_more() -> None:
    x0, eps = torch.randn(40, 2, 3, generator=generator()), torch.randn(40, 2, 3, generator=generator(1))
    group = torch.arange(40) % 3
    found = optimal(x0, eps, group)
    for each in range(3):
        rows = group == each
        assert sorted(found[rows].flatten(1).tolist()) == sorted(eps[rows].flatten(1).tolist())
        before, after = ((x0[rows] - noise[rows]).square().sum() for noise in (eps, found))
        assert after < before
    pair = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.1], [0.1]])
    assert optimal(*pair, torch.zeros(2, dtype=torch.int64)).flatten().tolist() == pytest.approx([0.1, 1.1])
    assert torch.equal(optimal(*pair, torch.arange(2)), pair[1])


def test_the_transport_stays_within_prompts() -> None:
    """Rows of one prompt keep the noises that were drawn for it."""
    rows = PromptSet(["class 0", "class 1"]).batch([0, 1], 32)

    def drawn(transport: bool) -> Pairs:
        ring = Ring(classes=2)
        settings = slct.Settings(**SMALL, minibatch=100, drop=0.0, transport=transport)
        return next(next(settings.build(ring, None, generator(), pictures=ring.pictures).experience(rows)))

    plain, moved = drawn(False), drawn(True)
    assert torch.equal(plain.x0, moved.x0) and not torch.equal(plain.eps, moved.eps)
    for label in (0, 1):
        mine = plain.cond["label"] == label
        assert sorted(plain.eps[mine].tolist()) == sorted(moved.eps[mine].tolist())


def test_the_diffusion_loss_reaches_the_lowest_levels_only() -> None:
    ring = Ring()
    settings = slct.Settings(**SMALL, data_std=0.5, diffusion_share=0.3, diffusion_weight=2.0, first_pairs=10)
    method, pairs = ring_pairs(settings, ring, rows=512)
    (term,) = method.terms
    limit = karras(11)[3]  # of 11 levels the lowest 3 pairs, hence the upper level of pair 3
    assert float(ring.schedule.level(term.limit(0))) == pytest.approx(float(limit), rel=1e-5)
    said = torch.randn(pairs.x.shape, generator=generator(2), requires_grad=True)
    total, _ = term(method, pairs, said)
    (slope,) = torch.autograd.grad(total, said)
    low = ring.schedule.level(pairs.t) < limit * 1.01
    assert 0 < low.sum() < 512
    assert not slope[~low].any() and (slope[low] != 0).all()
    expected = 2.0 * bcast(pairs.weight, said) * (said - pairs.x0)  # the mean over two dimensions
    torch.testing.assert_close(slope[low], expected[low].detach())
    nothing = dataclasses.replace(term, share=0.0)
    assert not nothing(method, pairs, said)[0].any()


def test_layer_norms_lose_their_scales() -> None:
    """In training; what it was before keeps them. A LoRA, and a network without such scales, are refused."""
    pipe = tiny.sd_pipeline()
    model = wrap_pipeline(pipe, guidance_scale=2.0, steps=3, onednn=False)
    norms = [layer for layer in pipe.unet.modules() if isinstance(layer, torch.nn.LayerNorm)]
    for norm in norms:
        torch.nn.init.constant_(norm.weight, 1.5)
    model.train_full()
    count, x, cond = len(model.parameters()), tiny.noise(2), model.encode(tiny.PROMPTS)
    with torch.no_grad(), model.reference():
        before = model.net(x, torch.tensor([400, 900]), cond)
    model.unscale_norms()
    assert norms and len(model.parameters()) == count - len(norms)
    assert all(bool((norm.weight == 1).all()) and not norm.weight.requires_grad for norm in norms)
    with torch.no_grad():
        assert not torch.equal(model.net(x, torch.tensor([400, 900]), cond), before)
        with model.reference():
            assert torch.equal(model.net(x, torch.tensor([400, 900]), cond), before)
    lora = wrap_pipeline(tiny.sd_pipeline(), guidance_scale=2.0, steps=3, onednn=False)
    lora.add_lora(2)
    with pytest.raises(ValueError, match="give full"):
        lora.unscale_norms()
    without = wrap_pipeline(tiny.sd3_pipeline(), guidance_scale=2.0, steps=3, onednn=False)
    without.train_full()
    with pytest.raises(ValueError, match="no layer norm of this network has a scale"):
        without.unscale_norms()
    with pytest.raises(ValueError, match="this model has no layer norms"):
        slct.Settings(unscaled_norms=True).build(Ring(), None, generator(), pictures=Ring().pictures)


# Settings, and the ring's data.


@pytest.mark.parametrize(
    ("kind", "changes", "sentence"),
    [
        (ict, {"total_updates": 0}, "total_updates is 0"),
        (ict, {"data_std": 0.0}, "data_std is 0.0"),
        (ict, {"drop": 1.0}, "drop is 1.0"),
        (ict, {"updates": 65}, "updates is 65; wanted at most the 64 pictures"),
        (ict, {"first_pairs": 20, "last_pairs": 10}, "first_pairs is 20 and last_pairs 10"),
        (ict, {"level_std": 0.0}, "level_std is 0.0"),
        (ct, {"first_decay": 1.0}, "first_decay is 1.0"),
        (ect, {"q": 1.0}, "q is 1.0"),
        (ect, {"stages": 0}, "stages is 0"),
        (ect, {"k": -1.0}, "k is -1.0"),
        (slct, {"diffusion_share": 1.5}, "diffusion_share is 1.5"),
        (slct, {"cauchy_scale": 0.0}, "cauchy_scale is 0.0"),
    ],
)
def test_impossible_settings_are_one_sentence(kind: object, changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        kind.Settings(**changes).check()  # type: ignore[attr-defined]


def test_the_ring_in_more_dimensions_has_outliers_in_its_data_only() -> None:
    ring, rows = Ring(dimensions=8, outliers=0.02), PromptSet(["any"]).batch([0], 20_000)
    assert ring.latent_shape == (8,) and ring.exact.means.shape == (8, 8)
    inliers, shown = ring.sample(list(rows.text), generator()), ring.pictures(rows, generator())
    far = shown != inliers
    assert float(far.float().mean()) == pytest.approx(0.02, abs=0.002)
    torch.testing.assert_close(shown[far], OUTLIER * inliers[far])
    assert float(inliers.square().mean()) == pytest.approx(0.68**2 / 2 + 0.05**2, rel=0.02)
    assert torch.equal(Ring().pictures(rows, generator()), Ring().sample(list(rows.text), generator()))
