"""What an evaluation looks at: rewards, trained on and held out, pixel statistics, diversity, and KL.

Rewards and statistics are those of the evaluation's pictures. Diversity and KL need several pictures of one prompt and
chains with chance in them: a few more are drawn, at seeds of their own that never change.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tropism.base import Prompts
from tropism.divergence import chains_with_kl, stochastic
from tropism.evaluate import Evaluation, evaluate, interval, paired_gain
from tropism.policy import Policy
from tropism.rewards import Weighted, pixel_statistics

PROMPTS, REPEATS = 4, 3  # of diversity and KL: prompts, and chains of each
TAKEN = frozenset({"diversity", "kl", "gain", "missing", "win_rate", "seconds"})  # names that no reward can have
CELLS = 16  # a side; pictures are compared as averages over so many cells, so that noise is no diversity


@dataclass(frozen=True)
class Sight:
    """One evaluation, and what else was seen."""

    evaluation: Evaluation
    statistics: Mapping[str, Tensor]  # by name, (N,), of the evaluation's images
    diversity: Tensor  # (prompts,)
    kl: Tensor  # (chains,) nats; none of a distillation
    weights: Mapping[str, float]  # of each reward in the sum; 0 is held out
    seconds: float


class Evaluator:
    """Evaluates a model at equal seeds, again and again. ``few`` has the rows of diversity and KL, prompt by prompt.

    ``before`` is the policy of the reference, where that is another one: a distillation's teacher. Student and teacher
    have no chains in common, so there is no KL.
    """

    def __init__(
        self,
        policy: Policy,
        reward: Weighted,
        prompts: Prompts,
        few: Prompts,
        seed: int,
        before: Policy | None = None,
    ) -> None:
        self.policy, self.reward, self.prompts, self.few, self.seed = policy, reward, prompts, few, seed
        self.before = policy if before is None else before

    @torch.no_grad()
    def look(self, moved: bool = True) -> Sight:
        """The model as it is; not ``moved`` says that it is the reference."""
        started, policy = time.perf_counter(), self.policy if moved else self.before
        evaluation = evaluate(policy, self.reward, self.prompts, self.seed)
        probe, same = stochastic(policy.model, policy.steps, policy.microbatch), self.before is self.policy
        latents, kl = chains_with_kl(probe, self.few.text, self.seed, moved and same)
        apart = diversity(probe.decode(latents).float().cpu(), REPEATS)
        statistics = pixel_statistics(evaluation.images)
        weights = {reward.name: weight for reward, weight in self.reward.rewards}
        return Sight(evaluation, statistics, apart, kl if same else kl[:0], weights, time.perf_counter() - started)


def diversity(images: Tensor, repeats: int) -> Tensor:
    """(P,) how much the pictures of one prompt differ, in [0, 1], from images (P * repeats, 3, H, W), prompt by prompt.

    The mean over pairs of the root mean square difference of two pictures, each averaged over 16 x 16 equal cells. One
    picture a prompt has no pairs: NaN.
    """
    cells = torch.nn.functional.adaptive_avg_pool2d(images, CELLS).flatten(1)
    groups = cells.unflatten(0, (-1, repeats))
    return torch.stack([torch.pdist(group).mean() / group.shape[1] ** 0.5 for group in groups])


def metrics_row(before: Sight, now: Sight | None) -> dict[str, float]:
    """What is logged of an evaluation; of the first one, before training, when ``now`` is None."""
    seen = now or before
    row = {f"eval_{name}": float(values.mean()) for name, values in seen.statistics.items()}
    row |= {f"eval_{name}": interval(values).mean for name, values in seen.evaluation.parts.items()}
    row["eval_diversity"] = float(seen.diversity.mean())
    if len(seen.kl):
        row["eval_kl"] = float(seen.kl.mean())
    total = interval(seen.evaluation.total)
    row |= {"eval_reward": total.mean, "eval_reward_low": total.low, "eval_reward_high": total.high}
    row["eval_seconds"] = round(seen.seconds, 3)
    if now is None:
        return row | {f"eval_{name}_weight": weight for name, weight in seen.weights.items()}
    row |= {f"eval_{name}_shift": shift(before.statistics[name], now.statistics[name]) for name in now.statistics}
    if len(now.evaluation.parts) > 1:
        for name, values in now.evaluation.parts.items():
            row |= _gain(f"eval_{name}_", before.evaluation.parts[name], values)
    return row | _gain("eval_", before.evaluation.total, now.evaluation.total)


def shift(before: Tensor, after: Tensor) -> float:
    """How far the mean of (N,) values has moved, in pooled standard deviations; 0 where nothing moved.

    The spread is at least a 1,000th of the larger mean size, so that what was flat does not move infinitely.
    """
    spread = ((before.var(correction=0) + after.var(correction=0)) / 2).sqrt()
    least = 1e-3 * torch.maximum(before.abs().mean(), after.abs().mean()).clamp(min=1e-9)
    return float((after.mean() - before.mean()) / torch.maximum(spread, least))


def _gain(name: str, before: Tensor, after: Tensor) -> dict[str, float]:
    gain = paired_gain(before, after)
    row = {"gain": gain.mean, "gain_low": gain.low, "gain_high": gain.high, "missing": float(gain.dropped)}
    row |= {"win_rate": gain.win_rate, "win_rate_low": gain.win_low, "win_rate_high": gain.win_high}
    return {name + key: value for key, value in row.items()}
