"""Control of the first noise: DITTO-2's one-move surrogate against DITTO through a whole chain, at equal updates.

Held-out captions from the same noises. ``student`` is a few-step model that is drawn with in four moves; the gradient
goes through one of them (surrogate 1) or through all four (surrogate 0). ``teacher`` is the guided pipeline, the
gradient through all its moves. Gains are paired with the same model's own chain from the same noise, without chance in
its hops, as DITTO draws. The reward that is followed is the small CLIP's score, or the redness of the picture; the
verifier and the other reward are held out.

    python benchmarks/ditto.py --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from guiding import captions, head, load, row, said, scores, told
from torch import Tensor

from tropism import catalog, pictures
from tropism.base import Prompts
from tropism.evaluate import deterministic
from tropism.samplers import noise_until
from tropism.steering import image_seeds, steer_policy
from tropism.steering.ditto import Settings

REWARDS = ("clip", "redness", "scenes_pass")
WAYS = ("scenes-lcm:4", "scenes-lcm:4:1", "scenes-lcm:4:0", "scenes-dmd:4", "scenes-dmd:4:1", "scenes-flow:10",
        "scenes-flow:10:0")  # fmt: skip


def drawn(
    policy: Any, text: list[str], reward: Any, surrogate: int | None, options: Any, seed: int
) -> tuple[Tensor, Any]:
    """Images, and the trace."""
    quiet = policy.with_(kernel=noise_until(policy.kernel, 1.0))
    by = [] if surrogate is None else [Settings(options.updates, options.step_size, surrogate)]
    found, trace = steer_policy(quiet, reward, Prompts(text, torch.arange(len(text)), {}), by,
                                image_seeds(len(text), seed))  # fmt: skip
    with torch.no_grad():
        return quiet.decode(found.latents).float(), trace


def main() -> None:
    """Draws, scores, prints."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--ways", nargs="+", default=list(WAYS), help="MODEL:MOVES[:SURROGATE]")
    flags.add_argument("--follow", nargs="+", default=["clip", "redness"])
    flags.add_argument("--captions", default="scenes-held-out:16")
    flags.add_argument("--updates", type=int, default=10)
    flags.add_argument("--step-size", type=float, default=0.1)
    flags.add_argument("--seeds", type=int, nargs="+", default=[0])
    flags.add_argument("--pictures-file", type=Path, help="where the first pictures of the first seed go, as a grid")
    options = flags.parse_args()
    text, models, sheet = captions(options.captions), dict[str, Any](), list[Tensor]()
    head("followed", "way", "calls", "scored", "CPU s", *(each for name in REWARDS for each in (name, "gain")))
    for follow in options.follow:
        base: dict[str, dict[str, Tensor]] = {}
        for way in options.ways:
            name, moves, *surrogate = way.split(":")
            models.setdefault(name, load(name))
            reward = catalog.build_reward(catalog.parse_reward(follow), name, torch.device("cpu"))
            policy = deterministic(models[name], int(moves), microbatch=16)
            images, traces, started = [], [], time.process_time()
            for seed in options.seeds:
                one, trace = drawn(policy, text, reward, int(surrogate[0]) if surrogate else None, options, seed)
                images.append(one)
                traces.append(trace)
            seconds = (time.process_time() - started) / (len(text) * len(options.seeds))
            whole, sheet = torch.cat(images), [*sheet, images[0][:12]]
            values = {each: scores(each, whole, text * len(options.seeds), name) for each in REWARDS}
            against = base.setdefault(name, values)
            cells = [cell for each in REWARDS for cell in (said(values[each]), told(against[each], values[each]))]
            row(follow, way, f"{traces[0].calls:.0f}", f"{traces[0].scored:.0f}", f"{seconds:.2f}", *cells)
    if options.pictures_file:
        tiles = torch.cat(sheet)
        pictures.save(pictures.grid(tiles, [""] * len(tiles), columns=12), options.pictures_file)


if __name__ == "__main__":
    main()
