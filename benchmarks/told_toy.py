"""Students that are told the guidance, on the conditional 2-D toy: do they follow their teacher from scale to scale?

    python benchmarks/told_toy.py scales --seeds 3
    python benchmarks/told_toy.py features --seeds 3

Numbers are sliced W2 distances (64 directions, 64 points of each of the eight prompts, from the same noise), the mean
over prompts, between a student at a scale and its guided teacher at that scale in 20 moves. ``scales``: LCM told the
scales 1 to 5, against LCM made for one of them. ``features``: SoundCTM told them, comparing by the teacher's features
(its hidden layers) and by the mean square of the states, after as many updates.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tropism.data.prompts import PromptSet, batches
from tropism.methods import lcm, sound_ctm
from tropism.models.toy import PROMPTS, ToyTextToImage
from tropism.policy import Policy
from tropism.samplers import solver
from tropism.train import train

sys.path.insert(0, str(Path(__file__).parent))
from side_by_side import machine

SCALES, RANGE, ROWS = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0), (1.0, 5.0), 64
SIZES: dict[str, Any] = dict(prompts_per_step=8, images_per_prompt=8)
HIDDEN = ["layers.0", "layers.1", "layers.2"]
BOTH = dict(told=RANGE, solver="first-order", target_decay=0.95, denoiser_weight=0.1)
STUDENTS: dict[str, dict[str, Any]] = {
    "scales": {
        "told 1 to 5": lcm.Settings(**SIZES, told=RANGE),
        "made for 2": lcm.Settings(**SIZES, guidance_scale=2.0),
        "made for 4": lcm.Settings(**SIZES, guidance_scale=4.0),
    },
    "features": {
        "features": sound_ctm.Settings(**SIZES, **BOTH, feature_blocks=HIDDEN),
        "states": sound_ctm.Settings(**SIZES, **BOTH, compared="states", distance="l2"),
    },
}
MOVES = {"scales": (1, 2), "features": (1, 2, 8)}


def own(made: ToyTextToImage) -> ToyTextToImage:
    """A toy of one's own that begins as ``made``."""
    other = ToyTextToImage.train(0, target=made.target)
    other.net.load_state_dict(made.net.state_dict())
    return ToyTextToImage(other.net, made.tokens, made.target)


def fit(toy: ToyTextToImage, settings: Any, steps: int, seed: int) -> Policy:
    """The student after so many batches of 20 updates."""
    settings.check()
    method = settings.build(toy, None, torch.Generator().manual_seed(seed))
    adam = torch.optim.AdamW(toy.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    train(method, batches(PromptSet(PROMPTS), 8, 8, seed), adam, steps=steps, max_norm=1.0, rate=settings.rate)
    return method.policy


def drawn(policy: Policy) -> Tensor:
    """(8 * ROWS, 2), prompt by prompt in turn."""
    return policy.with_(microbatch=1024).images(list(PROMPTS) * ROWS, torch.Generator().manual_seed(1))


def apart(one: Tensor, other: Tensor) -> float:
    """Mean over prompts of the sliced W2 distance."""
    lines = torch.nn.functional.normalize(torch.randn(2, 64, generator=torch.Generator().manual_seed(0)), dim=0)
    sorts = [(each @ lines).reshape(ROWS, len(PROMPTS), -1).sort(0).values for each in (one, other)]
    return float((sorts[0] - sorts[1]).square().mean((0, 2)).sqrt().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", choices=list(STUDENTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40, help="batches of 20 updates")
    parser.add_argument("--target", choices=["flow", "eps"], default="flow", help="what the teacher's network says")
    options = parser.parse_args()
    torch.set_num_threads(1)
    made = ToyTextToImage.train(2000, target=options.target)
    with made.reference():
        goals = {w: drawn(Policy(made, solver(made.denoiser), 20, w)) for w in SCALES}
    print(f"| student | seed | moves |{''.join(f' w = {w:g} |' for w in SCALES)} CPU s |")
    print(f"|---|---|---|{'---|' * len(SCALES)}---|")
    for w in (2.0, 4.0):
        row = "".join(f" {apart(goals[w], goals[each]):.3f} |" for each in SCALES)
        print(f"| the teacher at {w:g} | | 20 |{row} |")
    for name, settings in STUDENTS[options.world].items():
        for seed in range(options.seeds):
            started = time.process_time()
            policy = fit(own(made), settings, options.steps, seed)
            took = time.process_time() - started
            for moves in MOVES[options.world]:
                asked = {w: policy.with_(steps=moves, guidance=w if settings.told else None) for w in SCALES}
                row = "".join(f" {apart(drawn(asked[w]), goals[w]):.3f} |" for w in SCALES)
                print(f"| {name} | {seed} | {moves} |{row} {took:.0f} |", flush=True)
    print(f"{time.strftime('%Y-%m-%d')}, {machine()}")


if __name__ == "__main__":
    main()
