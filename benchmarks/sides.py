"""The two sides of a comparison with TRL: a trainer of TRL's, and a method of tropism's in its loop."""

from __future__ import annotations

import argparse
import contextlib
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import side_by_side
import worker

Place = tuple[Any, str, str]
"""A function as (holder, attribute), and the phase that its seconds belong to."""


class Timed(ABC):
    """What both sides are: a network and an optimizer to count, places to clock."""

    network: Any
    optimizer: Any

    @abstractmethod
    def places(self) -> Sequence[Place]:
        """What has a clock in ``phases``."""

    @contextlib.contextmanager
    def phases(self) -> Iterator[Counter[str]]:
        """Inside, iterations add seconds to phases and counts of what was done."""
        found = Counter[str]()
        hooks = [worker.count_calls(self.network, found), worker.count_updates(self.optimizer, found)]
        with worker.clocked(found, self.places()):
            yield found
        for hook in hooks:
            hook.remove()


def trl_config(args: argparse.Namespace, lr: float) -> dict[str, Any]:
    """What the configurations of TRL's two trainers have in common."""
    return {
        "seed": args.seed,
        "mixed_precision": "bf16" if args.precision == "bf16" else "no",
        "save_freq": 10**9,
        "sample_num_steps": args.steps,
        "sample_guidance_scale": args.guidance,
        "train_batch_size": args.batch,
        "train_learning_rate": lr,
    }


class Trl(Timed):
    """One iteration is the ``step`` of TRL's trainer; ``of_training`` is what it trains with."""

    def __init__(self, args: argparse.Namespace, trainer: Any, of_training: Callable[[Any], Place]) -> None:
        self.trainer, self.images, self.global_step, self._of_training = trainer, args.images, 0, of_training
        self.network, self.optimizer = trainer.sd_pipeline.unet, trainer.optimizer.optimizer

    def iterate(self) -> int:
        """One epoch of TRL's; always number 0, which saves nothing."""
        self.global_step = self.trainer.step(0, self.global_step)
        return self.images

    def places(self) -> Sequence[Place]:
        """TRL's own parts."""
        return [
            (self.trainer, "_generate_samples", "sampling"),
            (self.trainer.sd_pipeline.vae, "decode", "decoding and reward"),
            (self.trainer, "compute_rewards", "decoding and reward"),
            self._of_training(self.trainer),
        ]


class Tropism(Timed):
    """One iteration is one step of ``train``, with redness as the reward."""

    def __init__(self, args: argparse.Namespace, model: Any, settings: Any, differentiable: bool, groups: Any) -> None:
        import torch

        from tropism.base import Prompts
        from tropism.rewards.callables import as_reward

        settings.check()
        reward = as_reward(worker.redness, "redness", differentiable=differentiable)
        self.model, self.network = model, model._network()
        self.method = settings.build(model, reward, torch.Generator().manual_seed(args.seed + 1))
        self.optimizer = worker.optimizer_of(model.parameters(), settings.learning_rate)
        self.batch = Prompts(worker.prompts(args.images), groups, {})
        self.images = args.images

    def iterate(self) -> int:
        """A batch of experience and its updates."""
        from tropism.train import train

        train(self.method, [self.batch], self.optimizer, steps=1)
        return self.images


def compare(
    args: argparse.Namespace,
    what: str,
    trl: Callable[[argparse.Namespace], Trl],
    tropism: Callable[[argparse.Namespace, bool], Tropism],
    flops: Callable[[argparse.Namespace, dict[str, float], int], tuple[float, str]],
) -> None:
    """Drives the comparison, or is one side of it. ``flops``(args, of the network, rows) -> (of an image, of what)."""
    if args.worker is None:
        side_by_side.drive(args, what)
        return
    import torch

    def floor() -> dict[str, Any]:
        per_image, of_what = flops(args, worker.network_flops(args), 1 if args.guidance == 1 else 2)
        rates = worker.rates(args.precision)
        return {"flops_per_image": per_image, "of_what": of_what, "rates": rates, "rate": max(rates.values())}

    torch.set_num_threads(args.threads)
    if args.worker == "trl":
        worker.serve(trl(args), dict)
    else:
        worker.serve(tropism(args, args.worker == "plain"), floor)
