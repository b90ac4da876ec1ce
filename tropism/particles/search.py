"""Search over noise: best-of-n, and beams. They look for a high reward and have no target law.

Costs are counted as those of ``fk_steer``: rows of the network and of the reward.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection

import torch
from torch import Tensor

from tropism.base import Cond, Transition, take
from tropism.particles.fk import checked, fk_steer
from tropism.particles.particles import Particles, unique
from tropism.particles.trace import Step, Trace
from tropism.particles.walking import Chance, Score, Walk, Walking, law_rows
from tropism.randomness import Randomness, row_generators, row_seeds


def best_of_n(
    walk: Walk, x: Tensor, cond: Cond, score: Score, *, generator: Randomness = None
) -> tuple[Particles, Trace]:
    """K independent chains a prompt from x (P, K, ...), each scored at its end: ``best()`` is what is looked for.

    Any kernel will do. Weights are equal: the particles are samples of the model. Raises ValueError as ``fk_steer``.
    """
    return fk_steer(walk, x, cond, score, scale=0.0, potential=None, generator=generator)


@torch.no_grad()
def beam_search(
    walk: Walk,
    x: Tensor,
    cond: Cond,
    score: Score,
    *,
    expand: int,
    at: Collection[int],
    generator: Randomness = None,
) -> tuple[Particles, Trace]:
    """K beams a prompt from x (P, K, ...); at the moves ``at`` each draws ``expand`` next states.

    Each of these is looked at by the network, the predicted clean samples are scored, and the K best of the prompt go
    on. With K = 1 and every move this is SVDD (2408.08252) with its temperature at 0. The network's look is that of
    the next move, so that a move costs ``expand`` * K rows and no more; at the last move the finished samples
    themselves are scored. A sample without score is worth less than any other. Raises ValueError as ``fk_steer``, for
    expand < 1, and for a move of ``at`` that is without noise.
    """
    prompts, count = x.shape[:2]
    moves = len(walk.ts) - 1
    checked(x, cond, moves, at, 1.0)
    if expand < 1:
        raise ValueError(f"expand must be at least 1; got {expand}")
    going, chance = Walking(walk, score), Chance.of(generator, prompts * count)
    children = [row_generators(row_seeds(expand, each)) for each in chance.rows]
    times = list(itertools.pairwise(walk.ts.to(x.device, torch.float32)))
    flock, ancestor = x.flatten(0, 1).float(), torch.arange(count).expand(prompts, count)
    law, _ = going.look(flock, *times[0], cond)
    steps, reward = list[Step](), None
    for index, (_, s) in enumerate(times):
        width = expand if index in at else 1
        _noisy(law, index, width, type(walk.kernel).__name__)
        own = [each for row in children for each in row[:width]]
        parent = torch.arange(prompts * count).repeat_interleave(width)
        there = parent.to(x.device)
        flock, wide = law_rows(law, there).sample(own), take(cond, there)
        last = index + 1 == moves
        law, said = (law, None) if last else going.look(flock, *times[index + 1], wide)
        if width == 1:
            continue
        reward = going.score(flock if said is None else said.x0, parent)
        keep = _top(reward.reshape(prompts, count * width), count)
        flock, law = _kept(flock, law, keep, last)
        cond, parent, reward = take(wide, keep.to(x.device)), parent[keep], reward[keep]
        ancestor = ancestor.gather(1, (parent % count).reshape(prompts, count))
        steps.append(_step(index + 1, float(s), ancestor, reward))
    if moves - 1 not in at or reward is None:
        reward = going.score(flock, torch.arange(prompts * count))
    steps.append(_step(moves, float(walk.ts[-1]), ancestor, reward))
    shape, zero = (prompts, count), torch.zeros(prompts, count, dtype=torch.float64)
    found = Particles(flock.reshape(*shape, *flock.shape[1:]), zero, ancestor, zero[:, 0], reward.reshape(shape))
    return found, Trace(tuple(steps), going.cost.network_rows, going.cost.reward_rows)


def _noisy(law: Transition, index: int, width: int, kernel: str) -> None:
    if width > 1 and not bool(law.is_random.all()):
        raise ValueError(
            f"move {index} of {kernel} is without noise: its {width} next states would be one; leave it out"
        )


def _top(reward: Tensor, count: int) -> Tensor:
    """(P, N) -> rows (P * count,) of the ``count`` highest of each prompt, in order of place."""
    best = reward.nan_to_num(nan=-torch.inf).topk(count, dim=1).indices.sort(1).values
    return (best + torch.arange(len(reward))[:, None] * reward.shape[1]).flatten()


def _kept(x: Tensor, law: Transition, keep: Tensor, last: bool) -> tuple[Tensor, Transition]:
    there = keep.to(x.device)
    return x[there], law if last else law_rows(law, there)


def _step(index: int, t: float, ancestor: Tensor, reward: Tensor) -> Step:
    prompts, count = ancestor.shape
    same = torch.full((prompts,), float(count), dtype=torch.float64)
    mean = reward.reshape(prompts, count).nanmean(1)
    return Step(index, t, same, torch.ones(prompts, dtype=torch.bool), unique(ancestor), mean)
