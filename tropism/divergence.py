"""How far a trained model has gone from the model it was: KL between the laws of their chains.

By the chain rule KL(p || q) of two Markov chains that start alike is the mean, over chains of p, of the sum over moves
of KL(p's law of the next state || q's law of it). Each term is exact; only the states they are taken at are drawn.

The chains are those of one stochastic kernel, whatever the method trained with (a deterministic one has no KL), so that
the numbers of two methods compare: DDIM with eta 1, on a flow Flow-GRPO's SDE with its noise level of 0.7, or the hops
of a consistency model, with the model's default steps and guidance. A move without density (DDIM's to sigma = 0) adds
nothing. Other steps or another kernel give other numbers: compare runs of one model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tropism.base import TextToImage, take
from tropism.policy import Policy
from tropism.randomness import row_generators, row_seeds
from tropism.samplers import stochastic_solver

NOISE_LEVEL = 0.7


def stochastic(model: TextToImage, steps: int, microbatch: int = 16) -> Policy:
    """The policy that KL is measured with."""
    return Policy(model, stochastic_solver(model.denoiser, 1.0, NOISE_LEVEL), steps, microbatch=microbatch)


@torch.no_grad()
def chains_with_kl(policy: Policy, text: Sequence[str], seed: int, moved: bool = True) -> tuple[Tensor, Tensor]:
    """(clean latents (B, ...), nats (B,) float32) of one chain a prompt; chain i belongs to (seed, i).

    Not ``moved`` says that the model is the reference: nothing is compared, and the divergence is 0.
    """
    seeds, cond = row_seeds(len(text), torch.Generator().manual_seed(seed)), policy.model.encode(text)
    parts = [
        _one_batch(policy, take(cond, rows), row_generators(seeds[rows]), moved)
        for rows in torch.arange(len(text)).split(policy.microbatch)
    ]
    ends, nats = zip(*parts, strict=True)
    return torch.cat(ends), torch.cat(nats)


def _one_batch(
    policy: Policy, cond: dict[str, Tensor], own: list[torch.Generator], moved: bool
) -> tuple[Tensor, Tensor]:
    moves = list(policy.chain(policy.noise(len(own), own), cond, own))
    nats = torch.zeros(len(own))
    if moved:
        with policy.model.reference():
            laws = [policy.kernel(policy.denoiser, move.x, move.t, move.s, cond)[0] for move in moves]
        nats = torch.stack([move.transition.kl(law) for move, law in zip(moves, laws, strict=True)]).sum(0).cpu()
    return moves[-1].x_next, nats
