"""PSO against naive denoising fine-tuning of a few-step model: reward, and the quality that few steps have to lose.

Both sides get the same prompts, samples of a step, optimizer, learning rate and number of optimizer steps. Online the
reward decides: PSO learns from the best and the worst samples of each prompt, the naive side fits the denoiser to the
best, noised to any time, as one fine-tunes a diffusion model (``methods.raft`` refuses consistency models for that).
``--targets``: pictures are at hand; PSO prefers them to what the model draws, the naive side fits the denoiser to them.

On the toy (a consistency model of 4 hops, distilled here from an unguided teacher) quality is the spread within a
prompt, and with targets the sliced W2 to their law. On a pipeline it is sharpness and the share of held-out captions
that the verifier passes.

    python benchmarks/pso_against_naive.py --seeds 3
    python benchmarks/pso_against_naive.py --model FOLDER --reward jpeg_compressibility --steps 30 --prompts scenes
"""

from __future__ import annotations

import argparse
import copy
import datetime
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tropism import catalog
from tropism.base import Cond, Loss, Prompts, Reward, take
from tropism.data.prompts import PromptSet, batches
from tropism.denoisers import denoising_error
from tropism.distillation import Pictures
from tropism.duels import best_and_worst
from tropism.methods import lcm, pso
from tropism.models.toy import MODES, PROMPTS, ToyTextToImage
from tropism.overlap import scored_draw
from tropism.policy import Policy, reward_statistics
from tropism.rewards import pixel_statistics
from tropism.samplers import solver
from tropism.train import train

TANGENT = torch.stack([-MODES[:, 1], MODES[:, 0]], dim=1) / MODES.norm(dim=1, keepdim=True)
CENTRES, TARGET_SPREAD = MODES + 0.6 * TANGENT, 0.15
SHARPNESS = ("high_frequency", "edge_density")


def places(prompts: Sequence[str]) -> Tensor:
    """(B,) which of the toy's prompts each is."""
    return torch.tensor([PROMPTS.index(prompt) for prompt in prompts])


class Beside:
    """Minus the squared distance to 0.6 beside the mode of the prompt."""

    name = "beside"
    differentiable = True

    def __call__(self, samples: Tensor, prompts: Sequence[str], **columns: Any) -> Tensor:
        """samples (B, 2) -> (B,)."""
        return -(samples - CENTRES[places(prompts)]).square().sum(1)


@dataclass(frozen=True)
class Fitted:
    """Samples to fit."""

    x0: Tensor  # (N, ...)
    eps: Tensor  # (N, ...)
    t: Tensor  # (N,)
    cond: Cond  # N rows
    info: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Naive:
    """Denoising regression on the best of the model's own samples, or on targets: each step as many rows as PSO has
    winners."""

    policy: Policy
    reward: Reward
    targets: Pictures | None
    pairs: int
    minibatch: int
    generator: torch.Generator

    def experience(self, batch: Prompts) -> Iterator[Iterator[Fitted]]:
        """One update a batch."""
        info: dict[str, float] = {}
        cond = self.policy.model.encode(batch.text)
        if self.targets is None:
            x0, reward = scored_draw(self.policy, self.reward, batch, self.generator)
            info, rows = reward_statistics(reward, batch.group), best_and_worst(reward, batch.group, self.pairs)[:, 0]
            x0, cond = x0[rows], take(cond, rows)
        else:
            x0 = self.policy.model.latents(self.targets(batch, self.generator))  # type: ignore[attr-defined]
        t = 0.001 + 0.999 * torch.rand(len(x0), generator=self.generator)
        eps = self.policy.noise(len(x0), self.generator)
        parts = torch.arange(len(x0)).split(self.minibatch)
        yield (Fitted(x0[i], eps[i], t[i], take(cond, i), info) for i in parts)

    def loss(self, fitted: Fitted) -> Loss:
        """The denoising error in the network's own target."""
        error = denoising_error(self.policy.denoiser, fitted.x0, fitted.eps, fitted.t, fitted.cond)
        return Loss(error.sum(), torch.tensor(float(len(error))), {})

    def after_step(self) -> None:
        """Nothing moves but the parameters."""


@dataclass(frozen=True)
class World:
    """A few-step model, what it is tuned on, and what is measured of it."""

    fresh: Callable[[int], Any]  # a model of one's own, by seed
    reward: Reward
    prompts: PromptSet
    targets: Pictures
    measure: Callable[[Any], dict[str, float]]
    settings: Mapping[str, Any]  # of PSO; those of sampling hold for both sides


def toy_world(targets: bool) -> World:
    """The 2-D toy in four hops."""
    net = ToyTextToImage.train(2000)
    settings = lcm.Settings(prompts_per_step=8, images_per_prompt=16, guidance_scale=1.0)
    student = settings.build(net, Beside(), torch.Generator().manual_seed(0))
    work = batches(PromptSet(PROMPTS), 8, 16, 0)
    adam = torch.optim.AdamW(net.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    train(student, work, adam, steps=60, rate=settings.rate)

    def fresh(seed: int) -> ToyTextToImage:
        own = ToyTextToImage(copy.deepcopy(net.net).requires_grad_(), net.tokens, net.target)
        return own.few_step("consistency", 4)

    def shown(batch: Prompts, generator: torch.Generator) -> Tensor:
        centres = CENTRES[places(batch.text)]
        return centres + TARGET_SPREAD * torch.randn(centres.shape, generator=generator)

    def measure(model: ToyTextToImage) -> dict[str, float]:
        text = list(PROMPTS) * 256
        points = Policy(model, solver(model.denoiser), 4, microbatch=4096).images(
            text, torch.Generator().manual_seed(1)
        )
        spread = torch.stack([points[i::8].std(0).mean() for i in range(8)]).mean()
        found = {"reward": float(Beside()(points, text).mean()), "spread": float(spread)}
        if targets:
            goal = shown(Prompts(text, torch.arange(len(text)), {}), torch.Generator().manual_seed(2))
            found["W2 to the targets"] = sum(sliced_w2(points[i::8], goal[i::8]) for i in range(8)) / 8
        return found

    beta = {"source": "targets", "beta": 5.0} if targets else {"beta": 1.0, "ratio_range": 0.0, "pairs_per_prompt": 2}
    common = dict(inference_steps=4, learning_rate=3e-4, **beta)
    return World(fresh, Beside(), PromptSet(PROMPTS), shown, measure, common)


def sliced_w2(one: Tensor, other: Tensor) -> float:
    """Between two sets of as many points (N, 2), over 64 directions."""
    angle = torch.arange(64) * (torch.pi / 64)
    directions = torch.stack([angle.cos(), angle.sin()])
    return float(((one @ directions).sort(0).values - (other @ directions).sort(0).values).square().mean().sqrt())


def pipeline_world(options: argparse.Namespace) -> World:
    """A few-step pipeline with a LoRA, measured on held-out captions of scenes."""
    device, dtype = torch.device("cpu"), getattr(torch, options.precision)

    def fresh(seed: int) -> Any:
        model = catalog.load_model(options.model, dtype, device)
        model.add_lora(options.lora_rank, generator=torch.Generator().manual_seed(seed))
        return model

    def judged(name: str) -> Reward:
        return catalog.build_reward(catalog.parse_reward(name), options.model, device)

    reward, verifier = judged(options.reward), judged("scenes_pass")
    prompts = catalog.read_prompt_set(options.prompts)
    held_out = list(catalog.read_prompt_set(options.eval_prompts).text)

    def measure(model: Any) -> dict[str, float]:
        policy = Policy(model, solver(model.denoiser), model.steps)
        images = policy.images(held_out, torch.Generator().manual_seed(2))
        statistics = pixel_statistics(images)
        found = {"reward": reward(images, held_out), **{name: statistics[name] for name in SHARPNESS}}
        found["verified"] = verifier(images, held_out)
        return {name: float(values.nanmean()) for name, values in found.items()}

    targets = catalog.pictures(options.prompts, prompts) if options.targets else lambda *_: torch.empty(0)
    settings: dict[str, Any] = dict(inference_steps=options.moves, learning_rate=options.learning_rate)
    settings |= {"source": "targets"} if options.targets else {"pairs_per_prompt": 2}
    settings |= {} if options.beta is None else {"beta": options.beta}
    return World(fresh, reward, prompts, targets, measure, settings)


def run(world: World, side: str, seed: int, steps: int, targets: bool) -> dict[str, float]:
    """What is measured of the model after ``steps`` optimizer steps."""
    model, generator = world.fresh(seed), torch.Generator().manual_seed(seed)
    settings = pso.Settings(**world.settings)
    settings.check()
    method: Any
    if side == "pso":
        given = {"pictures": world.targets} if targets else {}
        method = settings.build(model, world.reward, generator, **given)
    else:
        policy = settings.policy(model, solver(model.denoiser))
        shown = world.targets if targets else None
        method = Naive(policy, world.reward, shown, settings.pairs_per_prompt, settings.minibatch, generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    work = batches(world.prompts, settings.prompts_per_step, settings.images_per_prompt, seed)
    train(method, work, optimizer, steps=steps, max_norm=settings.max_grad_norm)
    return world.measure(model)


def main() -> None:
    """Trains, compares, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="toy", help="toy, or a few-step pipeline by name or folder")
    parser.add_argument("--targets", action="store_true", help="pictures are at hand, instead of a reward")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of each side")
    parser.add_argument("--threads", type=int, default=1)
    pipeline = parser.add_argument_group("a pipeline")
    pipeline.add_argument("--reward", default="jpeg_compressibility")
    pipeline.add_argument("--prompts", default="scenes")
    pipeline.add_argument("--eval-prompts", default="scenes-held-out:128")
    pipeline.add_argument("--moves", type=int, default=4, help="those that the model was made for")
    pipeline.add_argument("--learning-rate", type=float, default=3e-4)
    pipeline.add_argument("--beta", type=float, help="of PSO; none: its default")
    pipeline.add_argument("--lora-rank", type=int, default=16)
    pipeline.add_argument("--precision", choices=["float32", "bfloat16"], default="bfloat16")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    world = toy_world(options.targets) if options.model == "toy" else pipeline_world(options)
    start = world.measure(world.fresh(0))
    what = "pictures at hand" if options.targets else f"reward {world.reward.name}"
    print(f"{datetime.date.today()}, {platform.processor() or platform.machine()}, {options.threads} thread(s)")
    print(f"{options.model}, {what}, {options.steps} optimizer steps; {', '.join(start)}")
    print(f"before        {told(start)}")
    for side in ("pso", "naive"):
        for seed in range(options.seeds):
            began = time.perf_counter()
            found = run(world, side, seed, options.steps, options.targets)
            print(f"{side:6} seed {seed} {told(found)}  {time.perf_counter() - began:5.1f} s", flush=True)


def told(found: Mapping[str, float]) -> str:
    """One column each."""
    return " ".join(f"{value:9.4f}" for value in found.values())


if __name__ == "__main__":
    main()
