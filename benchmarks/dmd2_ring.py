"""DMD2 on a ring with a perfect teacher: one move, so many updates of the fake score for each of the student's.

python benchmarks/dmd2_ring.py --seeds 0 1 2

Eight modes on a straight path. Student and fake score begin as a flow model that has learnt 2,000 minibatches of 512
draws. Numbers are the sliced W2 distance of 16,384 points to as many exact draws, the spread about the nearest mode
(0.050 in the data), the share of the emptiest mode times eight, and processor seconds of training.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from tropism.data.prompts import PromptSet, batches
from tropism.denoisers import denoising_error
from tropism.methods import dmd2
from tropism.models.ring import Ring
from tropism.policy import Policy
from tropism.schedules import RectifiedFlow
from tropism.train import train

POINTS, ROWS, PRETRAINED = 2**14, 512, 2000


def pretrained(seed: int, updates: int = PRETRAINED) -> Ring:
    """A ring whose network is a flow model of its draws."""
    ring, generator = Ring(RectifiedFlow(), seed=seed), torch.Generator().manual_seed(seed)
    adam = torch.optim.Adam(ring.parameters(), lr=2e-3)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(adam, updates)
    cond = ring.encode(["any"] * ROWS)
    for _ in range(updates):
        x0 = ring.sample(["any"] * ROWS, generator)
        eps, t = torch.randn(x0.shape, generator=generator), torch.rand(ROWS, generator=generator)
        loss = denoising_error(ring.denoiser, x0, eps, t, cond).mean()
        adam.zero_grad()
        torch.autograd.backward(loss)
        adam.step()
        fall.step()
    return ring


def fit(ring: Ring, seed: int, updates: int, **changes: object) -> tuple[Policy, float]:
    """The student after so many updates of 256 rows, and processor seconds."""
    sizes: dict[str, object] = dict(prompts_per_step=1, images_per_prompt=2560, updates=10, minibatch=256)
    rates = dict(sample_batch=2560, learning_rate=1e-3, fake_learning_rate=1e-3, warmup=100, weight_decay=0.0)
    chosen = dmd2.Settings(**sizes | rates | changes)  # type: ignore[arg-type]
    chosen.check()
    method = chosen.build(ring, None, torch.Generator().manual_seed(seed))  # type: ignore[arg-type]
    adam = torch.optim.AdamW(ring.parameters(), lr=chosen.learning_rate, weight_decay=0.0)
    started, text = time.process_time(), batches(PromptSet(["any"]), 1, 2560, seed)
    train(method, text, adam, steps=updates // 10, rate=chosen.rate)
    return method.policy, time.process_time() - started


def drawn(policy: Policy, moves: int) -> Tensor:
    """(POINTS, 2)."""
    many = policy.with_(microbatch=POINTS, steps=moves)
    return many.draw(["any"] * POINTS, x=torch.randn(POINTS, 2, generator=torch.Generator().manual_seed(7)))


def sliced_w2(one: Tensor, other: Tensor) -> float:
    """64 directions."""
    directions = torch.nn.functional.normalize(torch.randn(2, 64, generator=torch.Generator().manual_seed(0)), dim=0)
    gap = (one @ directions).sort(0).values - (other @ directions).sort(0).values
    return float(gap.square().mean(0).sqrt().mean())


def row(points: Tensor, goal: Tensor, ring: Ring) -> str:
    """W2, spread and the emptiest mode."""
    nearest = (points[:, None] - ring.exact.means).square().sum(2).min(1)
    share = torch.bincount(nearest.indices, minlength=8).min() * 8 / len(points)
    return f"{sliced_w2(points, goal):.3f} | {float((nearest.values.mean() / 2).sqrt()):.3f} | {float(share):.2f}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--updates", type=int, default=2000)
    parser.add_argument("--fake-updates", type=int, nargs="+", default=[1, 5])
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(f"{datetime.date.today()}, {platform.processor() or platform.machine()}, 1 thread, torch {torch.__version__}")
    truth = Ring(RectifiedFlow())
    goal, other = (truth.sample(["any"] * POINTS, torch.Generator().manual_seed(seed)) for seed in (8, 9))
    print(f"exact draws against exact draws: {row(other, goal, truth)}")
    print("| seed | student | moves | W2 | spread | emptiest | CPU s |\n|---|---|---|---|---|---|---|")
    for seed in args.seeds:
        start = pretrained(seed)
        for moves in (1, 4, 32):
            policy = dmd2.Settings().student(start, "consistency" if moves == 1 else "ode")
            print(f"| {seed} | the flow model | {moves} | {row(drawn(policy, moves), goal, truth)} | |", flush=True)
        for count in args.fake_updates:
            policy, seconds = fit(pretrained(seed), seed, args.updates, fake_updates=count)
            print(f"| {seed} | 1 : {count} | 1 | {row(drawn(policy, 1), goal, truth)} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
