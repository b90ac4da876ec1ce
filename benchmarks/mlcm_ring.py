"""MLCM's ablation on a ring with a perfect guided teacher: LCM, segments (stage 1), segments tied together (stage 2).

python benchmarks/mlcm_ring.py --seeds 0 1 2

16 modes in 4 classes, guidance 2. Numbers are sliced W2 distances, class by class, to 256 Euler moves of the guided
teacher, after as many updates of 256 pairs as the table says.
"""

from __future__ import annotations

import argparse
import datetime
import platform
from collections.abc import Sequence

import torch
from torch import Tensor

from tropism.data.prompts import PromptSet, batches
from tropism.methods import lcm, mlcm
from tropism.methods.distilling import DistillationSettings
from tropism.models.ring import Ring
from tropism.policy import Policy
from tropism.samplers import solver
from tropism.train import train

CLASSES, ROWS, MOVES = 4, 4096, (1, 2, 4, 8)
TEXT = [f"class {label}" for label in range(CLASSES)]


def settings(kind: type[DistillationSettings], **more: object) -> DistillationSettings:
    """256 chains of 64 moves are 64 updates of 256 pairs."""
    sizes = dict(inference_steps=64, prompts_per_step=4, images_per_prompt=64, updates=64, minibatch=256)
    return kind(**sizes, sample_batch=256, distance="l2", **{"learning_rate": 3e-3} | more)  # type: ignore[arg-type]


def fit(ring: Ring, chosen: DistillationSettings, steps: int, seed: int) -> Policy:
    """The student after ``steps`` batches of Adam."""
    chosen.check()
    method = chosen.build(ring, None, torch.Generator().manual_seed(seed))  # type: ignore[attr-defined]
    adam = torch.optim.Adam(ring.parameters(), lr=chosen.learning_rate)
    train(method, batches(PromptSet(TEXT), 4, 64, seed), adam, steps=steps, max_norm=0, rate=chosen.rate)
    return method.policy


def drawn(policy: Policy) -> Tensor:
    """(4 * ROWS, 2), class by class."""
    text = [prompt for prompt in TEXT for _ in range(ROWS)]
    return policy.with_(microbatch=4 * ROWS).images(text, torch.Generator().manual_seed(7))


def sliced_w2(one: Tensor, other: Tensor) -> float:
    """Mean over classes, 64 directions."""
    directions = torch.nn.functional.normalize(torch.randn(2, 64, generator=torch.Generator().manual_seed(0)), dim=0)
    pairs = zip(one.split(ROWS), other.split(ROWS), strict=True)
    gaps = [
        ((a @ directions).sort(0).values - (b @ directions).sort(0).values).square().mean().sqrt() for a, b in pairs
    ]
    return float(torch.stack(gaps).mean())


def row(policy: Policy, goal: Tensor, moves: Sequence[int] = MOVES) -> str:
    """A line of the table."""
    return " | ".join(f"{sliced_w2(drawn(policy.with_(steps=count)), goal):.3f}" for count in moves)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40, help="batches of 64 updates")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{datetime.date.today()}, {platform.processor() or platform.machine()}, 1 thread, torch {torch.__version__}")
    teacher = Ring(modes=16, classes=CLASSES, guidance_scale=2.0)
    with teacher.reference():
        goal = drawn(Policy(teacher, solver(teacher.denoiser), 256))
        other = Policy(teacher, solver(teacher.denoiser), 256).with_(microbatch=4 * ROWS)
        text = [prompt for prompt in TEXT for _ in range(ROWS)]
        print("floor", round(sliced_w2(other.images(text, torch.Generator().manual_seed(8)), goal), 3))
        print(f"| seed | student | {' | '.join(f'{count} moves' for count in MOVES)} |")
        print(f"| --- | --- |{' --- |' * len(MOVES)}")
        print(f"| - | the teacher | {row(Policy(teacher, solver(teacher.denoiser), 1), goal)} |")
    for seed in args.seeds:
        for skip in (1, 4):
            ring = Ring(modes=16, classes=CLASSES, guidance_scale=2.0, seed=seed)
            student = fit(ring, settings(lcm.Settings, skip=skip), args.steps, seed)
            print(f"| {seed} | LCM, skip {skip} | {row(student, goal)} |")
        ring = Ring(modes=16, classes=CLASSES, guidance_scale=2.0, seed=seed)
        print(f"| {seed} | stage 1 | {row(fit(ring, settings(mlcm.Settings), args.steps, seed), goal)} |")
        later = settings(mlcm.Settings, stage=2, learning_rate=1e-3)
        print(f"| {seed} | stage 2 | {row(fit(ring, later, args.steps // 4, seed), goal)} |", flush=True)


if __name__ == "__main__":
    main()
