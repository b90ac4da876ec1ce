"""AnimateLCM's decoupling on clips of four moving points: joint against decoupled distillation at equal updates.

python benchmarks/animate_toy.py --seeds 0 1 2

The teacher is the image toy with mixers of frames that were trained on drawn clips. "joint" trains its image weights
and its mixers together by LCM on clips; "decoupled" spends a share of the same number of updates on LCM of the image
toy alone, then trains mixers beside it (animate-lcm), with the whole of it in the target at once or entering by the
average; "image only" stops after the first. Sliced W2 is of single frames to the image toy's guided samples in 20
moves, the motion error is the root mean square of ``motion_error`` (0 for drawn clips, 4.6 for frames apart).
"another image adapter" puts one that was distilled from another seed beside the mixers of "decoupled".
"""

from __future__ import annotations

import argparse
import copy
import datetime
import platform
from typing import Any

import torch
from torch import Tensor

from tropism.data.prompts import PromptSet, batches
from tropism.methods import animate_lcm, lcm
from tropism.models.toy import PROMPTS, ToyTextToImage
from tropism.models.toy_clips import FRAMES, ToyClips, motion_error
from tropism.policy import Policy
from tropism.samplers import solver
from tropism.train import train

ROWS, MOVES = 128, (1, 2, 4)
SIZES: dict[str, Any] = dict(prompts_per_step=8, images_per_prompt=8)


def fit(model: Any, settings: Any, steps: int, seed: int) -> Policy:
    """The student after ``steps`` batches (20 updates of 64 pairs each) of AdamW."""
    settings.check()
    method = settings.build(model, None, torch.Generator().manual_seed(seed))
    adam = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    train(method, batches(PromptSet(PROMPTS), 8, 8, seed), adam, steps=steps, max_norm=1.0, rate=settings.rate)
    return method.policy  # type: ignore[no-any-return]


def image_toy(trained: ToyTextToImage) -> ToyTextToImage:
    """A copy of one's own."""
    return ToyTextToImage(copy.deepcopy(trained.net).requires_grad_(), trained.tokens, trained.target)


def clip_toy(teacher: ToyClips) -> ToyClips:
    """The same."""
    return ToyClips(teacher.image, copy.deepcopy(teacher.mixers).requires_grad_())


def sliced_w2(one: Tensor, other: Tensor) -> float:
    """Mean over prompts of (N, 2) in turn, 64 directions."""
    directions = torch.nn.functional.normalize(torch.randn(2, 64, generator=torch.Generator().manual_seed(0)), dim=0)
    gaps = []
    for i in range(len(PROMPTS)):
        a, b = (points[i :: len(PROMPTS)] @ directions for points in (one, other))
        gaps.append((a.sort(0).values - b.sort(0).values).square().mean().sqrt())
    return float(torch.stack(gaps).mean())


def measured(policy: Policy, goal: Tensor, moves: int) -> tuple[float, float]:
    """(sliced W2 of single frames, the mean over the four; motion error)."""
    text = list(PROMPTS) * ROWS
    drawn = policy.with_(steps=moves, microbatch=1024).draw(text, torch.Generator().manual_seed(1))
    number = torch.arange(len(PROMPTS)).repeat(ROWS)
    frames = sum(sliced_w2(drawn[:, f], goal) for f in range(FRAMES)) / FRAMES
    return frames, float(motion_error(drawn, number).square().mean().sqrt())


def compare(seed: int, steps: int, share: float) -> dict[str, tuple[Policy, Tensor]]:
    """Every student of a seed, with the image teacher's samples."""
    image = ToyTextToImage.train(2000, seed, "eps")
    teacher, goal_of = ToyClips.train(image, 2000, seed), Policy(image, solver(image.denoiser), 20, microbatch=1024)
    goal = goal_of.draw(list(PROMPTS) * ROWS, torch.Generator().manual_seed(2))
    first = round(share * steps)
    distilled, other = image_toy(image), image_toy(image)
    fit(distilled, lcm.Settings(**SIZES), first, seed)
    fit(other, lcm.Settings(**SIZES), first, seed + 100)
    found = {}

    joint = clip_toy(teacher)
    joint.train_both()
    found["joint"] = fit(joint, lcm.Settings(**SIZES), steps, seed)
    alone = clip_toy(teacher)
    alone.train_motion(distilled.net)
    found["image only"] = Policy(alone.few_step("consistency", 4), found["joint"].kernel, 4)
    for name, late in (("decoupled", True), ("decoupled, LoRA in the target at once", False)):
        model = clip_toy(teacher)
        model.train_motion(distilled.net)
        settings = animate_lcm.Settings(**SIZES, spatial="stage-1", late_spatial=late)
        found[name] = fit(model, settings, steps - first, seed)
        if late:
            swapped = clip_toy(model)
            swapped.train_motion(other.net)
            found["decoupled, another image adapter"] = Policy(
                swapped.few_step("consistency", 4), found["joint"].kernel, 4
            )
    guided = Policy(teacher, solver(teacher.denoiser), 20)
    return {name: (policy, goal) for name, policy in {"teacher, as many moves": guided, **found}.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60, help="batches in all, 20 updates each")
    parser.add_argument("--share", type=float, default=0.5, help="of the batches of decoupled that go to the image toy")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{datetime.date.today()}, {platform.processor() or platform.machine()}, {vars(args)}", flush=True)
    for seed in args.seeds:
        for name, (policy, goal) in compare(seed, args.steps, args.share).items():
            cells = [measured(policy, goal, moves) for moves in (*MOVES, *((20,) if "teacher" in name else ()))]
            row = "  ".join(f"{w2:.3f} {motion:.2f}" for w2, motion in cells)
            print(f"seed {seed}  {name:<40}  {row}", flush=True)


if __name__ == "__main__":
    main()
