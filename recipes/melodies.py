"""Make the shipped melodies model again, from nothing: an EDM denoiser of spectrograms, about two minutes on one core.

    python recipes/melodies.py --out ~/melodies

1. 6,000 clips of the training split are synthesised.
2. The encoder: the mean spectrogram of every voice over its frames, which minimises the prior loss of CoMoSpeech
   (2305.06908, a Gaussian of unit variance) exactly; nothing is to be aligned, as the score says when notes are played.
3. The decoder: EDM's loss (2206.00364) at levels exp(N(-1.2, 1.2^2)), in bf16, with the average of the weights kept.

``--no-mean`` trains the same decoder with noise without a mean, to compare with.
"""

from __future__ import annotations

import argparse
import math
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tropism.base import take
from tropism.ema import Ema
from tropism.models.melodies import FLOOR, MASK, SCALE, SIGMA_DATA, Decoder, Melodies, save_melodies
from tropism.policy import Policy
from tropism.samplers import DDIM
from tropism.schedules import add_noise
from tropism.worlds import melodies as world

read = partial(world.score, frames=world.FRAMES_A_BEAT)


def clips(count: int, seed: int) -> tuple[list[str], Tensor]:
    """Prompts of the training split and their spectrograms (count, 1, 48, 32), in the model's units."""
    texts = world.prompts(count, seed)
    values = world.render_batch([world.parse(text) for text in texts], range(seed, seed + count))
    return texts, torch.from_numpy(values)[:, None] * SCALE


def fit_table(texts: list[str], x: Tensor) -> Tensor:
    """(voices, 48): the mean over a voice's frames; silence, and a voice that is never heard, are 0."""
    voices = torch.stack([torch.from_numpy(read(text).voices) for text in texts]).flatten()
    frames = x[:, 0].transpose(1, 2).flatten(0, 1)
    sums = torch.zeros(world.VOICES, frames.shape[1]).index_add_(0, voices, frames)
    table = sums / torch.bincount(voices, minlength=world.VOICES).clamp(min=1)[:, None]
    table[-1] = 0.0
    return table


def loss_of(model: Melodies, x0: Tensor, cond: dict[str, Tensor], generator: torch.Generator) -> Tensor:
    """EDM's loss over the frames that are not padding."""
    level = (torch.randn(len(x0), generator=generator) * 1.2 - 1.2).exp().clamp(FLOOR * 1.05, 80.0)
    t = model.denoiser.schedule.time(level)  # type: ignore[attr-defined]
    noisy = add_noise(model.denoiser.schedule, x0, torch.randn(x0.shape, generator=generator), t)
    out = (level - FLOOR) * SIGMA_DATA / (level**2 + SIGMA_DATA**2).sqrt()
    gap = (model.denoiser(noisy, t, cond).x0 - x0) / out[:, None, None, None] * cond[MASK]
    return gap.square().sum() / (cond[MASK].sum() * x0.shape[2])


def train(model: Melodies, x: Tensor, texts: list[str], args: argparse.Namespace) -> Ema:
    """Trains the decoder, and returns the average of its weights."""
    generator = torch.Generator().manual_seed(args.seed)
    model.train_full()
    cond, null = model.encode(texts), model.null()
    parameters = model.parameters()
    adam, average = (
        torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01),
        Ema(parameters, 0.0),
    )
    start = time.process_time()
    for step in range(args.steps):
        index = torch.randint(len(x), (args.batch,), generator=generator)
        rows = {name: value.clone() for name, value in take(cond, index).items()}
        dropped = torch.rand(args.batch, generator=generator) < 0.1
        for name, value in rows.items():
            value[dropped] = null[name]
        adam.param_groups[0]["lr"] = (
            args.lr * min(1, (step + 1) / 100) * (1 + math.cos(math.pi * step / args.steps)) / 2
        )
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, x[index], rows, generator)
        adam.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        average.decay = min(0.995, (1 + step) / (10 + step))
        average.update()
        if step % 100 == 0:
            print(f"{step} loss {float(loss.detach()):.4f} cpu {time.process_time() - start:.0f} s", flush=True)
        if step % 500 == 499 or step + 1 == args.steps:
            with average.swapped():
                save_melodies(args.out / "melodies.safetensors", model._network(), model.table)
                if step % 1000 == 999 or step + 1 == args.steps:
                    print(f"{step} {check(model, args.check)}", flush=True)
    return average


@torch.no_grad()
def check(model: Melodies, count: int) -> str:
    """What the verifier says of held-out prompts in 50 moves."""
    texts = world.prompts(count, 1, "held_out")
    pictures = Policy(model, DDIM(0.0), 50).images(texts, torch.Generator().manual_seed(1))
    verdicts = world.verify_batch(pictures.numpy(), texts)
    share = sum(verdict.score for verdict in verdicts) / count
    return f"notes {share:.3f} passed {sum(verdict.passed for verdict in verdicts) / count:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=6_000)
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", type=int, default=64)
    parser.add_argument("--no-mean", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    texts, x = clips(args.clips, args.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        network = Decoder(world.BINS, world.FRAMES, args.width, args.depth)
    model = Melodies(network, fit_table(texts, x), read, shifted=not args.no_mean)
    print(f"{sum(value.numel() for value in network.parameters()):,} parameters", flush=True)
    train(model, x, texts, args)


if __name__ == "__main__":
    main()
