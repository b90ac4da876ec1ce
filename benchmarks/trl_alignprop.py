"""A whole AlignProp iteration (sample with a graph, score, backpropagate) here and in TRL 0.11.4's AlignPropTrainer.

Both sides: the same pipeline, images, sampling steps, guidance, batches, LoRA, optimizer and reward, and the gradient
through the same last steps of the chain. TRL recomputes every call of the network in its backward pass and has no flag
against it; here ``enable_gradient_checkpointing`` recomputes its blocks.

    python benchmarks/trl_alignprop.py --trl-python ~/trl-venv/bin/python
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


class Trl:
    """TRL's trainer; one iteration is its ``step``. Its random truncation is off, so that both sides do equal work."""

    def __init__(self, args: argparse.Namespace) -> None:
        from trl import AlignPropConfig, AlignPropTrainer, DefaultDDPOStableDiffusionPipeline

        config = AlignPropConfig(
            seed=args.seed,
            mixed_precision="bf16" if args.precision == "bf16" else "no",
            save_freq=10**9,
            sample_num_steps=args.steps,
            sample_guidance_scale=args.guidance,
            train_batch_size=args.batch,
            train_gradient_accumulation_steps=args.images // args.batch,
            train_learning_rate=LR,
            truncated_backprop_rand=False,
            truncated_backprop_timestep=args.steps - args.window,
        )
        pipeline = DefaultDDPOStableDiffusionPipeline(args.pipeline)
        self.trainer = AlignPropTrainer(config, worker.trl_reward, worker.TurningPrompts(args.images), pipeline)
        self.images, self.global_step = args.images, 0

    def iterate(self) -> int:
        """One epoch of TRL's; always number 0, which saves nothing."""
        self.global_step = self.trainer.step(0, self.global_step)
        return self.images

    @contextlib.contextmanager
    def phases(self) -> Iterator[Counter[str]]:
        """Clocks around TRL's own parts."""
        trainer, found = self.trainer, Counter[str]()
        hooks = [
            worker.count_calls(trainer.sd_pipeline.unet, found),
            worker.count_updates(trainer.optimizer.optimizer, found),
        ]
        places = [
            (trainer, "_generate_samples", "sampling"),
            (trainer.sd_pipeline.vae, "decode", "decoding and reward"),
            (trainer, "compute_rewards", "decoding and reward"),
            (trainer.accelerator, "backward", "backward"),
        ]
        with worker.clocked(found, places):
            yield found
        for hook in hooks:
            hook.remove()


class Tropism:
    """tropism's AlignProp (with a fixed window, DRaFT-K) in its loop; one iteration is one step of ``train``."""

    def __init__(self, args: argparse.Namespace, plain: bool) -> None:
        import torch
        from accelerate import Accelerator

        from tropism.base import Prompts
        from tropism.methods.draft import Settings
        from tropism.rewards.callables import as_reward

        self.model = worker.load_model(args, plain)
        if not args.keep:
            self.model.enable_gradient_checkpointing()
        settings = Settings(
            inference_steps=args.steps,
            minibatch=args.batch,
            sample_batch=args.batch,
            learning_rate=LR,
            eta=1.0,
            k=args.window,
        )
        settings.check()
        reward = as_reward(worker.redness, "redness", differentiable=True)
        self.method = settings.build(self.model, reward, torch.Generator().manual_seed(args.seed + 1))
        self.optimizer = worker.optimizer_of(self.model.parameters(), LR)
        self.batch = Prompts(worker.prompts(args.images), torch.arange(args.images), {})
        self.accelerator, self.images = Accelerator(cpu=True), args.images

    def iterate(self) -> int:
        """One update."""
        from tropism.train import train

        train(self.method, [self.batch], self.optimizer, steps=1, accelerator=self.accelerator)
        return self.images

    @contextlib.contextmanager
    def phases(self) -> Iterator[Counter[str]]:
        """Clocks around the parts of ``AlignProp.loss``; the rest of the loop is the backward pass."""
        from tropism import train

        found = Counter[str]()
        hooks = [
            worker.count_calls(self.model._network(), found),
            worker.count_updates(self.optimizer, found),
        ]
        places = [
            (self.method, "_sample", "sampling"),
            (self.method, "_scored", "decoding and reward"),
            (train, "_one_batch", "backward"),
        ]
        with worker.clocked(found, places):
            yield found
        for hook in hooks:
            hook.remove()

    def floor(self, args: argparse.Namespace) -> dict[str, Any]:
        """Every step once forward, the steps of the window once backward (nothing twice), and the decoder likewise."""
        flops, rows = worker.network_flops(args), 1 if args.guidance == 1 else 2
        rates = worker.rates(args.precision)
        # The first step of the window starts from latents without a graph; all others pass the gradient on to theirs.
        backward = args.window * (flops["through"] - flops["forward"])
        backward -= flops["through"] - flops["training"]
        return {
            "flops_per_image": rows * (args.steps * flops["forward"] + backward) + flops["decode training"],
            "of_what": f"{rows} rows x ({args.steps} steps forward, {args.window} backward), decoded and back once",
            "rates": rates,
            "rate": max(rates.values()),
        }


def main() -> None:
    args = parse()
    if args.worker is None:
        what = f"{args.images} images of {args.steps} steps, guidance {args.guidance:g}, batches of {args.batch}"
        side_by_side.drive(
            args, f"AlignProp: {what}, gradient through the last {args.window}, LoRA of rank {args.rank}"
        )
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
