"""A policy-gradient method on a toy and a reward with a known gradient, for the tests of the methods."""

from __future__ import annotations

import torch
from methods import Off

from tropism.methods import ddpo
from tropism.methods.ddpo import DDPO
from tropism.rollout import gather


class Line:
    """The reward direction . x."""

    name = "line"
    differentiable = True
    direction = torch.tensor([1.0, -2.0])

    def __call__(self, samples, prompts, **columns):
        return samples @ self.direction


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def method_on(model, **settings) -> DDPO:
    chosen = ddpo.Settings(**{"inference_steps": 10, "minibatch": 10_000, "updates": 1, **settings})
    chosen.check()
    return chosen.build(model, Off(), seeded())


def all_cells(method, rollout, on_policy=True):
    rows, columns = rollout.mask.nonzero(as_tuple=True)
    return gather(rollout, rows, columns, on_policy, {})
