"""FLUX.1 (diffusers' ``FluxPipeline``): a transformer for eps - x0 on 2 x 2 patches of the latent.

``dev`` takes guidance as an input, ``schnell`` takes none; classifier-free guidance of ``schnell`` (off unless asked
for) is what the pipeline calls ``true_cfg_scale`` with an empty negative prompt. Latents stay (B, 16, h, w) here, and
are packed into patches around the network: a permutation, so that noise, moves and densities are the pipeline's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tropism.base import Cond
from tropism.denoisers import TOLD
from tropism.models.flow_pipeline import FlowPipeline
from tropism.models.latent_pipeline import ALL, FEW_STEPS, About
from tropism.models.phrases import token_phrases
from tropism.schedules import flow_grid

PATCH = 2


class Flux(FlowPipeline):
    """``cond`` is {"prompt_embeds": (B, tokens, width) by T5, "pooled": (B, pooled width) by CLIP}."""

    about = About("FLUX.1 dev, schnell", "flow (eps - x0)", "an input (dev), none (schnell)", "28; schnell 4", ALL)
    default_guidance = 3.5
    default_steps = 28
    feed_forward_targets = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp")

    @classmethod
    def check(cls, pipe: Any) -> None:
        """A transformer for text to image, and a scheduler as a flow wants it."""
        taken, wanted = pipe.transformer.config.in_channels, PATCH**2 * pipe.vae.config.latent_channels
        if taken != wanted:
            raise ValueError(
                f"the transformer takes {taken} channels; wanted {wanted}, four cells of the vae's latent, as for text "
                "to image (Fill, Depth and Canny take a picture as well)"
            )
        super().check(pipe)

    @classmethod
    def takes_guidance(cls, pipe: Any) -> bool:
        """Whether the transformer is told the guidance, as dev's."""
        return bool(pipe.transformer.config.guidance_embeds)

    @classmethod
    def defaults(cls, pipe: Any) -> tuple[float, int]:
        """As the pipeline; of schnell as it was published."""
        return super().defaults(pipe) if cls.takes_guidance(pipe) else (1.0, FEW_STEPS)

    def _latent_shape(self, image_size: tuple[int, int] | None) -> tuple[int, int, int]:
        usual = int(self.pipe.default_sample_size)
        return self.pipe.vae.config.latent_channels, *self._cells(image_size, (usual, usual), PATCH)

    def _patches(self) -> int:
        return (self.latent_shape[1] // PATCH) * (self.latent_shape[2] // PATCH)

    def _predict(self, net: nn.Module, x: Tensor, tau: Tensor, cond: Cond) -> Tensor:
        rows, columns = x.shape[2] // PATCH, x.shape[3] // PATCH
        told = cond.get(TOLD, torch.full(x.shape[:1], self.guidance_scale, device=x.device))
        patches: Tensor = net(
            hidden_states=F.pixel_unshuffle(x, PATCH).flatten(2).transpose(1, 2),
            timestep=tau / self._schedule.num_train_timesteps,
            guidance=told if self.takes_guidance(self.pipe) else None,
            pooled_projections=cond["pooled"],
            encoder_hidden_states=cond["prompt_embeds"],
            txt_ids=x.new_zeros(cond["prompt_embeds"].shape[1], 3),
            img_ids=_places(rows, columns).to(x),
            return_dict=False,
        )[0]
        return F.pixel_shuffle(patches.transpose(1, 2).unflatten(2, (rows, columns)), PATCH)

    def _encode(self, prompts: list[str]) -> dict[str, Tensor]:
        embeds, pooled, _ = self.pipe.encode_prompt(prompts, None, device=self.device)
        return {"prompt_embeds": embeds, "pooled": pooled}

    def phrases(self, prompts: Any) -> Tensor:
        """(B, L) int64: the phrase of each of T5's tokens, -1 for none (end, padding)."""
        return token_phrases(self.pipe.tokenizer_2, prompts, self.encode(prompts)["prompt_embeds"].shape[1])

    def _decode_input(self, latents: Tensor) -> Tensor:
        return super()._decode_input(latents) + float(self.pipe.vae.config.shift_factor)

    def _own_grid(self, steps: int) -> Tensor:
        """(steps + 1,): even levels from 1 to 1 / steps, shifted, then 0."""
        return flow_grid(steps, self._schedule.shift, 1 / steps, self._schedule.num_train_timesteps)


def _places(rows: int, columns: int) -> Tensor:
    """(rows * columns, 3): 0, the row and the column of every patch, for its rotary embedding."""
    return torch.cartesian_prod(torch.zeros(1), torch.arange(rows).float(), torch.arange(columns).float())
