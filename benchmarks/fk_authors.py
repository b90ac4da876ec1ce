"""Feynman-Kac steering here and by its authors' pipeline, turn by turn: images a second, equal calls and rewards.

    git clone https://github.com/zacharyhorvitz/Fk-Diffusion-Steering
    python benchmarks/fk_authors.py --code Fk-Diffusion-Steering/text_to_image/fkd_diffusers

Both sides: scenes-sd in one precision, DDIM with eta 1, the same particles, captions, guidance and moves at which is
resampled, and one reward, CLIP of scenes on float tensors in one batch (the authors' own rewards need weights that are
downloaded; their module of rewards is replaced by this one). Theirs draws one caption's particles a call, which is all
that it can; here all captions are given at once and drawn in micro-batches of ``--batch`` rows.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import platform
import statistics
import sys
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

from tropism.catalog import build_reward, check_model, parse_reward, read_prompt_set
from tropism.evaluate import first_images
from tropism.steer import steer

EVERY = 4
NAMES = ("authors", "tropism")


def arguments() -> argparse.Namespace:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--code", type=Path, required=True, help="the authors' folder with fkd_pipeline_sd.py")
    flags.add_argument("--particles", type=int, default=8)
    flags.add_argument("--captions", type=int, default=8)
    flags.add_argument("--steps", type=int, default=20)
    flags.add_argument("--guidance", type=float, default=3.0)
    flags.add_argument("--scale", type=float, default=0.1, help="of the reward, in both")
    flags.add_argument("--batch", type=int, default=64, help="rows of a micro-batch here")
    flags.add_argument("--rounds", type=int, default=5, help="timed ones, after one that warms up")
    flags.add_argument("--threads", type=int, default=1)
    flags.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    flags.add_argument("--json", type=Path)
    return flags.parse_args()


class Bench:
    """One reward and one pipeline for both sides."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.shown, self.asked = args, 0, 0
        self.dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
        self.clip = build_reward(parse_reward("clip"), "scenes-sd", torch.device("cpu"))
        self.captions = list(first_images(read_prompt_set("scenes-held-out-pair"), args.captions).text)

    @torch.no_grad()
    def reward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(N,) of images (N, 3, H, W) in [0, 1]."""
        self.shown += len(images)
        found: Tensor = self.clip(images.float(), list(prompts))
        return found

    def counted(self, net: torch.nn.Module) -> None:
        """Rows that the network is asked for are added up."""

        def add(_: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
            self.asked += len(args[0] if args else given["sample"])

        net.register_forward_pre_hook(add, with_kwargs=True)

    def authors(self) -> Callable[[int], None]:
        """Their pipeline, by round."""
        module = types.ModuleType("rewards")

        def chosen(_: str, images: Sequence[Tensor], prompts: Sequence[str], **__: Any) -> list[float]:
            return list(self.reward(torch.stack(list(images)), prompts).tolist())

        module.get_reward_function = chosen  # type: ignore[attr-defined]
        sys.modules["rewards"] = module
        sys.path.insert(0, str(self.args.code))
        from fkd_pipeline_sd import FKDStableDiffusion

        pipe = FKDStableDiffusion.from_pretrained(check_model("scenes-sd"), torch_dtype=self.dtype)
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        self.counted(pipe.unet)
        args = self.args
        given = {"potential_type": "diff", "lmbda": args.scale, "num_particles": args.particles, "use_smc": True}
        given |= {"adaptive_resampling": False, "resample_frequency": EVERY, "time_steps": args.steps}
        given |= {"resampling_t_start": EVERY, "resampling_t_end": args.steps - EVERY, "device": torch.device("cpu")}
        given |= {"guidance_reward_fn": "given"}

        def draw(number: int) -> None:
            for place, caption in enumerate(self.captions):
                generator = torch.Generator().manual_seed(1000 * number + place)
                with contextlib.redirect_stdout(io.StringIO()):
                    pipe(
                        [caption] * args.particles,
                        num_inference_steps=args.steps,
                        guidance_scale=args.guidance,
                        eta=1.0,
                        generator=generator,
                        fkd_args=given,
                        output_type="pt",
                    )

        return draw

    def tropism(self) -> Callable[[int], None]:
        """Ours, by round."""
        pipe = StableDiffusionPipeline.from_pretrained(check_model("scenes-sd"), torch_dtype=self.dtype)
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        self.counted(pipe.unet)
        args = self.args
        share = EVERY / args.steps
        drawn = steer(
            pipe,
            self.reward,
            "fk",
            particles=args.particles,
            scale=args.scale,
            every=EVERY,
            window=(share, 1 - share),
            batch_size=args.batch,
        )

        def draw(number: int) -> None:
            drawn(
                self.captions,
                num_inference_steps=args.steps,
                guidance_scale=args.guidance,
                seed=number,
                output_type="pt",
            )

        return draw


def timed(bench: Bench, draw: Callable[[int], None], number: int) -> dict[str, float]:
    """One round of one side."""
    bench.shown = bench.asked = 0
    wall, cpu = time.perf_counter(), time.process_time()
    draw(number)
    seconds, processor = time.perf_counter() - wall, time.process_time() - cpu
    return {"seconds": seconds, "processor": processor, "network": bench.asked, "rewards": bench.shown}


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    bench = Bench(args)
    sides = {"authors": bench.authors(), "tropism": bench.tropism()}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in NAMES}
    for number in range(args.rounds + 1):
        for name in NAMES if number % 2 else reversed(NAMES):
            found = timed(bench, sides[name], number)
            print(number, name, {key: round(value, 2) for key, value in found.items()}, flush=True)
            if number:
                rounds[name].append(found)
    images = args.captions * args.particles
    ratios = {
        key: [old[key] / new[key] for old, new in zip(*(rounds[name] for name in NAMES), strict=True)]
        for key in ("seconds", "processor")
    }
    for name in NAMES:
        middle = statistics.median(found["seconds"] for found in rounds[name])
        print(f"{name:8} {images / middle:7.2f} images/s")
    for key, each in ratios.items():
        print(f"authors / tropism, {key}: {statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})")
    if args.json:
        said = {"rounds": rounds, "ratios": ratios, "args": {name: str(each) for name, each in vars(args).items()}}
        said |= {"date": str(datetime.date.today()), "machine": platform.processor(), "torch": torch.__version__}
        args.json.write_text(json.dumps(said, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
