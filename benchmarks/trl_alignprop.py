"""A whole AlignProp iteration (sample with a graph, score, backpropagate) here and in TRL 0.11.4's AlignPropTrainer.

Both sides: the same pipeline, images, sampling steps, guidance, batches, LoRA, optimizer and reward, and the gradient
through the same last steps of the chain. TRL recomputes every call of the network in its backward pass and has no flag
against it; here ``enable_gradient_checkpointing`` recomputes its blocks.

    python benchmarks/trl_alignprop.py --trl-python ~/trl-venv/bin/python
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

LR = 1e-3


def parse() -> argparse.Namespace:
    flags = side_by_side.parser(__doc__)
    flags.add_argument("--images", type=int, default=32, help="of one iteration, which is one optimizer step")
    flags.add_argument("--batch", type=int, default=16, help="images of one backward pass")
    flags.add_argument("--window", type=int, default=10, help="last sampling steps that carry the gradient")
    flags.add_argument("--keep", action="store_true", help="tropism keeps the whole graph: faster, and more memory")
    args = flags.parse_args()
    if args.images % args.batch or not 1 <= args.window <= args.steps:
        flags.error("--images must be a multiple of --batch, and --window at most --steps")
    return args


def trl(args: argparse.Namespace) -> sides.Trl:
    """TRL's trainer. Its random truncation is off, so that both sides do equal work."""
    from trl import AlignPropConfig, AlignPropTrainer, DefaultDDPOStableDiffusionPipeline

    config = AlignPropConfig(
        **sides.trl_config(args, LR),
        train_gradient_accumulation_steps=args.images // args.batch,
        truncated_backprop_rand=False,
        truncated_backprop_timestep=args.steps - args.window,
    )
    pipeline = DefaultDDPOStableDiffusionPipeline(args.pipeline)
    trainer = AlignPropTrainer(config, worker.trl_reward, worker.TurningPrompts(args.images), pipeline)
    return sides.Trl(args, trainer, lambda own: (own.accelerator, "backward", "backward"))


class Tropism(sides.Tropism):
    """tropism's AlignProp (with a fixed window, DRaFT-K)."""

    def __init__(self, args: argparse.Namespace, plain: bool) -> None:
        import torch

        from tropism.methods.draft import Settings

        model = worker.load_model(args, plain)
        if not args.keep:
            model.enable_gradient_checkpointing()
        settings = Settings(
            inference_steps=args.steps,
            minibatch=args.batch,
            sample_batch=args.batch,
            learning_rate=LR,
            eta=1.0,
            k=args.window,
        )
        super().__init__(args, model, settings, True, torch.arange(args.images))

    def places(self) -> Sequence[sides.Place]:
        """The parts of ``AlignProp.loss``; the rest of the loop is the backward pass."""
        from tropism import train

        return [
            (self.method, "_sample", "sampling"),
            (self.method, "_scored", "decoding and reward"),
            (train, "_one_batch", "backward"),
        ]


def flops(args: argparse.Namespace, of: dict[str, float], rows: int) -> tuple[float, str]:
    """Every step once forward, the steps of the window once backward (nothing twice), and the decoder likewise."""
    # The first step of the window starts from latents without a graph; all others pass the gradient on to theirs.
    backward = args.window * (of["through"] - of["forward"]) - (of["through"] - of["training"])
    per_image = rows * (args.steps * of["forward"] + backward) + of["decode training"]
    return per_image, f"{rows} rows x ({args.steps} steps forward, {args.window} backward), decoded and back once"


if __name__ == "__main__":
    given = parse()
    what = f"{given.images} images of {given.steps} steps, guidance {given.guidance:g}, batches of {given.batch}"
    what = f"AlignProp: {what}, gradient through the last {given.window}, LoRA of rank {given.rank}"
    sides.compare(given, what, trl, Tropism, flops)
