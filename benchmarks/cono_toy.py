"""CoNo on clips of eight moving points: long clips against clips that are laid end to end.

python benchmarks/cono_toy.py --seeds 0 1 2

The toy of ``tropism.models.toy_clips`` with 8 frames: points that turn evenly around the mode of their prompt. Long
clips of three, all with one prompt ("same") or each with the next one, whose mode is elsewhere ("change"). In units of
a point's standard deviation:

jump    root mean square of the steps at joins, where frames of two clips meet, divided by that of all other steps
worst   mean over long clips of the largest step in them, wherever it is
turn    mean over long clips of the largest |x_{f+1} - 2 cos(a) x_f + x_{f-1}| about the mode: 0 for even turning
drift   root mean square distance of the mean over the frames of the last clip, about its mode, from that of the first
off     root mean square distance of the last clip's frames from the mode of their prompt: drawn ones have 1.41
"""

from __future__ import annotations

import argparse
import datetime
import math
import platform

import torch
from torch import Tensor

from tropism.long_clips import Extension, extend
from tropism.models.toy import MODES, PROMPTS, SPREAD, ToyTextToImage
from tropism.models.toy_clips import TURN, ToyClips
from tropism.policy import Policy
from tropism.samplers import solver

FRAMES, CLIPS, ROWS, SHARED = 8, 3, 64, 2
WAYS: dict[str, Extension | None] = {
    "independent clips": None,
    "shared noise alone": Extension(SHARED, until=2.0, look_back=0),
    "injection until 0.2": Extension(SHARED, until=0.2, look_back=0),
    "injection until 0": Extension(SHARED, until=0.0, look_back=0),
    "until 0.2, look-back 3": Extension(SHARED, until=0.2, look_back=3),
    "until 0, look-back 3": Extension(SHARED, until=0.0, look_back=3),
    "until 0, look-back 3, pull 0.3": Extension(SHARED, until=0.0, look_back=3, step=0.3),
}


def rms(values: Tensor) -> float:
    """Of vectors (..., 2)."""
    return float(values.square().sum(-1).mean().sqrt())


def joins(how: Extension | None) -> list[int]:
    """Steps (from frame j to the next) at which frames of two clips meet."""
    shared = how.shared if how else 0
    seams = [FRAMES + k * (FRAMES - shared) for k in range(CLIPS - 1)]
    if how is None or not how.look_back:
        return [seam - 1 for seam in seams]
    free = FRAMES - shared - how.look_back
    return [seam - free // 2 + side - 1 for seam in seams for side in (0, free)]


def measured(long: Tensor, rows: Tensor, how: Extension | None) -> dict[str, float]:
    """Of long clips (P, F, 2) whose clips have prompts ``rows`` (P, CLIPS)."""
    new = [FRAMES, *[FRAMES - (how.shared if how else 0)] * (CLIPS - 1)]
    owner = torch.arange(CLIPS).repeat_interleave(torch.tensor(new))  # the clip of every frame
    x = (long - MODES[rows[:, owner]]) / SPREAD
    steps = (long[:, 1:] - long[:, :-1]) / SPREAD
    turns = x[:, 2:] - 2 * math.cos(TURN) * x[:, 1:-1] + x[:, :-2]
    joined = torch.zeros(steps.shape[1], dtype=torch.bool)
    joined[joins(how)] = True
    return {
        "jump": rms(steps[:, joined]) / rms(steps[:, ~joined]),
        "worst": float(steps.norm(dim=-1).max(1).values.mean()),
        "turn": float(turns.norm(dim=-1).max(1).values.mean()),
        "drift": rms(x[:, owner == CLIPS - 1].mean(1) - x[:, owner == 0].mean(1)),
        "off": rms(x[:, owner == CLIPS - 1]),
    }


def drawn(policy: Policy, text: list[list[str]], how: Extension | None, seed: int) -> Tensor:
    """Long clips, or clips end to end that know nothing of one another; the first clip is the same."""
    generator = torch.Generator().manual_seed(seed)
    if how is not None:
        return extend(policy, text, generator, how)
    return torch.cat([policy.draw([row[k] for row in text], generator) for k in range(CLIPS)], 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{datetime.date.today()}, {platform.processor() or platform.machine()}, {vars(args)}", flush=True)
    for seed in args.seeds:
        image = ToyTextToImage.train(2000, seed, "eps")
        model = ToyClips.train(image, 2000, seed, frames=FRAMES)
        policy = Policy(model, solver(model.denoiser), 20, microbatch=1024)
        first = torch.arange(len(PROMPTS)).repeat(ROWS)
        for task, change in (("same", 0), ("change", 1)):
            rows = (first[:, None] + change * torch.arange(CLIPS)) % len(PROMPTS)
            text = [[PROMPTS[each] for each in row] for row in rows.tolist()]
            for name, how in WAYS.items():
                found = measured(drawn(policy, text, how, seed), rows, how)
                cells = "  ".join(f"{key} {value:.2f}" for key, value in found.items())
                print(f"seed {seed}  {task:<7} {name:<31} {cells}", flush=True)


if __name__ == "__main__":
    main()
