"""One-step students of a token model whose law is known: DD2 and DD1 on a Markov chain of three tokens.

    python benchmarks/dd_toy.py --method dd2 --updates 2500 --seeds 0 1 2

Prints the total variation between the student's pictures and the true law of all 64, and that of independent tokens
(the best that a student without order between its noises can do), by rounds of training. ``argmax`` reads DD1's logits
instead of its mean.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from tropism.codebook import nearest
from tropism.data.prompts import PromptSet
from tropism.ema import Ema
from tropism.methods import dd1, dd2
from tropism.models.image_tokens import chain_law, chain_model
from tropism.policy import Policy
from tropism.train import train

DRAWS, PASSES, ROWS = 50_000, 5, 256


def distance(tokens: Tensor, law: Tensor) -> float:
    """Total variation between the counts of tokens (N, 3) and the law (4, 4, 4)."""
    place = tokens[:, 0] * 16 + tokens[:, 1] * 4 + tokens[:, 2]
    return float((torch.bincount(place, minlength=64) / len(place) - law.flatten()).abs().sum() / 2)


@torch.no_grad()
def tokens_of(policy: Policy, argmax: bool = False) -> Tensor:
    """(DRAWS, 3) of the student."""
    model = policy.model
    noise, cond = torch.randn(DRAWS, 3, 2, generator=torch.Generator().manual_seed(5)), model.encode(["sticky"] * DRAWS)
    if argmax:
        drawn = torch.ones(DRAWS, 3, dtype=torch.bool)
        return model.flow(noise, drawn, noise, drawn.float(), cond)[1].argmax(-1)
    return nearest([*policy.chain(noise, cond)][-1].x_next, model.codes)


def run(name: str, seed: int, updates: int, steps: int, rate: float, fake_rate: float, ema: float) -> None:
    model, every = chain_model(seed=seed), 250
    model.train_full()
    common = dict(student_steps=steps, updates=1, passes=PASSES, minibatch=ROWS, sample_batch=4096, learning_rate=rate)
    own = dd2.Settings(**common, fake_learning_rate=fake_rate) if name == "dd2" else dd1.Settings(**common)
    own.check()
    method = own.build(model, None, torch.Generator().manual_seed(seed))
    betas = (0.0, 0.99) if name == "dd2" else (0.9, 0.999)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, betas=betas)
    if own.init_updates if name == "dd2" else 0:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        train(method, [PromptSet(["sticky"]).batch([0], ROWS)] * 100, optimizer, steps=own.init_updates // PASSES)
        optimizer = torch.optim.Adam(model.parameters(), lr=rate, betas=betas)
    average = Ema(model.parameters(), ema)
    law, started = chain_law("sticky"), time.process_time()
    for done in range(every, updates + 1, every):
        train(
            method,
            [PromptSet(["sticky"]).batch([0], ROWS)] * every,
            optimizer,
            steps=every // PASSES,
            hooks=[lambda _: average.update()],
        )
        if done % (2 * every) == 0:
            with average.swapped():
                found = {"mean": distance(tokens_of(method.policy), law)}
                found |= {"argmax": distance(tokens_of(method.policy, True), law)} if name == "dd1" else {}
            said = ", ".join(f"{key} {value:.3f}" for key, value in found.items())
            print(
                f"{name} seed {seed} steps {steps} updates {done}: {said} ({time.process_time() - started:.0f} s)",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=["dd1", "dd2"], required=True)
    parser.add_argument("--updates", type=int, default=2500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--student-steps", type=int, default=1)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--fake-rate", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.98)
    args = parser.parse_args()
    torch.set_num_threads(1)
    law = chain_law("sticky")
    alone = torch.full((64,), 1 / 64)
    print(f"independent tokens: {float((alone - law.flatten()).abs().sum() / 2):.3f}")
    for seed in args.seeds:
        run(args.method, seed, args.updates, args.student_steps, args.rate, args.fake_rate, args.ema)


if __name__ == "__main__":
    main()
