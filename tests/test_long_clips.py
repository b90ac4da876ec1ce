"""Clips that go on from one another: what they share is equal, what pulls them together has a closed form."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from families import v_clips
from test_animatediff import disturb

from tropism.base import Prediction
from tropism.denoisers import consistent
from tropism.long_clips import Extension, extend
from tropism.models.pipelines import wrap_pipeline
from tropism.models.toy import MODES, PROMPTS, SPREAD, ToyNet, ToyTextToImage
from tropism.models.toy_clips import FRAMES, TURN, Mixer, ToyClips
from tropism.policy import Policy
from tropism.samplers import DDIM, EulerODE, solver, walk
from tropism.samplers.cono import Continued, Held, Overlap, beliefs, extended_noise, regularised
from tropism.schedules import RectifiedFlow

AXIS = 1


def toy(target: str = "v", frames: int = FRAMES) -> Policy:
    """A clip toy of random weights, whose frames see one another."""
    generator = torch.Generator().manual_seed(0)
    image = ToyTextToImage(ToyNet(generator), torch.randn(8, 16, generator=generator), target)
    mixers = torch.nn.ModuleList(Mixer(generator, frames=frames) for _ in range(3))
    disturb(mixers.parameters())
    model = ToyClips(image, mixers)
    return Policy(model, solver(model.denoiser), 10)


def moves_of(policy: Policy, noise: torch.Tensor, prompts: list[str], **walker: Any) -> list[Any]:
    with torch.no_grad():
        return list(policy.with_(**walker).chain(noise, policy.model.encode(prompts)))


def test_the_noise_of_the_next_clip_begins_with_the_end_of_this_one() -> None:
    noise = torch.arange(6.0).reshape(1, 6, 1)
    assert extended_noise(noise, 2, AXIS).flatten().tolist() == [4, 5, 3, 2, 1, 0]
    assert extended_noise(noise, 0, AXIS).flatten().tolist() == [5, 4, 3, 2, 1, 0]
    assert extended_noise(noise.transpose(1, 2), 5, 2).flatten().tolist() == [1, 2, 3, 4, 5, 0]


@pytest.mark.parametrize("target", ["v", "flow"])
def test_shared_frames_are_the_same_to_the_last_bit_while_they_are_held(target: str) -> None:
    policy = toy(target)
    noise = torch.randn(3, FRAMES, 2, generator=torch.Generator().manual_seed(1))
    first = moves_of(policy, noise, list(PROMPTS[:3]))
    told = beliefs(first, [2, 3], AXIS)
    until = 0.55
    walker = Continued(Overlap([0, 1], told, []), AXIS, until)
    second = moves_of(policy, extended_noise(noise, 2, AXIS), list(PROMPTS[3:6]), walker=walker)
    held = [float(move.t[0]) >= until for move in first]
    assert 0 < sum(held) < len(held)
    for one, other, here in zip(first, second, held, strict=True):
        equal = torch.equal(one.x_next[:, 2:], other.x_next[:, :2])
        assert equal == here, float(one.t[0])
        assert not torch.equal(one.x_next[:, 2:], other.x_next[:, 2:])


def test_what_is_not_held_is_drawn_as_ever() -> None:
    """Above 1 nothing is held, and a clip is drawn from its noise."""
    policy = toy()
    noise = torch.randn(2, FRAMES, 2, generator=torch.Generator().manual_seed(1))
    first = moves_of(policy, noise, list(PROMPTS[:2]))
    walker = Continued(Overlap([0], beliefs(first, [3], AXIS), []), AXIS, 1.5)
    plain, never = (moves_of(policy, noise, list(PROMPTS[2:4]), walker=each) for each in (walk, walker))
    assert torch.equal(plain[-1].x_next, never[-1].x_next)


def test_the_pull_is_the_gradient_of_the_distance_of_the_means() -> None:
    generator = torch.Generator().manual_seed(0)
    eps, other = (
        torch.randn(2, 3, 5, 4, generator=generator, dtype=torch.float64),
        torch.randn(2, 3, 7, 4, generator=generator, dtype=torch.float64),
    )
    eps.requires_grad_()
    distance = (other.mean(2) - eps.mean(2)).square().sum()
    (gradient,) = torch.autograd.grad(distance, eps)
    delta = 0.4
    content = other.mean(2, keepdim=True)
    pulled = regularised(eps, content, 2 * delta / 5, 2)
    torch.testing.assert_close(pulled, eps - delta * gradient, rtol=0, atol=1e-14)
    torch.testing.assert_close(regularised(eps, content, 1.0, 2).mean(2, keepdim=True), content, rtol=0, atol=1e-14)
    assert torch.equal(regularised(eps, content, 0.0, 2), eps)


def test_a_pulled_belief_still_explains_the_state() -> None:
    policy = toy()
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, FRAMES, 2, generator=generator), torch.tensor([0.3, 0.8])
    cond, content = policy.model.encode(PROMPTS[:2]), torch.randn(2, 1, 2, generator=generator)
    with torch.no_grad():
        said = Held(policy.denoiser, AXIS, content=content, step=0.5)(x, t, cond)
        plain = policy.denoiser(x, t, cond)
    schedule = policy.denoiser.schedule
    alpha, sigma = schedule.alpha(t)[:, None, None], schedule.sigma(t)[:, None, None]
    torch.testing.assert_close(alpha * said.x0 + sigma * said.eps, x, rtol=0, atol=1e-5)
    halfway = (plain.eps.mean(1, keepdim=True) + content) / 2
    torch.testing.assert_close(said.eps.mean(1, keepdim=True), halfway, rtol=0, atol=1e-5)


def test_without_a_signal_the_clean_half_is_left() -> None:
    policy = toy("flow")
    x, cond = torch.randn(1, FRAMES, 2, generator=torch.Generator().manual_seed(0)), policy.model.encode(PROMPTS[:1])
    with torch.no_grad():
        said = Held(policy.denoiser, AXIS, content=torch.ones(1, 1, 2), step=1.0)(x, torch.ones(1), cond)
        assert torch.equal(said.x0, policy.denoiser(x, torch.ones(1), cond).x0)


def test_a_long_clip_begins_with_the_one_that_is_drawn_and_goes_on() -> None:
    policy = toy()
    rows = [[PROMPTS[0]] * 3, [PROMPTS[1], PROMPTS[2], PROMPTS[3]]]
    long = extend(policy, rows, torch.Generator().manual_seed(0))
    assert long.shape == (2, 3 * FRAMES - 2 * 2, 2)
    first = policy.draw([row[0] for row in rows], torch.Generator().manual_seed(0))
    assert torch.equal(long[:, :FRAMES], first)
    one_by_one = extend(policy.with_(microbatch=1), rows, torch.Generator().manual_seed(0))
    torch.testing.assert_close(one_by_one, long, rtol=0, atol=1e-5)
    assert torch.equal(extend(policy, [row[:1] for row in rows], torch.Generator().manual_seed(0)), first)


def test_a_clip_across_the_seam_changes_its_free_frames_alone() -> None:
    """Of ten frames of two clips of six, the two at the seam; and they depend on how long their neighbours are held."""
    policy, rows = toy(frames=6), [[PROMPTS[1], PROMPTS[2]]]

    def drawn(until: float, look_back: int) -> torch.Tensor:
        return extend(policy, rows, torch.Generator().manual_seed(0), Extension(2, until, look_back=look_back))

    plain, back = drawn(0.0, 0), drawn(0.0, 2)
    changed = [bool((plain[:, f] != back[:, f]).any()) for f in range(10)]
    assert changed == [False] * 5 + [True] * 2 + [False] * 3
    assert not torch.equal(back, torch.cat([back[:, :5], drawn(0.6, 2)[:, 5:7], back[:, 7:]], 1))
    plain, back = drawn(0.6, 0), drawn(0.6, 2)
    changed = [bool((plain[:, f] != back[:, f]).any()) for f in range(10)]
    assert changed == [False] * 5 + [True] * 2 + [False] * 3


def test_a_pipeline_draws_a_longer_strip() -> None:
    model = wrap_pipeline(v_clips(), image_size=(tiny.IMAGE_SIZE, tiny.IMAGE_SIZE))
    policy = Policy(model, DDIM(0.0), 2)
    long = extend(policy, [["a red fox", "a blue fox"]], torch.Generator().manual_seed(0), Extension(1, look_back=1))
    assert long.shape == (1, 4, 2 * tiny.FRAMES - 1, 8, 8)
    assert policy.decode(long).shape == (1, 3, 16, 16 * (2 * tiny.FRAMES - 1))
    first = policy.draw(["a red fox"], torch.Generator().manual_seed(0))
    torch.testing.assert_close(long[:, :, : tiny.FRAMES], first, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        (Extension(0), "shared is 0; wanted 1 to 3"),
        (Extension(4, look_back=0), "shared is 4; wanted 1 to 3"),
        (Extension(2, look_back=2), "wanted them to leave a frame free"),
        (Extension(2, step=1.5), "until is 0.2 and step 1.5"),
        (Extension(2, until=-1.0), "until is -1.0"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(how: Extension, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        extend(toy(), [[PROMPTS[0]]], None, how)


def test_what_cannot_be_extended_is_refused() -> None:
    policy = toy()
    with pytest.raises(ValueError, match=r"rows of prompts are \[1, 2\] long"):
        extend(policy, [[PROMPTS[0]], [PROMPTS[0], PROMPTS[1]]])
    with pytest.raises(ValueError, match="rows of prompts are"):
        extend(policy, [])
    with pytest.raises(ValueError, match="draws noise in its moves"):
        extend(policy.with_(kernel=DDIM(1.0)), [[PROMPTS[0]]])
    with pytest.raises(ValueError, match="ToyTextToImage draws single images"):
        extend(policy.with_(model=policy.model.image), [[PROMPTS[0]]])
    walker = Continued(Overlap([0], [], []), AXIS)
    with pytest.raises(ValueError, match="decides how its chain is walked"):
        extend(policy.with_(walker=walker), [[PROMPTS[0]]])
    with pytest.raises(ValueError, match="this walk has 10 moves, and the clip before it had 0"):
        moves_of(policy, torch.randn(1, FRAMES, 2), [PROMPTS[0]], walker=walker)
    with pytest.raises(ValueError, match="step 2"):
        Continued(Overlap([0], [], []), AXIS, step=2)


class Turning:
    """The exact denoiser of drawn clips of one prompt, frames F: a Gaussian of four numbers a clip."""

    schedule = RectifiedFlow()

    def __init__(self, frames: int) -> None:
        angle = TURN * torch.arange(frames)
        basis = SPREAD * torch.stack([angle.cos(), angle.sin()], 1)  # (F, 2)
        self.covariance, self.mean = basis @ basis.T, MODES[0]

    def __call__(self, x: torch.Tensor, t: torch.Tensor, cond: Any) -> Prediction:
        alpha, sigma = (1 - t)[:, None, None], t[:, None, None]
        noisy = alpha**2 * self.covariance + sigma**2 * torch.eye(len(self.covariance))
        gain = alpha * self.covariance @ torch.linalg.inv(noisy)
        return consistent(self.mean + gain @ (x - alpha * self.mean), x, alpha, sigma)


def test_seams_vanish_by_and_by_with_an_exact_model() -> None:
    """Root mean square step at the joins over that elsewhere, of three clips of eight frames with the exact belief.

    Every part makes it smaller, and of clips that know nothing of one another it is several times as large.
    """
    policy = toy("flow", frames=8)
    model = policy.model
    model.denoiser, model.guidance_scale = Turning(8), 1.0
    policy = policy.with_(steps=50, kernel=EulerODE())
    rows = [[PROMPTS[0]] * 3] * 200

    def jump(long: torch.Tensor, joins: list[int]) -> float:
        steps = (long[:, 1:] - long[:, :-1]).square().sum(-1)
        here = torch.zeros(steps.shape[1], dtype=torch.bool)
        here[joins] = True
        return float((steps[:, here].mean() / steps[:, ~here].mean()).sqrt())

    generator = torch.Generator().manual_seed(0)
    found = [jump(torch.cat([policy.draw([row[0] for row in rows], generator) for _ in range(3)], 1), [7, 15])]
    for how in (Extension(2, 2.0, look_back=0), Extension(2, 0.0, look_back=0), Extension(2, 0.0, look_back=3)):
        joins = [5, 8, 11, 14] if how.look_back else [7, 13]
        found.append(jump(extend(policy, rows, torch.Generator().manual_seed(0), how), joins))
    print(found)
    assert found == sorted(found, reverse=True)
    assert found[0] > 3 and found[-1] < 1.2
