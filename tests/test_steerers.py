"""Guides by name: each is the guide of its own tests, put where it belongs, with its costs; and bad input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import ROWS
from policies import Line
from small_run import refused, small_place
from test_steering import MEANS, NAMES, asked, toy
from torch import Tensor

from tropism import catalog, pictures
from tropism.base import Reward
from tropism.evaluate import deterministic
from tropism.guidance import RewardGuided
from tropism.rewards import as_reward
from tropism.steer import steer
from tropism.steering import dps, freedom, image_seeds, mpgd, safe, srds, steer_policy, tfg, universal
from tropism.steering.adaptive import Settings as Adaptive
from tropism.steering.best_of_n import Settings as BestOfN
from tropism.steering.fk import Settings as Fk
from tropism.steering.linear_ag import Settings as LinearAG

LINE: Reward = Line()
EXACT = dict(scale=1.0, times=(0.0, 1.0), limit=None)


def drawn(steerers: list, count: int = 400) -> tuple[Tensor, object]:
    names = ["right"] * count
    found, trace = steer_policy(toy(), LINE, asked(*names), steerers, image_seeds(count, 0))
    return found.latents, trace


def test_tfg_tilts_a_gaussian_exactly() -> None:
    """A linear reward on a Gaussian: the guided chain is that of N(mean + std^2 a, std^2), from the same noise."""
    from tropism.models.toy import GaussianPolicy
    from tropism.policy import Policy
    from tropism.samplers import DDIM

    guided, _ = drawn([tfg.Settings(rho=1.0, keep_noise=False, **EXACT)])
    moved = Policy(GaussianPolicy(["right"], MEANS[1:2] + 0.25 * Line.direction, 0.5), DDIM(1.0), 6, 1.0)
    exact, _ = steer_policy(moved, LINE, asked(*["right"] * 400), [], image_seeds(400, 0))
    assert torch.allclose(guided, exact.latents, atol=1e-4)


@pytest.mark.parametrize(
    ("point", "knobs"),
    [
        (dps.Settings(rho=0.5), dict(rho=0.5)),
        (mpgd.Settings(mu=0.7), dict(rho=0.0, mu=0.7)),
        (freedom.Settings(rho=0.5, recurrence=3), dict(rho=0.5, recurrence=3)),
        (
            universal.Settings(rho=0.5, mu=0.7, iterations=3, recurrence=2),
            dict(rho=0.5, mu=0.7, iterations=3, recurrence=2, keep_noise=False),
        ),
    ],
    ids=["dps", "mpgd", "freedom", "universal"],
)
def test_points_of_the_family(point: tfg.Settings, knobs: dict) -> None:
    whole = tfg.Settings(point.scale, point.times, point.limit, **knobs)
    assert torch.equal(drawn([point], 5)[0], drawn([whole], 5)[0])


def test_recurrence_and_smoothing_cost_what_they_say() -> None:
    _, once = drawn([tfg.Settings(times=(0.0, 1.0))], 3)
    _, thrice = drawn([tfg.Settings(times=(0.0, 1.0), recurrence=3)], 3)
    _, smooth = drawn([tfg.Settings(times=(0.0, 1.0), smoothing=4)], 3)
    assert (once.calls, once.scored) == (6, 6) and (thrice.calls, thrice.scored) == (18, 18)
    assert (smooth.calls, smooth.scored) == (6, 24)


def test_a_guide_and_a_search_go_together() -> None:
    gained, _ = drawn([tfg.Settings(**EXACT), BestOfN(particles=4)], 50)
    guided, _ = drawn([tfg.Settings(**EXACT)], 50)
    weighed, trace = drawn([tfg.Settings(**EXACT), Fk(particles=4, every=1, scale=1.0)], 50)
    assert float((gained @ Line.direction).mean()) > float((guided @ Line.direction).mean()) + 0.3
    assert float((weighed @ Line.direction).mean()) > float((guided @ Line.direction).mean()) + 0.3
    assert trace.calls == 6 * 4
    with pytest.raises(ValueError, match="decides how its chain is walked, and so does this search"):
        drawn([freedom.Settings(**EXACT), Fk(particles=4)], 5)


@pytest.mark.parametrize("guide", [dps.Settings(), freedom.Settings(), mpgd.Settings(), universal.Settings()])
def test_guides_say_that_they_need_a_gradient(guide: tfg.Settings) -> None:
    with pytest.raises(TypeError, match="reward 'blind' has no gradient"):
        steer_policy(toy(), as_reward(lambda images: [0.0] * len(images), "blind"), asked("up"), [guide],
                     image_seeds(1, 0))  # fmt: skip


@pytest.mark.parametrize("microbatch", [64, 2])
def test_a_chain_found_in_parallel_is_the_chain(microbatch: int) -> None:
    model = ROWS["sd3"].model()
    policy, prompts, seeds = deterministic(model, 16, 2.0, microbatch), asked("a fox", "a hill", "x"), image_seeds(3, 0)
    serial, one = steer_policy(policy, LINE, prompts, [], seeds)
    exact, all_ = steer_policy(policy, LINE, prompts, [srds.Settings(tolerance=0.0)], seeds)
    rough, few = steer_policy(policy, LINE, prompts, [srds.Settings(refinements=1)], seeds)
    assert torch.allclose(exact.latents, serial.latents, atol=1e-4)
    assert few.steps[0]["serial_calls"] < 16 and few.calls > one.calls and all_.calls > few.calls
    assert float((rough.latents - serial.latents).abs().max()) < float(serial.latents.abs().max())
    with pytest.raises(ValueError, match="draws its states"):
        steer_policy(toy(), LINE, asked("up"), [srds.Settings()], image_seeds(1, 0))


def test_guides_know_the_prompt_of_each_row() -> None:
    """Every prompt has a reward of its own, and samples of a micro-batch are of several."""

    class Own:
        name, differentiable = "own", True

        def __call__(self, samples: Tensor, prompts: list[str], **columns: object) -> Tensor:
            sign = torch.tensor([1.0 if prompt == "up" else -1.0 for prompt in prompts])
            return sign * samples[:, 1]

    names = ["up", "left"] * 20
    plain, _ = steer_policy(toy(microbatch=7), Own(), asked(*names), [], image_seeds(40, 0))
    found, _ = steer_policy(toy(microbatch=7), Own(), asked(*names), [tfg.Settings(**EXACT)], image_seeds(40, 0))
    moved = (found.latents - plain.latents)[:, 1]
    assert bool((moved[::2] > 0.1).all()) and bool((moved[1::2] < -0.1).all())


# On a pipeline.


def bright(images: Tensor) -> Tensor:
    return images.mean((1, 2, 3))


def test_adaptive_guidance_saves_calls() -> None:
    model = ROWS["sd"].model()
    policy = deterministic(model, 6, 3.0)
    prompts, seeds = asked("a fox", "a hill"), image_seeds(2, 0)
    full, all_ = steer_policy(policy, as_reward(bright), prompts, [], seeds)
    never, same = steer_policy(policy, as_reward(bright), prompts, [Adaptive(threshold=1.0)], seeds)
    always, few = steer_policy(policy, as_reward(bright), prompts, [Adaptive(threshold=-1.0)], seeds)
    assert all_.calls == same.calls == 12 and torch.equal(full.latents, never.latents)
    assert few.calls == 2 + 5 and not torch.equal(full.latents, always.latents)
    linear, half = steer_policy(policy, as_reward(bright), prompts, [LinearAG([0, 2, 4], fitted_on=4)], seeds)
    assert half.calls == 6 + 3 + 4 * 12 / 2
    gap = float((linear.latents - full.latents).square().mean())
    unguided, _ = steer_policy(policy.with_(guidance=1.0), as_reward(bright), prompts, [], seeds)
    assert gap < 0.1 * float((unguided.latents - full.latents).square().mean())


def test_safe_draws_away_from_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The random encoder of a tiny pipeline inverts nothing, so the latent of the picture is said to be what it is."""
    model = ROWS["sd"].model()
    told = dict(num_inference_steps=6, output_type="latent")
    plain = steer(model, bright, [])(["a fox", "a hill"], **told).images
    pictures.save(pictures.to_image(model.decode(plain)[0]), tmp_path / "fox.png")
    guide = safe.Settings(avoid=str(tmp_path), times=(0.0, 1.0))
    with monkeypatch.context() as patched:
        patched.setattr(type(model), "latents", lambda self, images: plain[:1])
        found = steer(model, bright, guide)(["a fox", "a hill"], **told).images
    moved = (found - plain).square().flatten(1).mean(1)
    assert float(moved[0]) > 0.05 * float(plain.square().mean()) and float(moved[0]) > 10 * float(moved[1])
    pictures.save(pictures.to_image(torch.zeros(3, 32, 32)), tmp_path / "fox.png")
    with pytest.raises(ValueError, match=r"pictures of \(32, 32\) pixels give latents"):
        steer(model, bright, guide)(["a fox"], num_inference_steps=2)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["adaptive", "--threshold", "2"], "threshold is 2.0; wanted a cosine from -1 to 1"),
        (["tfg", "--times", "0.9", "0.1"], "times is 0.9 0.1; wanted two times from 0 to 1"),
        (["freedom", "--recurrence", "0"], "recurrence 0 and smoothing"),
        (["dps", "--limit", "0"], "limit is 0.0; wanted above 0, or none"),
        (["safe"], "avoid is not given, without pictures; wanted a folder"),
        (["safe", "--avoid", "nowhere"], "avoid is nowhere, without pictures"),
        (["linear-ag", "--asked", "1", "2"], "asked is 1 2; wanted moves from 0 on"),
        (["infedit"], "picture is not given, which is no file"),
        (["infedit", "--picture", "nowhere.png"], "picture is nowhere.png, which is no file"),
        (["infedit", "--picture", "prompts.txt"], "source is not given; wanted what the picture shows"),
        (["infedit", "--picture", "prompts.txt", "--source", "x", "--edit-strength", "2"], "edit_strength is 2.0"),
        (["one-actor"], "actor is not given, which is no file"),
        (["one-actor", "--actor", "nowhere"], "actor is nowhere, which is no file"),
        (["one-actor", "--actor", "prompts.txt", "--likeness", "-1"], "likeness is -1.0 and exclude 0.0"),
        (["one-actor", "--actor", "prompts.txt", "--times", "0.9", "0.1"], "times is 0.9 0.1"),
    ],
)
def test_bad_settings_are_one_sentence(
    words: list[str],
    sentence: str,
    tiny_sd: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(small_place(tiny_sd, tmp_path))
    command = ["sample", "--model", "model", "--reward", "brightness", "--prompt", "x", "--steer"]
    assert sentence in refused([*command, *words], capsys)


def test_every_steerer_is_guide_or_search() -> None:
    kinds = {name: catalog.steerer_settings(name)[0] for name in catalog.steerer_names()}
    assert all(hasattr(kind, "draw") != hasattr(kind, "guide") for kind in kinds.values())
    assert {"adaptive", "beam", "best-of-n", "ditto", "dps", "fk", "linear-ag", "safe", "tfg"} <= set(kinds)
    assert RewardGuided.__doc__ and NAMES


def test_correctors_sample_the_law_of_guidance() -> None:
    """Both laws are Gaussian of one width, so that their geometric mean is too: mean w m + (1 - w) 0."""
    from tropism.models.toy import GaussianPolicy
    from tropism.policy import Policy
    from tropism.samplers import DDIM
    from tropism.steering import fkc

    policy = Policy(GaussianPolicy(["right"], MEANS[1:2], 0.5), DDIM(1.0), 60, 2.0)
    search = fkc.Settings(particles=2000, clamp=None)
    found, trace = steer_policy(policy, LINE, asked("right"), [search], image_seeds(1, 0))
    particles = found.particles
    error = 0.5 / float(particles.ess[0]) ** 0.5
    assert error < 0.03
    assert torch.allclose(particles.mean()[0].float(), 2.0 * MEANS[1], atol=3 * error)
    assert float(particles.reward.max()) == pytest.approx(float(found.latents[0] @ Line.direction), abs=1e-5)
    assert trace.scored == 2000
    with pytest.raises(ValueError, match="fkc samples the law of one guidance"):
        steer_policy(policy, LINE, asked("right"), [tfg.Settings(), search], image_seeds(1, 0))
