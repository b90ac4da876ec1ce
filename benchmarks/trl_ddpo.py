"""A whole DDPO iteration (sample, decode, score, train) here and in TRL 0.11.4's DDPOTrainer, turn by turn.

Both sides: the same pipeline, images, sampling steps, guidance, batches, LoRA, optimizer, number of updates and reward.

    python benchmarks/trl_ddpo.py --trl-python ~/trl-venv/bin/python
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import side_by_side
import sides
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


def trl(args: argparse.Namespace) -> sides.Trl:
    """TRL's trainer."""
    from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

    config = DDPOConfig(
        **sides.trl_config(args, LR),
        sample_batch_size=args.batch,
        sample_num_batches_per_epoch=args.images // args.batch,
        train_gradient_accumulation_steps=args.images // args.batch // args.updates,
    )
    pipeline = DefaultDDPOStableDiffusionPipeline(args.pipeline)
    trainer = DDPOTrainer(config, worker.trl_reward, worker.TurningPrompts(args.images), pipeline)
    return sides.Trl(args, trainer, lambda own: (own, "_train_batched_samples", "training"))


class Tropism(sides.Tropism):
    """tropism's DDPO."""

    def __init__(self, args: argparse.Namespace, plain: bool) -> None:
        import torch

        from tropism.methods.ddpo import Settings

        settings = Settings(
            inference_steps=args.steps,
            minibatch=args.batch,
            sample_batch=args.batch,
            updates=args.updates,
            learning_rate=LR,
        )
        groups = torch.arange(args.images) % len(worker.WORDS)
        super().__init__(args, worker.load_model(args, plain), settings, False, groups)

    def places(self) -> Sequence[sides.Place]:
        """The two halves of ``DDPO.rollout``; the rest of the loop is training."""
        from tropism import overlap, train

        return [
            (overlap, "run_chains", "sampling"),
            (overlap, "score_latents", "decoding and reward"),
            (train, "_one_batch", "training"),
        ]


def flops(args: argparse.Namespace, of: dict[str, float], rows: int) -> tuple[float, str]:
    """Every state of a chain is seen once to sample and once to train, by two rows with guidance."""
    per_image = args.steps * rows * (of["forward"] + of["training"]) + of["decode"]
    return per_image, f"{args.steps} steps x {rows} rows x (sampled once, trained once), decoded once"


if __name__ == "__main__":
    given = parse()
    what = f"{given.images} images of {given.steps} steps, guidance {given.guidance:g}, batches of {given.batch}"
    what = f"DDPO: {what}, {given.updates} updates, LoRA of rank {given.rank}"
    sides.compare(given, what, trl, Tropism, flops)
