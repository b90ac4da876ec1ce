"""A whole DDPO iteration (sample, decode, score, train) here and in TRL 0.11.4's DDPOTrainer, turn by turn.

Both sides: the same pipeline, images, sampling steps, guidance, batches, LoRA, optimizer, number of updates and reward.

    python benchmarks/trl_ddpo.py --trl-python ~/trl-venv/bin/python
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import side_by_side
import worker

LR = 3e-4


def parse() -> argparse.Namespace:
    flags = side_by_side.parser(__doc__)
    flags.add_argument("--images", type=int, default=64, help="of one iteration")
    flags.add_argument("--batch", type=int, default=32, help="images sampled at once, and cells of one backward pass")
    flags.add_argument("--updates", type=int, default=2, help="optimizer steps of one iteration")
    args = flags.parse_args()
    if args.images % (args.batch * args.updates):
        flags.error("--images must be a multiple of --batch times --updates")
    return args


class Trl:
    """TRL's trainer; one iteration is its ``step``."""

    def __init__(self, args: argparse.Namespace) -> None:
        from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

        config = DDPOConfig(
            seed=args.seed,
            mixed_precision="bf16" if args.precision == "bf16" else "no",
            save_freq=10**9,
            sample_num_steps=args.steps,
            sample_guidance_scale=args.guidance,
            sample_batch_size=args.batch,
            sample_num_batches_per_epoch=args.images // args.batch,
            train_batch_size=args.batch,
            train_gradient_accumulation_steps=args.images // args.batch // args.updates,
            train_learning_rate=LR,
        )
        pipeline = DefaultDDPOStableDiffusionPipeline(args.pipeline)
        self.trainer = DDPOTrainer(config, worker.trl_reward, worker.TurningPrompts(args.images), pipeline)
        self.images, self.global_step = args.images, 0

    def iterate(self) -> int:
        """One epoch of TRL's; always number 0, which saves nothing."""
        self.global_step = self.trainer.step(0, self.global_step)
        return self.images

    @contextlib.contextmanager
    def phases(self) -> Iterator[Counter[str]]:
        """Clocks around TRL's own three parts."""
        trainer, found = self.trainer, Counter[str]()
        hooks = [
            worker.count_calls(trainer.sd_pipeline.unet, found),
            worker.count_updates(trainer.optimizer.optimizer, found),
        ]
        places = [
            (trainer, "_generate_samples", "sampling"),
            (trainer.sd_pipeline.vae, "decode", "decoding and reward"),
            (trainer, "compute_rewards", "decoding and reward"),
            (trainer, "_train_batched_samples", "training"),
        ]
        with worker.clocked(found, places):
            yield found
        for hook in hooks:
            hook.remove()


class Tropism:
    """tropism's DDPO in its loop; one iteration is one step of ``train``."""

    def __init__(self, args: argparse.Namespace, plain: bool) -> None:
        import torch
        from accelerate import Accelerator

        from tropism.base import Prompts
        from tropism.methods.ddpo import Settings
        from tropism.rewards.callables import as_reward

        self.model = worker.load_model(args, plain)
        settings = Settings(
            inference_steps=args.steps,
            minibatch=args.batch,
            sample_batch=args.batch,
            updates=args.updates,
            learning_rate=LR,
        )
        settings.check()
        reward = as_reward(worker.redness, "redness")
        self.method = settings.build(self.model, reward, torch.Generator().manual_seed(args.seed + 1))
        self.optimizer = worker.optimizer_of(self.model.parameters(), LR)
        self.batch = Prompts(worker.prompts(args.images), torch.arange(args.images) % len(worker.WORDS), {})
        self.accelerator, self.images = Accelerator(cpu=True), args.images

    def iterate(self) -> int:
        """One batch of experience and its updates."""
        from tropism.train import train

        train(self.method, [self.batch], self.optimizer, steps=1, accelerator=self.accelerator)
        return self.images

    @contextlib.contextmanager
    def phases(self) -> Iterator[Counter[str]]:
        """Clocks around the functions that ``DDPO.rollout`` calls; the rest of the loop is training."""
        from tropism import train
        from tropism.methods import ddpo

        found = Counter[str]()
        hooks = [
            worker.count_calls(self.model._network(), found),
            worker.count_updates(self.optimizer, found),
        ]
        places = [
            (ddpo, "run_chains", "sampling"),
            (ddpo, "score_latents", "decoding and reward"),
            (train, "_one_batch", "training"),
        ]
        with worker.clocked(found, places):
            yield found
        for hook in hooks:
            hook.remove()

    def floor(self, args: argparse.Namespace) -> dict[str, Any]:
        """Every state of a chain is seen once to sample and once to train, by two rows with guidance."""
        flops, rows = worker.network_flops(args), 1 if args.guidance == 1 else 2
        rates = worker.rates(args.precision)
        return {
            "flops_per_image": args.steps * rows * (flops["forward"] + flops["training"]) + flops["decode"],
            "of_what": f"{args.steps} steps x {rows} rows x (sampled once, trained once), decoded once",
            "rates": rates,
            "rate": max(rates.values()),
        }


def main() -> None:
    args = parse()
    if args.worker is None:
        what = f"{args.images} images of {args.steps} steps, guidance {args.guidance:g}, batches of {args.batch}"
        side_by_side.drive(args, f"DDPO: {what}, {args.updates} updates, LoRA of rank {args.rank}")
        return
    import torch

    torch.set_num_threads(args.threads)
    if args.worker == "trl":
        worker.serve(Trl(args), dict)
    else:
        side = Tropism(args, plain=args.worker == "plain")
        worker.serve(side, lambda: side.floor(args))


if __name__ == "__main__":
    main()
