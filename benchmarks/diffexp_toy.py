"""DiffExp on the 2-D toy: how many images DDPO needs to find a mode that guidance hides, with and without exploration.

The first prompt's data are 12 % of the time at M, where half of the other prompts' data are, so that guidance pushes
away from M; the reward is exp(-|x - M|^2 / 0.5) on that prompt alone. Explored are the guidance (1 early in the chain),
the weights of the phrases (0.6 to 1.4), or both, for half of the images or for all. Counted are the images until the
reward reaches 0.4, both under the policy that explores (the mean of a batch) and at the default guidance and prompt (of
500 samples that nobody learns from).

    python benchmarks/diffexp_toy.py --seeds 8 --steps 50
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tropism.data.prompts import PromptSet, batches
from tropism.methods.ddpo import Settings
from tropism.models.toy import MODES, PROMPTS, SPREAD, ToyNet, ToyTextToImage
from tropism.policy import Policy
from tropism.samplers import DDIM
from tropism.schedules import add_noise
from tropism.train import NothingToLearn, Step, train

sys.path.insert(0, str(Path(__file__).parent))
from goals import needed, told

PROMPT = PROMPTS[0]
RARE = torch.tensor([-1.5, -1.5])
OWN_SHARE, OTHER_SHARE = 0.12, 0.5
GUIDANCE, MOVES, IMAGES, GOAL = 2.5, 20, 64, 0.4

EARLY = dict(explore_guidance=1.0, explore_until=0.5)
WEIGHTS = dict(explore_weights=(0.6, 1.4))
HALF = dict(explore_probability=0.5)
VARIANTS: dict[str, dict[str, Any]] = {
    "ddpo": {},
    "guidance, half of the images": EARLY | HALF,
    "weights, half of the images": WEIGHTS | HALF,
    "both, half of the images": EARLY | WEIGHTS | HALF,
    "guidance, every image": EARLY,
    "guidance, every image, nearly all along": EARLY | dict(explore_until=0.2),
}


class Rare:
    """Closeness to the mode that guidance hides."""

    name = "rare"
    differentiable = True

    def __call__(self, samples: Tensor, prompts: Sequence[str], **columns: Any) -> Tensor:
        """samples (B, 2) -> (B,) in [0, 1]."""
        return (-(samples - RARE).square().sum(1) / 0.5).exp()


def pretrained(steps: int = 4000, seed: int = 0, rows: int = 256) -> ToyTextToImage:
    """The toy's network and training, on data with the rare mode."""
    generator = torch.Generator().manual_seed(seed)
    net, tokens = ToyNet(generator), nn.Parameter(torch.randn(8, 16, generator=generator))
    toy = ToyTextToImage(net, tokens)
    adam = torch.optim.Adam([*net.parameters(), tokens], lr=2e-3, fused=True)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for _ in range(steps):
        prompt = torch.randint(8, (rows,), generator=generator)
        rare = torch.rand(rows, generator=generator) < torch.where(prompt == 0, OWN_SHARE, OTHER_SHARE)
        x0 = torch.where(rare[:, None], RARE, MODES[prompt]) + SPREAD * torch.randn(rows, 2, generator=generator)
        eps, t = torch.randn(rows, 2, generator=generator), 0.001 + 0.999 * torch.rand(rows, generator=generator)
        keep = torch.rand(rows, generator=generator) >= 0.1
        token = torch.stack([prompt // 2, 5 + prompt % 2], dim=1).where(keep[:, None], torch.tensor([4, 7]))
        said = net(add_noise(toy.schedule, x0, eps, t), toy.schedule.net_time(t), {"prompt_embeds": tokens[token]})
        adam.zero_grad()
        (said - eps).square().mean().backward()
        adam.step()
        fall.step()
    return ToyTextToImage(net.eval(), tokens.detach())


def fresh(toy: ToyTextToImage) -> ToyTextToImage:
    """A copy to train."""
    net = ToyNet(torch.Generator())
    net.load_state_dict(toy.net.state_dict())
    return ToyTextToImage(net, toy.tokens)


def reward_at(toy: ToyTextToImage, guidance: float, count: int = 500) -> float:
    """Mean reward of ancestral samples with this guidance all along."""
    policy = Policy(toy, DDIM(1.0), MOVES, guidance, microbatch=count)
    return float(Rare()(policy.images([PROMPT] * count, torch.Generator().manual_seed(99)), []).mean())


def until_goal(rewards: Sequence[float]) -> float:
    """Images until the goal; infinite when it is not reached."""
    return needed(((IMAGES * number, reward) for number, reward in enumerate(rewards, 1)), GOAL)


def run(toy: ToyTextToImage, seed: int, steps: int, rate: float, options: dict[str, Any]) -> tuple[float, float, float]:
    """Images until the goal, of the policy that explores and of the default one, and the default one's last reward."""
    settings = Settings(
        inference_steps=MOVES,
        guidance_scale=GUIDANCE,
        prompts_per_step=1,
        images_per_prompt=IMAGES,
        learning_rate=rate,
        group_relative=True,
        minibatch=IMAGES * MOVES,
        **options,
    )
    settings.check()
    model, acting, default = fresh(toy), list[float](), list[float]()

    def note(step: Step) -> None:
        acting.append(step.metrics["reward_mean"])
        default.append(reward_at(model, GUIDANCE))

    method = settings.build(model, Rare(), torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=settings.weight_decay)
    work = batches(PromptSet([PROMPT]), 1, IMAGES, seed)
    with contextlib.suppress(NothingToLearn):  # every reward 0 to the last bit: a failure like others
        train(method, work, optimizer, steps=steps, hooks=[note])
    return until_goal(acting), until_goal(default), default[-1] if default else 0.0


def main() -> None:
    """Trains, compares, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8, help="runs of each variant")
    parser.add_argument("--steps", type=int, default=50, help=f"batches of {IMAGES} images a run")
    parser.add_argument("--learning-rate", type=float, default=7e-4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.process_time()
    toy = pretrained()
    print(f"untrained: reward {reward_at(toy, 1.0):.4f} without guidance, {reward_at(toy, GUIDANCE):.4f} at {GUIDANCE}")
    plain: tuple[float, float] | None = None
    for name, variant in VARIANTS.items():
        runs = [run(toy, seed, options.steps, options.learning_rate, variant) for seed in range(options.seeds)]
        acting, default, final = (list(values) for values in zip(*runs, strict=True))
        plain = plain or (statistics.median(acting), statistics.median(default))
        print(f"{name}: images to {GOAL}")
        print(f"    exploring  {told(acting, plain[0], 'ddpo')}")
        print(f"    default    {told(default, plain[1], 'ddpo')}")
        print(f"    at the end {', '.join(f'{value:.2f}' for value in final)}", flush=True)
    print(f"{time.process_time() - started:.0f} CPU seconds")


if __name__ == "__main__":
    main()
