"""A policy-gradient method on a toy, for the tests of DDPO and its settings."""

from __future__ import annotations

import torch
from methods import Off

from tropism.methods import ddpo
from tropism.methods.ddpo import DDPO
from tropism.rollout import gather


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def method_on(model, **settings) -> DDPO:
    chosen = ddpo.Settings(**{"inference_steps": 10, "minibatch": 10_000, "updates": 1, **settings})
    chosen.check()
    return chosen.build(model, Off(), seeded())


def all_cells(method, rollout, on_policy=True):
    rows, columns = rollout.mask.nonzero(as_tuple=True)
    return gather(rollout, rows, columns, on_policy, {})
