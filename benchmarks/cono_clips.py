"""CoNo on a clip model of moving scenes: where the object is at the joins of long clips, against clips end to end.

python benchmarks/cono_clips.py

Long clips of two, both with one held-out caption. Of the object's centre, in pixels of 64: the root mean square step at
joins, where frames of two clips meet, and elsewhere; and the share of frames that are accepted as pictures of the
caption. Frames without an object are left out of the steps.
"""

from __future__ import annotations

import argparse
import datetime
import platform

import numpy as np
import torch
from torch import Tensor

from tropism.catalog import check_model
from tropism.long_clips import Extension, extend
from tropism.models.pipelines import load_pipeline
from tropism.policy import Policy
from tropism.samplers import solver
from tropism.worlds.moving import captions, frames_of, parse
from tropism.worlds.moving.verify import centres
from tropism.worlds.scenes.verify import judge, look

WAYS: dict[str, Extension | None] = {
    "independent clips": None,
    "shared noise alone": Extension(1, until=2.0, look_back=0),
    "injection until 0": Extension(1, until=0.0, look_back=0),
    "until 0, look-back 1": Extension(1, until=0.0, look_back=1),
}


def joins(how: Extension | None, frames: int) -> list[int]:
    """Steps of a long clip of two at which frames of two clips meet."""
    if how is None or not how.look_back:
        return [frames - 1]
    free = frames - how.shared - how.look_back
    return [frames - free // 2 - 1, frames - free // 2 + free - 1]


def measured(strips: Tensor, texts: list[str], joined: list[int]) -> tuple[float, float, float]:
    """(step at joins, elsewhere, frames accepted) of film strips (P, 3, H, F * H)."""
    at, elsewhere, right = [], [], []
    for strip, text in zip(strips.float().numpy(), texts, strict=True):
        clip = parse(text)
        seen = [look(frame) for frame in frames_of(strip)]
        steps = np.linalg.norm(np.diff(centres(seen, clip), axis=0), axis=1)
        at += [step for place, step in enumerate(steps) if place in joined]
        elsewhere += [step for place, step in enumerate(steps) if place not in joined]
        right += [judge(each, clip.scene).passed for each in seen]
    return *(float(np.sqrt(np.nanmean(np.square(found)))) for found in (at, elsewhere)), float(np.mean(right))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="scenes-clips", help="a model of the package, or folder of a pipeline")
    parser.add_argument("--captions", type=int, default=12)
    parser.add_argument("--moves", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{datetime.date.today()}, {platform.processor() or platform.machine()}, {vars(args)}", flush=True)
    model = load_pipeline(check_model(args.model), dtype=torch.bfloat16)
    policy, texts = Policy(model, solver(model.denoiser), args.moves), captions(args.captions, 3, "held_out")
    for name, how in WAYS.items():
        generator = torch.Generator().manual_seed(args.seed)
        if how is None:
            long = torch.cat([policy.draw(texts, generator) for _ in range(2)], 2)
        else:
            long = extend(policy, [[text] * 2 for text in texts], generator, how)
        at, elsewhere, right = measured(policy.decode(long), texts, joins(how, model.frames))
        print(f"{name:<22} joins {at:.1f}  elsewhere {elsewhere:.1f}  frames accepted {right:.3f}", flush=True)


if __name__ == "__main__":
    main()
