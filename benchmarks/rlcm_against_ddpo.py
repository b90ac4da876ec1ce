"""RLCM on a consistency model against DDPO on its teacher: network calls and seconds until the same mean reward.

On the 2-D toy (the default) the consistency model is distilled from the guided teacher first, which is not counted.
With ``--model`` and ``--few-step`` two pipelines are compared, by LoRA, on prompts that are held out. Each is
evaluated after every ``--every`` batches with its own moves, from noise that is always the same; that is neither
counted nor timed. The goal is a reward, ``--goal``, or what is added to each run's own beginning, ``--gain``, where
the two models do not begin alike, or else what DDPO has reached at the end of its runs (the median over seeds). A
network call is one row through the network: guidance asks twice, and rows of training count once, whether they go
forward or back.

    python benchmarks/rlcm_against_ddpo.py --seeds 3 --goal -0.1
    python benchmarks/rlcm_against_ddpo.py --model scenes-flow --few-step scenes-lcm --reward scenes --gain 0.02
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tropism import catalog
from tropism.base import Reward, TextToImage
from tropism.data.prompts import PromptSet, batches
from tropism.denoisers import takes_guidance
from tropism.methods import ddpo, rlcm
from tropism.methods.settings import PolicyGradientSettings
from tropism.models.toy import PROMPTS
from tropism.policy import Policy
from tropism.samplers import solver
from tropism.train import Step, train

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from goals import needed, told
from side_by_side import machine

EVALUATED = 128


@dataclass(frozen=True)
class Side:
    """A method, and the model that it begins with in every run."""

    fresh: Callable[[int], TextToImage]  # by seed
    settings: PolicyGradientSettings
    moves: int  # of an evaluation


@dataclass(frozen=True)
class World:
    """What both sides share."""

    sides: Mapping[str, Side]
    reward: Reward
    prompts: PromptSet
    held_out: Sequence[str]


def calls_of(settings: PolicyGradientSettings, model: TextToImage) -> int:
    """Rows through the network in one batch: sampling, then every random move that is trained on."""
    images, moves = settings.prompts_per_step * settings.images_per_prompt, settings.inference_steps
    scale = model.guidance_scale if settings.guidance_scale is None else settings.guidance_scale
    rows = 1 if scale == 1 or takes_guidance(model.denoiser) else 2
    noisy = int((model.grid(moves)[1:-1] >= settings.noise_until).sum())  # the last move has no noise
    return round(images * rows * (moves + noisy * settings.move_fraction * settings.inner_epochs))


def evaluate(model: TextToImage, moves: int, world: World) -> float:
    """Mean reward of the held-out prompts."""
    policy = Policy(model, solver(model.denoiser), moves)
    with torch.no_grad():
        images = policy.images(world.held_out, torch.Generator().manual_seed(1234))
        return float(world.reward(images, world.held_out).mean())


def run(world: World, side: Side, seed: int, steps: int, every: int) -> list[tuple[int, float, float]]:
    """(network calls, seconds, mean reward) after every so many batches, from (0, 0, untrained)."""
    model, settings = side.fresh(seed), side.settings
    settings.check()
    method = settings.build(model, world.reward, torch.Generator().manual_seed(seed))  # type: ignore[attr-defined]
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    work = batches(world.prompts, settings.prompts_per_step, settings.images_per_prompt, seed)
    curve, calls, seconds = [(0, 0.0, evaluate(model, side.moves, world))], calls_of(settings, model), [0.0]

    def note(step: Step) -> None:
        seconds.append(step.seconds)
        if step.step % every == 0:
            curve.append((calls * step.step, sum(seconds), evaluate(model, side.moves, world)))

    train(method, work, optimizer, steps=steps, hooks=[note], max_norm=settings.max_grad_norm)
    return curve


def on_the_toy(hops: int) -> World:
    """The teacher, and the consistency model that it is distilled to."""
    from methods import Off, distilled, toy

    sizes: dict[str, Any] = dict(prompts_per_step=8, images_per_prompt=8)
    sides = {
        "ddpo": Side(lambda _: toy(), ddpo.Settings(**sizes, inference_steps=10, learning_rate=1e-3), 10),
        "rlcm": Side(lambda _: distilled("eps", hops), rlcm.Settings(**sizes, inference_steps=hops), hops),
    }
    text = [prompt for prompt in PROMPTS for _ in range(EVALUATED // len(PROMPTS))]
    return World(sides, Off(), PromptSet(PROMPTS), text)


def on_pipelines(options: argparse.Namespace) -> World:
    """Two pipelines by name or folder, each with a fresh LoRA in every run."""
    cpu, precision = torch.device("cpu"), getattr(torch, options.precision)

    def fresh(name: str) -> Callable[[int], TextToImage]:
        def made(seed: int) -> TextToImage:
            model = catalog.load_model(name, precision, cpu)
            model.add_lora(16, generator=torch.Generator().manual_seed(seed))
            return model

        return made

    both: dict[str, Any] = dict(group_relative=True, clip=options.clip, noise_weighting=options.noise_weighting)
    long = dict(inference_steps=options.moves, learning_rate=options.learning_rate, noise_until=options.noise_until)
    few = dict(inference_steps=options.hops, learning_rate=options.few_learning_rate or options.learning_rate)
    sides = {
        "ddpo": Side(fresh(options.model), ddpo.Settings(**both, **long), options.eval_moves),
        "rlcm": Side(fresh(options.few_step), rlcm.Settings(**both, **few), options.hops),
    }
    reward = catalog.build_reward(catalog.parse_reward(options.reward), options.model, cpu)
    held_out = list(catalog.read_prompt_set(f"{options.prompts}-held-out:{EVALUATED}").text)
    return World(sides, reward, catalog.read_prompt_set(options.prompts), held_out)


def main() -> None:
    """Runs, compares, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40, help="batches of a run")
    parser.add_argument("--every", type=int, default=1, help="batches between evaluations")
    goals = parser.add_mutually_exclusive_group()
    goals.add_argument("--goal", type=float, help="mean reward to be reached")
    goals.add_argument("--gain", type=float, help="what is to be added to the mean reward of the untrained model")
    parser.add_argument("--hops", type=int, default=4, help="of the consistency model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", help="the teacher, such as scenes; none: the toy")
    parser.add_argument("--few-step", help="the consistency model that was made of it")
    parser.add_argument("--reward", default="scenes")
    parser.add_argument("--prompts", default="scenes")
    parser.add_argument("--moves", type=int, default=20, help="of the teacher while training")
    parser.add_argument("--eval-moves", type=int, default=20, help="of the teacher in evaluations")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--few-learning-rate", type=float, help="of RLCM; none: the same")
    parser.add_argument("--noise-until", type=float, default=0.0, help="of DDPO")
    parser.add_argument("--noise-weighting", action="store_true", help="of both")
    parser.add_argument("--clip", type=float, default=1e-3)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="bfloat16")
    options = parser.parse_args()
    if bool(options.model) != bool(options.few_step):
        parser.error("--model and --few-step go together: a teacher and the consistency model that was made of it")
    torch.set_num_threads(options.threads)
    world = on_the_toy(options.hops) if options.model is None else on_pipelines(options)
    curves: dict[str, list[list[tuple[int, float, float]]]] = {name: [] for name in world.sides}
    for seed in range(options.seeds):
        for name, side in world.sides.items():
            curve = run(world, side, seed, options.steps, options.every)
            curves[name].append(curve)
            shown = " ".join(f"{reward:.3g}" for _, _, reward in curve[:: max(1, len(curve) // 8)])
            print(f"seed {seed} {name} ({curve[-1][0]} calls, {curve[-1][1]:.1f} s): {shown}", flush=True)
    goal, added = options.goal, options.gain is not None
    if goal is None:
        goal = options.gain if added else statistics.median(curve[-1][2] for curve in curves["ddpo"])
    until = f"{'a gain of ' if added else ''}{goal:.4g}"
    print(f"\n{datetime.date.today()}, {machine()['processor']}, {options.threads} threads; until {until}:")
    for number, what in enumerate(("network calls", "seconds")):
        plain = None
        for name, runs in curves.items():
            counts = [needed(((row[number], row[2] - added * curve[0][2]) for row in curve), goal) for curve in runs]
            plain = statistics.median(counts) if plain is None else plain
            print(f"{what}, {name}: {told(counts, plain, 'ddpo', number)}")


if __name__ == "__main__":
    main()
