"""Scoring while the next images are sampled changes when things happen, and not one bit of what comes out."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from methods import Off, batch, toy
from reward_servers import number, numbered, passing, remote, texts, web
from torch import Tensor

from tropism.methods import ddpo, raft
from tropism.overlap import Scoring
from tropism.policy import Policy
from tropism.rewards import RewardError, Weighted
from tropism.rewards.cache import Cached
from tropism.samplers import DDIM
from tropism.train import train


class Elsewhere(Off):
    """The toy's reward, as if another machine computed it."""

    differentiable = False

    def __init__(self, concurrent: bool = True, wait: float = 0.0) -> None:
        self.concurrent, self.wait, self.calls, self.threads = concurrent, wait, list[int](), set[str]()

    def __call__(self, samples: Tensor, prompts: Sequence[str], **columns: Any) -> Tensor:
        assert not torch.is_grad_enabled()
        self.calls.append(len(prompts))
        self.threads.add(threading.current_thread().name)
        time.sleep(self.wait)
        return super().__call__(samples, prompts, **columns)


SETTINGS = {
    "ddpo": ddpo.Settings(inference_steps=6, learning_rate=1e-3, sample_batch=10),
    "raft": raft.Settings(inference_steps=6, learning_rate=1e-3, sample_batch=10),
}


def trained(name: str, reward: Elsewhere) -> list[Tensor]:
    """Parameters after two batches of 32 images."""
    model = toy()
    method = SETTINGS[name].build(model, reward, torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(method, [batch(4, 0), batch(4, 1)], optimizer, steps=2)
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("name", SETTINGS)
def test_training_is_bit_equal_with_a_thread_without_and_in_one_call(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewards = [Elsewhere(concurrent=False), Elsewhere(), Elsewhere(wait=0.002)]
    found = [trained(name, reward) for reward in rewards]
    plain = Scoring.__init__
    monkeypatch.setattr(Scoring, "__init__", lambda self, *given: plain(self, *given, threaded=False))
    rewards.append(Elsewhere())
    found.append(trained(name, rewards[-1]))
    assert [reward.calls for reward in rewards] == [[32, 32], *[[10, 10, 10, 2] * 2] * 3]
    assert [reward.threads for reward in rewards[::3]] == [{"MainThread"}] * 2
    assert all(thread.startswith("reward") for reward in rewards[1:3] for thread in reward.threads)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def policy(decoded: list[int]) -> Policy:
    """Two chains at a time; remembers how many were decoded."""
    made = Policy(toy(), DDIM(1.0), 4, microbatch=2)
    made.model.decode = lambda latents: decoded.append(len(latents)) or latents  # type: ignore[func-returns-value]
    return made


def test_the_reward_runs_while_the_next_images_are_sampled() -> None:
    """The first call does not return before the second micro-batch is there; one after another it never would be."""
    decoded, met = list[int](), list[bool]()

    class Waiting(Elsewhere):
        def __call__(self, samples: Tensor, prompts: Sequence[str], **columns: Any) -> Tensor:
            if not self.calls:
                end = time.monotonic() + 10
                while len(decoded) < 2 and time.monotonic() < end:
                    time.sleep(0.001)
                met.append(len(decoded) >= 2)
            return super().__call__(samples, prompts, **columns)

    prompts, own = batch(1), policy(decoded)
    with Scoring(own, Waiting(), prompts) as scores:
        latents = own.draw(prompts.text, torch.Generator().manual_seed(0), finished=scores.begin)
        found = scores.of(latents)
    assert met == [True]
    assert torch.equal(found, Off()(latents, prompts.text))


def test_what_the_reward_raises_ends_the_sampling() -> None:
    decoded = list[int]()

    class Broken(Elsewhere):
        def __call__(self, samples: Tensor, prompts: Sequence[str], **columns: Any) -> Tensor:
            raise RewardError("the server is gone")

    prompts, own = batch(4), policy(decoded)
    with pytest.raises(RewardError, match="the server is gone"), Scoring(own, Broken(), prompts) as scores:
        own.draw(prompts.text, torch.Generator(), finished=lambda *given: (scores.begin(*given), time.sleep(0.01)))
    assert len(decoded) < 8, "of 16 micro-batches"
    with pytest.raises(RewardError, match="the server is gone"), Scoring(own, Broken(), batch(1)) as scores:
        scores.of(own.draw(batch(1).text, torch.Generator(), finished=scores.begin))


def test_who_may_run_elsewhere() -> None:
    away, here = remote(passing(web())), Off()
    assert away.concurrent and Cached(away, "v1").concurrent
    assert Weighted([(away, 1.0), (here, 0.5)]).concurrent
    assert not Weighted([(away, 1.0), (here, 0.5)], normalise=True).concurrent, "its scale is that of the whole batch"
    assert not Weighted([(here, 1.0)]).concurrent and not Cached(here, "v1").concurrent


def test_columns_and_pictures_arrive_with_their_rows() -> None:
    prompts = batch(1)
    images = numbered(len(prompts.text))

    reward = remote(passing(web(lambda images, prompts, n: number(images) + torch.tensor([float(x) for x in n]))))
    marked = type(prompts)(texts(8), prompts.group, {"n": [100 * row for row in range(8)]})
    with Scoring(policy([]), reward, marked) as scores:
        for rows in torch.arange(8).split(3):
            scores.begin(rows, images[rows])
        assert scores.of(images).tolist() == [101 * row for row in range(8)]
