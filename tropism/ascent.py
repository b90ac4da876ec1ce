"""The reward of latents that keep a graph: what methods that climb the reward's gradient share."""

from __future__ import annotations

from torch import Tensor

from tropism.base import Prompts, Reward, TextToImage, bcast


class NoGradient(TypeError):
    """The reward cannot be differentiated."""


def no_gradient(reward: Reward, who: str, instead: str) -> NoGradient:
    """Says that ``who`` cannot follow this reward, and what to do ``instead``."""
    return NoGradient(
        f"the reward {reward.name!r} has no gradient with respect to the images, and {who} follows that gradient; "
        f"{instead}, or a differentiable reward such as clip"
    )


def rewarded(
    model: TextToImage, reward: Reward, latents: Tensor, prompts: Prompts, who: str, instead: str
) -> tuple[Tensor, Tensor]:
    """(rewards (N,) of decoded latents (N, ...), with a graph; which rows have a score (N,)).

    Where a score is missing no gradient comes back, whatever the arithmetic of its NaN was. Raises NoGradient when the
    reward returns no graph.
    """
    latents = latents.view_as(latents)  # with a gradient of its own: others may need the latents as well
    scores = reward(model.decode(latents), prompts.text, **prompts.columns)
    if not scores.requires_grad:
        raise no_gradient(reward, who, instead)
    present = ~scores.isnan()
    latents.register_hook(lambda grad: grad.where(bcast(present.to(grad.device), grad), 0.0))
    return scores, present
