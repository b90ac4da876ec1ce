"""``steer(pipe, reward=...)(prompt)``: a pipeline whose pictures are steered by a reward while they are drawn.

Nothing is trained and nothing in the pipeline is patched; it is called where it would have called its network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import torch

from tropism import catalog, pictures
from tropism.base import Prompts, Reward
from tropism.config import BadInput
from tropism.evaluate import deterministic
from tropism.rewards import as_reward
from tropism.steering import Guiding, Search, Trace, check_steerers, image_seeds, steer_policy
from tropism.steering_settings import made_steerers

if TYPE_CHECKING:
    from tropism.models.trainable import Trainable

Output = Literal["pil", "pt", "latent"]


def steer(
    pipe: Any,
    reward: Reward | Callable[..., Any],
    by: str | Search | Guiding | Sequence[Search | Guiding] = "fk",
    *,
    guidance_scale: float | None = None,
    batch_size: int = 16,
    **settings: Any,
) -> SteeredPipeline:
    """``pipe`` (a loaded diffusers pipeline of any family of ``tropism models``, or a model of this library) steered by
    ``reward`` (a Reward, or any function of images and prompts).

    ``by`` names steerers as the command does (fk, best-of-n, tfg+fk, ...), with their ``settings`` as keywords, or is
    made of settings of ``tropism.steering``. ``batch_size`` chains run at once; it never changes what is drawn. Raises
    BadInput (a ValueError) in one sentence for an unknown name, setting or value; ValueError for a pipeline of no known
    family.
    """
    steerers = build_steerers(by, settings) if isinstance(by, str) else _given(by, settings)
    return SteeredPipeline(catalog.wrap(pipe), as_reward(reward), steerers, guidance_scale, batch_size)


def build_steerers(text: str, settings: Mapping[str, Any]) -> list[Search | Guiding]:
    """The steerers that are named, each with those of ``settings`` that it has. Raises BadInput."""
    own = {each.name for kind in catalog.steerer_settings(text) for each in fields(kind)}
    if unknown := set(settings) - own:
        raise BadInput(f"{text} has no setting {min(unknown)}; wanted some of {', '.join(sorted(own))}")
    return made_steerers(text, settings)


def _given(by: Search | Guiding | Sequence[Search | Guiding], settings: Mapping[str, Any]) -> list[Search | Guiding]:
    if settings:
        raise BadInput(f"{', '.join(settings)} given beside steerers that are made already; set it there")
    made = list(by) if isinstance(by, Sequence) else [by]
    check_steerers(made)
    for each in made:
        each.check()
    return made


@dataclass
class SteeredPipeline:
    """Made by ``steer``. ``trace`` is what the last call cost and decided."""

    model: Trainable
    reward: Reward
    steerers: Sequence[Search | Guiding]
    guidance_scale: float | None = None
    batch_size: int = 16
    trace: Trace | None = None

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        seed: int = 0,
        output_type: Output = "pil",
        **columns: Sequence[Any],
    ) -> Any:
        """The pipeline's own kind of output, with ``trace`` besides: B prompts x ``num_images_per_prompt`` pictures,
        those of a prompt together, as PIL pictures, "pt" (N, 3, H, W) in [0, 1] or "latent".

        Image i is drawn from (seed, i). ``columns`` (a value a prompt) reach the reward by name. Raises ValueError.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or num_images_per_prompt < 1:
            raise ValueError(f"{len(prompts)} prompts and num_images_per_prompt {num_images_per_prompt}; wanted some")
        steps = self.model.steps if num_inference_steps is None else num_inference_steps
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        policy = deterministic(self.model, steps, scale, self.batch_size)
        rows = torch.arange(len(prompts)).repeat_interleave(num_images_per_prompt)
        repeated = {name: [values[row] for row in rows.tolist()] for name, values in columns.items()}
        asked = Prompts([prompts[row] for row in rows.tolist()], rows, repeated)
        found, self.trace = steer_policy(policy, self.reward, asked, self.steerers, image_seeds(len(rows), seed))
        output = self.model.output(
            found.latents if output_type == "latent" else self._shown(policy, found, output_type)
        )
        output.trace = self.trace
        return output

    def _shown(self, policy: Any, found: Any, kind: str) -> Any:
        images = policy.decode(found.latents)
        return images if kind == "pt" else [pictures.to_image(each) for each in images]
