"""CoMoSpeech beyond the battery: the mask, the mean in noise that is drawn again, what is refused, and whole runs."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from distillers import points
from leaning import Leaning
from methods import Off, batch, toy
from safetensors.torch import load_file
from small_run import refused, said, small_place, train_words
from torch import Tensor

from tropism import catalog
from tropism.base import Prompts
from tropism.config import BadInput
from tropism.data.prompts import PromptSet
from tropism.denoisers import MASK, MEAN, Shifted
from tropism.distillation import Distillation, Pairs
from tropism.losses.consistency import MeanSquare
from tropism.methods import comospeech, lcm
from tropism.methods.comospeech import unmasked
from tropism.models.melodies import SCALE, Decoder, Melodies, load_melodies, save_melodies
from tropism.policy import Policy
from tropism.samplers import DDIM, Consistency, walk
from tropism.train import train
from tropism.worlds import melodies as world

SHORT, LONG = "loud sine C4 E4 G4 C5", "soft organ A4 hold rest E5 E5 F5 G5 A5"
read = partial(world.score, frames=world.FRAMES_A_BEAT)


def model(seed: int = 0, **options: Any) -> Melodies:
    """A small decoder that says something everywhere, and a table of noise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Decoder(world.BINS, world.FRAMES, width=32, depth=2)
        for parameter in network.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape)
        table = 0.3 * torch.randn(world.VOICES, world.BINS)
    table[-1] = 0.0
    return Melodies(network, table, read, **options)


def played(prompts: Prompts, generator: torch.Generator) -> Tensor:
    seeds = torch.randint(2**31, (len(prompts.text),), generator=generator).tolist()
    return torch.from_numpy(world.to_pictures(world.render_batch([world.parse(t) for t in prompts.text], seeds)))


def method(made: Melodies, **changes: Any) -> Distillation:
    settings = comospeech.Settings(**{"inference_steps": 10, "updates": 1, "minibatch": 64} | changes)
    settings.check()
    return settings.build(made, Off(), torch.Generator().manual_seed(0), played)


def first(made: Distillation, prompts: Prompts) -> Pairs:
    return next(iter(next(iter(made.experience(prompts)))))


def some() -> Prompts:
    return PromptSet([SHORT, LONG]).batch([0, 1], 3)


def test_the_distance_is_the_mean_square_over_what_is_there() -> None:
    said, wanted = torch.randn(2, 2, 1, 4, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 1, 1, 8)
    mask[0, ..., :3], mask[1, ..., :8] = 1, 1
    apart = MeanSquare()(unmasked(said, torch.ones(2), {MASK: mask}), unmasked(wanted, torch.ones(2), {MASK: mask}))
    by_hand = [(said - wanted)[0, ..., :3].square().mean(), (said - wanted)[1].square().mean()]
    torch.testing.assert_close(apart, torch.stack(by_hand))
    assert torch.equal(unmasked(said, torch.ones(2), {}), said)
    empty = unmasked(said, torch.ones(2), {MASK: torch.zeros(2, 1, 1, 8)})
    assert empty.isfinite().all() and not empty.any()


def test_what_fills_a_clip_up_carries_no_gradient_and_is_not_counted() -> None:
    said = torch.randn(2, 1, 4, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    mask = torch.ones(2, 1, 1, 8)
    mask[..., 5:] = 0
    MeanSquare()(unmasked(said, torch.ones(2), {MASK: mask}), torch.zeros(2, 1, 4, 8)).sum().backward()
    assert said.grad is not None and not said.grad[..., 5:].any()
    torch.testing.assert_close(said.grad[..., :5], 2 * said.detach()[..., :5] / (4 * 5))


def test_wrong_lengths_are_refused() -> None:
    for shape in ((2, 1, 1, 7), (3, 1, 1, 8), (2, 8)):
        with pytest.raises(ValueError, match=r"cond has a mask of shape .* for states \(2, 1, 4, 8\)"):
            unmasked(torch.zeros(2, 1, 4, 8), torch.ones(2), {MASK: torch.ones(shape)})


def test_pairs_are_neighbours_on_the_grid_and_one_euler_step_apart() -> None:
    made = model()
    made.train_full()
    recipe = method(made)
    pairs, grid = first(recipe, some()), made.grid(10)
    for t, s in zip(pairs.t, pairs.s, strict=True):
        place = int((grid - t).abs().argmin())
        assert t == grid[place] and s == grid[place + 1]
    schedule = made.denoiser.schedule
    assert pairs.x0 is not None and pairs.eps is not None
    with torch.no_grad():
        said = made.denoiser(pairs.x, pairs.t, pairs.cond)
    level_s, alpha_s = (schedule.sigma(pairs.s) / schedule.alpha(pairs.s)), schedule.alpha(pairs.s)
    by_hand = (said.x0 + level_s[:, None, None, None] * said.eps) * alpha_s[:, None, None, None]
    torch.testing.assert_close(pairs.y, by_hand, rtol=1e-4, atol=1e-4)
    assert isinstance(recipe.distance, MeanSquare) and recipe.target is not None and recipe.target.decay == 0.95


def test_the_network_sees_the_mean_in_every_noise() -> None:
    """At the start and where noise is drawn again it is asked at alpha x0 + sigma (z + mu), z the draw."""
    made = model()
    seen: list[tuple[Tensor, Tensor]] = []
    assert isinstance(made.denoiser, Shifted)
    inner = made.denoiser.inner

    class Spy:
        schedule = made.denoiser.schedule

        def __call__(self, x: Tensor, t: Tensor, cond: Any) -> Any:
            seen.append((x, t))
            return inner(x, t, cond)

    cond, x = made.encode([SHORT, LONG]), torch.randn(2, 1, 48, 32, generator=torch.Generator().manual_seed(4))
    assert cond[MEAN].abs().max() > 0.5
    with torch.no_grad():
        moves = list(walk(Consistency(), Shifted(Spy()), x, made.grid(3), cond, torch.Generator().manual_seed(5)))
    draws = torch.Generator().manual_seed(5)
    torch.testing.assert_close(seen[0][0], x + cond[MEAN], rtol=1e-3, atol=1e-3)  # sigma is 0.99992 there
    for move, (at, t) in zip(moves, seen[1:], strict=False):
        z = torch.randn(2, 1, 48, 32, generator=draws)
        alpha, sigma = (value(t)[:, None, None, None] for value in (made._schedule.alpha, made._schedule.sigma))
        torch.testing.assert_close(at, alpha * move.prediction.x0 + sigma * (z + cond[MEAN]), rtol=1e-5, atol=1e-5)


def test_what_fills_a_clip_up_is_neither_read_nor_heard() -> None:
    made, generator = model(), torch.Generator().manual_seed(1)
    cond, t = made.encode([SHORT, LONG]), torch.tensor([0.7, 0.2])
    x = torch.randn(2, 1, 48, 32, generator=generator)
    other = x + 5 * (1 - cond[MASK]) * torch.randn(x.shape, generator=generator)
    with torch.no_grad():
        one, two = made.denoiser(x, t, cond), made.denoiser(other, t, cond)
    real = cond[MASK].expand_as(x) > 0
    assert torch.equal(one.x0, two.x0) and torch.equal(one.eps[real], two.eps[real])
    assert not one.x0[~real].any() and one.x0[real].abs().min() > 0
    for policy in (Policy(made, Consistency(), 2), method_policy(made)):
        clip = policy.draw([SHORT], torch.Generator().manual_seed(2))
        assert not clip[..., 16:].any() and clip[..., :16].abs().min() > 0


def method_policy(made: Melodies) -> Policy:
    return comospeech.Settings(inference_steps=10).student(copy.copy(made), "consistency")


def test_the_student_starts_from_the_boundary() -> None:
    """f(x, t) = x at the lowest level, whatever the network says: 2303.01469, appendix C."""
    made = model()
    view = made.few_step("consistency", 1)
    t = made._schedule.time(torch.tensor([0.002, 0.002]))
    clean = torch.rand(2, 1, 48, 32, generator=torch.Generator().manual_seed(3))
    cond = made.encode([LONG, LONG])
    with torch.no_grad():
        said = view.denoiser(made._schedule.alpha(t)[:, None, None, None] * clean, t, cond).x0
    torch.testing.assert_close(said, clean + 0.002 * cond[MEAN], rtol=1e-4, atol=1e-4)  # on the path of its noise


def one_update(minibatch: int) -> Tensor:
    made = model()
    made.train_full()
    before = torch.cat([p.detach().flatten() for p in made.parameters()]).clone()
    recipe = method(made, minibatch=minibatch)
    train(recipe, [some()], torch.optim.SGD(made.parameters(), lr=1.0), steps=1, max_norm=0)
    return torch.cat([p.detach().flatten() for p in made.parameters()]) - before


def test_minibatches_of_clips_of_several_lengths_change_nothing() -> None:
    whole, parts = one_update(64), one_update(4)
    assert whole.norm() > 0 and float((whole - parts).norm() / whole.norm()) < 1e-5


def test_only_the_decoder_is_trained() -> None:
    made = model()
    made.train_full()
    table, before = made.table.clone(), [p.detach().clone() for p in made.parameters()]
    with torch.no_grad(), made.reference():
        was = made.denoiser(*asked(made))
    train(method(made, updates=2), [some()] * 2, torch.optim.AdamW(made.parameters(), lr=1e-3), steps=2)
    assert torch.equal(made.table, table) and not made.table.requires_grad
    assert any(not torch.equal(p, q) for p, q in zip(made.parameters(), before, strict=True))
    with torch.no_grad(), made.reference():
        torch.testing.assert_close(made.denoiser(*asked(made)), was, rtol=0, atol=0)


def asked(made: Melodies) -> tuple[Tensor, Tensor, Any]:
    x = torch.randn(2, 1, 48, 32, generator=torch.Generator().manual_seed(9))
    return x, torch.tensor([0.3, 0.8]), made.encode([SHORT, LONG])


def test_models_that_do_not_suit_are_refused() -> None:
    settings, generator = comospeech.Settings(inference_steps=10), torch.Generator()
    with pytest.raises(ValueError, match="the noise of this model has no mean"):
        settings.build(toy("eps"), Off(), generator, points)
    with pytest.raises(ValueError, match="the noise of this model has no mean"):
        settings.build(model(shifted=False), Off(), generator, played)
    leaning = Leaning(toy("eps"))
    tabled = copy.copy(leaning)
    tabled.denoiser = Shifted(toy("eps").denoiser)
    with pytest.raises(
        ValueError, match="the schedule of this model is DDPMTable; comospeech steps on the levels of EDM"
    ):
        settings.build(tabled, Off(), generator, points)
    with pytest.raises(ValueError, match="student_steps is 10"):
        comospeech.Settings(inference_steps=10, student_steps=10).check()


def test_without_a_mask_it_is_lcm_from_data() -> None:
    results = []
    for kind in (comospeech, lcm):
        made = Leaning(toy("eps"))
        settings = kind.Settings(inference_steps=8, student_steps=1, distance="l2", data="pictures", updates=1)
        recipe = settings.build(made, Off(), torch.Generator().manual_seed(0), points)
        train(recipe, [batch()], torch.optim.SGD(made.parameters(), lr=1e-2), steps=1)
        results.append(torch.cat([p.detach().flatten() for p in made.parameters()]))
    assert torch.equal(*results)


def test_pictures_are_what_the_world_draws(tmp_path: Any) -> None:
    made = model()
    values = world.render_batch([world.parse(SHORT), world.parse(LONG)], [0, 1])
    x = torch.from_numpy(values)[:, None] * SCALE
    torch.testing.assert_close(made.decode(x), torch.from_numpy(world.to_pictures(values)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(made.latents(made.decode(x)), x, rtol=1e-5, atol=1e-5)
    assert made.null()[MASK].all() and not made.null()[MEAN].any()
    with pytest.raises(ValueError, match="'a red fox' is no melody"):
        made.encode(["a red fox"])
    save_melodies(tmp_path / "m.safetensors", made._net, made.table)
    again = load_melodies(tmp_path / "m.safetensors", read)
    with torch.no_grad():
        torch.testing.assert_close(
            again.denoiser(*asked(again)).x0, made.denoiser(*asked(made)).x0, rtol=0.02, atol=0.02
        )


def test_melodies_is_a_name_for_model_prompts_and_rewards() -> None:
    own = [catalog.own_prompts("melodies", held) for held in (False, True)]
    assert own == ["melodies", "melodies-held-out"] and catalog.own_rewards("melodies") == ["melodies"]
    train_set, held_out = (catalog.read_prompt_set(name) for name in ("melodies:40", "melodies-held-out:40"))
    assert {world.split_of(world.parse(text)) for text in train_set.text} == {"train"}
    assert {world.split_of(world.parse(text)) for text in held_out.text} == {"held_out"}
    assert len(catalog.read_prompt_set("melodies").text) == 512
    clips = catalog.pictures("melodies:40", train_set)(train_set.batch(range(40), 1), torch.Generator().manual_seed(0))
    for name in ("melodies", "melodies_pass"):
        reward = catalog.build_reward(catalog.parse_reward(name), "melodies", torch.device("cpu"))
        assert reward.name == name and reward(clips, train_set.text).mean() == 1
    assert reward(clips.roll(1, 0), train_set.text).mean() < 0.1
    with pytest.raises(BadInput, match=r"prompts is melodies-pair"):
        catalog.read_prompt_set("melodies-pair")


def test_the_shipped_model_is_loaded_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    made = catalog.load_model("melodies", torch.float32, torch.device("cpu"))
    texts = world.prompts(8, 2, "held_out")
    heard = world.verify_batch(
        Policy(made, DDIM(0.0), 12).images(texts, torch.Generator().manual_seed(0)).numpy(), texts
    )
    assert sum(verdict.score for verdict in heard) / 8 > 0.75
    result = said(["models", "melodies"], capsys)
    assert result.code == 0 and "1 x 48 x 32" in result.out and "50 steps" in result.out
    with pytest.raises(BadInput, match="export knows diffusers' pipelines"):
        catalog.exporter("melodies")


def words(**changes: str) -> list[str]:
    common = dict(model="melodies", prompts="melodies:8", reward="melodies", inference_steps="4", images_per_prompt="1")
    return train_words("comospeech", **common | {"full": "", "eval_images": "2", "eval_every": "0"} | changes)


def test_a_run_goes_on_bit_for_bit(tmp_path: Any, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    result = said(words(out="run"), capsys)
    assert result.code == 0, result.err
    assert said(words(out="half", steps="1"), capsys).code == 0
    assert said(["distill", "comospeech", "--resume", "half", "--steps", "2"], capsys).code == 0
    whole, parts = (load_file(f"{run}/adapter/network/model.safetensors") for run in ("run", "half"))
    was = load_file(catalog.models.MELODIES)
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    assert any(not torch.equal(value, was[name].float()) for name, value in whole.items())
    assert (
        said(["sample", "--model", "melodies", "--prompt", SHORT, "--adapter", "run", "--out", "a.png"], capsys).code
        == 0
    )


def test_the_command_refuses_other_models(tiny_sd: Any, tmp_path: Any, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(small_place(tiny_sd, tmp_path))
    assert "the noise of this model has no mean" in refused(train_words("comospeech"), capsys)
