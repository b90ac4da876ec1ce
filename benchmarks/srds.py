"""SRDS on a shipped model: how many calls wait for one another until a chain's pictures are those of the chain in turn.

Chains of ``--moves`` guided moves of a model of scenes, from the same noise: in turn, and in parallel with 1, 2, ...
iterations. A call asks the network about every state that is ready, twice each where there is guidance. Pictures are
compared at 8 bits: the largest and mean difference of a channel, the peak signal-to-noise ratio, and on how many the
verifier of scenes says the same. Seconds are those of one core, which gains nothing from asking about more at once.

    python benchmarks/srds.py --count 4 --moves 100 --iterations 1 2 3 4
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from tropism import catalog
from tropism.data.prompts import PromptSet
from tropism.policy import Policy
from tropism.samplers import refine, solver, walk
from tropism.worlds.scenes import captions, verify

sys.path.insert(0, str(Path(__file__).parent))
from side_by_side import machine


def bytes_of(policy: Policy, latents: Tensor) -> Tensor:
    """(B, H, W, 3) int16, 0 to 255."""
    return (policy.decode(latents) * 255).round().to(torch.int16).permute(0, 2, 3, 1)


def scores(pictures: Tensor, texts: list[str]) -> list[float]:
    """What the verifier says of each."""
    return [verify(picture.to(torch.uint8).numpy(), text).score for picture, text in zip(pictures, texts, strict=True)]


def compared(pictures: Tensor, wanted: Tensor, texts: list[str]) -> str:
    """One row of the table."""
    gap = (pictures - wanted).double().abs()
    noise = gap.square().mean((1, 2, 3)).clamp(min=1e-9)
    same = sum(a == b for a, b in zip(scores(pictures, texts), scores(wanted, texts), strict=True))
    worst = float((255**2 / noise).log10().min() * 10)
    return f"{int(gap.max()):8d}{float(gap.mean()):9.3f}{worst:9.1f}{same:5d}/{len(texts)}"


@torch.no_grad()
def main() -> None:
    """Draws, compares, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="scenes-flow")
    parser.add_argument("--count", type=int, default=4, help="pictures, drawn as one batch")
    parser.add_argument("--moves", type=int, default=100)
    parser.add_argument("--iterations", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--blocks", type=int, help="the square root of moves unless given")
    parser.add_argument("--waiting", action="store_true", help="an iteration begins when the one before has ended")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = catalog.load_model(options.model, torch.float32, torch.device("cpu"))
    policy = Policy(model, solver(model.denoiser), options.moves)
    texts = list(PromptSet(captions(options.count, seed=0)).batch(range(options.count), 1).text)
    x, cond = policy.noise(len(texts), torch.Generator().manual_seed(0)), model.encode(texts)
    facts = machine()
    print(f"{facts['date']}, {facts['processor']}, one of {facts['cores']} cores, torch {torch.__version__}")
    started, clock = time.process_time(), time.time()
    *_, last = walk(policy.kernel, policy.denoiser, x, policy.ts, cond)
    print(f"{options.model}, {len(texts)} pictures, {options.moves} moves, guidance {model.guidance_scale}, float32")
    print("iterations  serial  times fewer  total  widest   change  largest    mean  worst dB  same   CPU s  seconds")
    print(f"   in turn{options.moves:8d}{1.0:13.1f}{options.moves:7d}       1{'':43}", end="")
    print(f"{time.process_time() - started:8.1f}{time.time() - clock:9.1f}", flush=True)
    wanted = bytes_of(policy, last.x_next)
    for count in options.iterations:
        started, clock = time.process_time(), time.time()
        found = refine(
            policy.kernel,
            policy.denoiser,
            x,
            policy.ts,
            cond,
            max_iterations=count,
            blocks=options.blocks,
            pipelined=not options.waiting,
        )
        spent, waited = time.process_time() - started, time.time() - clock
        print(
            f"{found.iterations:10d}{found.serial_calls:8d}{options.moves / found.serial_calls:13.1f}"
            f"{found.total_calls:7d}{found.widest:8d}{found.changes[-1]:9.5f}",
            compared(bytes_of(policy, found.x), wanted, texts),
            f"{spent:8.1f}{waited:9.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
