"""A model of image tokens of scenes beside its one-step students: verified rate, calls of the network, seconds.

    python benchmarks/scenes_tokens.py --model ~/scenes-tokens --students runs/dd1 runs/dd2 --count 96 --sheet sheet.png

The teacher is drawn with twice: token by token with cached keys and values, and as the chain of ``samplers.NextToken``,
which asks the whole network for every token. Captions are held out. The sheet has one row a
way of drawing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from tropism.commands import with_adapter
from tropism.models.image_tokens import ImageTokens
from tropism.models.token_gpt import load_tokens
from tropism.policy import Policy
from tropism.samplers import solver
from tropism.worlds.scenes import KINDS, captions, parse, verify_batch


def row(name: str, draw: Callable[[list[str]], Tensor], texts: list[str], calls: int, batch: int) -> Tensor:
    """Draws, prints a line, returns the pictures (N, 3, H, W)."""
    draw(texts[:1])
    start = time.perf_counter()
    images = torch.cat([draw(texts[first : first + batch]) for first in range(0, len(texts), batch)]).clamp(0, 1)
    seconds = (time.perf_counter() - start) / len(texts)
    verdicts = verify_batch(images.numpy(), texts)
    kinds = [parse(text).kind for text in texts]
    held = {kind: [v.passed for v, own in zip(verdicts, kinds, strict=True) if own == kind] for kind in KINDS}
    rates = " ".join(f"{kind} {sum(found)}/{len(found)}" for kind, found in held.items() if found)
    score = sum(v.score for v in verdicts) / len(verdicts)
    passed = sum(v.passed for v in verdicts) / len(verdicts)
    print(f"{name:24} passed {passed:.3f} ({rates}), score {score:.3f}, {calls} calls, {seconds:.4f} s", flush=True)
    return images


def decoding(model: ImageTokens, batch: int) -> float:
    """Seconds a picture from tokens to pixels, which every row includes."""
    tokens = model.codes[torch.randint(len(model.codes), (batch, model.steps))]
    model.decode(tokens)
    start = time.perf_counter()
    for _ in range(4):
        model.decode(tokens)
    return (time.perf_counter() - start) / 4 / batch


@torch.no_grad()
def main() -> None:
    """Draws, judges, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--students", type=Path, nargs="*", default=[], help="folders of runs of dd1 or dd2")
    parser.add_argument("--moves", type=int, nargs="+", help="of students; none: those that each was made for")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument("--count", type=int, default=96)
    parser.add_argument("--kind", choices=KINDS, nargs="+", default=KINDS, help="of the captions")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chain", action="store_true", help="time the teacher without cached keys too, on one batch")
    parser.add_argument("--sheet", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, generator = load_tokens(options.model.expanduser()), torch.Generator().manual_seed(options.seed)
    texts, shown = captions(options.count, options.seed, "held_out", options.kind), list[Tensor]()
    print(f"batches of {options.batch}, one thread; decoding alone {decoding(model, options.batch):.4f} s", flush=True)

    for scale in options.guidance:

        def cached(some: list[str], scale: float = scale) -> Tensor:
            null = None if scale == 1 else {k: v.expand(len(some), -1) for k, v in model.null().items()}
            return model.decode(model.bare_network().draw(model.encode(some), null, scale, generator))

        shown.append(
            row(f"teacher, cached, w = {scale:g}", cached, texts, model.steps * (1 + (scale != 1)), options.batch)
        )
    if options.chain:
        plain = Policy(model, solver(model.denoiser), model.steps, 1.0)
        part = texts[: options.batch]
        row("teacher, chain, w = 1", lambda some: plain.images(some, generator), part, model.steps, options.batch)
    for folder in options.students:
        student = with_adapter(load_tokens(options.model.expanduser()), folder.expanduser() / "adapter")
        for moves in options.moves or [student.steps]:
            policy = Policy(student, solver(student.denoiser), moves, microbatch=options.batch)

            def said(some: list[str], policy: Policy = policy) -> Tensor:
                return policy.images(some, generator)

            shown.append(row(f"{folder.name}, {moves} moves", said, texts, moves, options.batch))
    if options.sheet:
        rows = [torch.cat([*images[:12]], dim=-1) for images in shown]
        pixels = (torch.cat(rows, dim=-2).permute(1, 2, 0) * 255).round().byte().numpy()
        Image.fromarray(pixels).resize((pixels.shape[1] * 2, pixels.shape[0] * 2), Image.Resampling.NEAREST).save(
            options.sheet
        )
        print("captions of the sheet:", *texts[:12], sep="\n  ")


if __name__ == "__main__":
    main()
