"""SDXL (diffusers' ``StableDiffusionXLPipeline``): a UNet told the prompt twice, and sizes in pixels.

Original and target size are those of the image and the crop starts at 0, as in the pipeline when it is told none. The
empty prompt is zeros where the pipeline's config says so (``force_zeros_for_empty_prompt``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tropism.base import Cond
from tropism.models.latent_pipeline import NO_FLOW, About
from tropism.models.stable_diffusion import StableDiffusion


class StableDiffusionXL(StableDiffusion):
    """``cond`` is {"prompt_embeds": (B, tokens, width), "pooled": (B, pooled width)}, in the encoders' dtype."""

    about = About("SDXL, SDXL Turbo", "eps or v on a DDPM table", "classifier-free", "50; Turbo 1 to 4", NO_FLOW)
    default_guidance = 5.0
    added = "text_time"

    @classmethod
    def check(cls, pipe: Any) -> None:
        """As Stable Diffusion, with both text encoders and six numbers for sizes; the refiner has neither."""
        if pipe.text_encoder is None:
            raise ValueError("the pipeline has no first text encoder, as SDXL's refiner; wanted the base model")
        super().check(pipe)
        wanted = 6 * pipe.unet.config.addition_time_embed_dim + pipe.text_encoder_2.config.projection_dim
        found = pipe.unet.config.projection_class_embeddings_input_dim
        if found != wanted:
            raise ValueError(
                f"the unet is told {found} numbers besides the prompt; wanted {wanted}, as SDXL's base model"
            )

    def _added(self, x: Tensor, cond: Cond) -> dict[str, Any]:
        factor = self.pipe.vae_scale_factor
        height, width = x.shape[2] * factor, x.shape[3] * factor
        sizes = x.new_tensor([height, width, 0, 0, height, width]).expand(len(x), 6)
        return {"text_embeds": cond["pooled"], "time_ids": sizes}

    def _encode(self, prompts: list[str]) -> dict[str, Tensor]:
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": embeds, "pooled": pooled}

    def null(self) -> Cond:
        """One row: the negative prompt, or zeros where there is none and the pipeline says so."""
        row = super().null()
        if self.negative_prompt or not self.pipe.config.force_zeros_for_empty_prompt:
            return row
        return {name: torch.zeros_like(value) for name, value in row.items()}

    def decode(self, latents: Tensor) -> Tensor:
        """As every pipeline; a decoder that overflows in float16 becomes float32 here, and stays it."""
        if self.pipe.vae.dtype == torch.float16 and self.pipe.vae.config.force_upcast:
            self.pipe.vae.to(torch.float32)
        return super().decode(latents)

    def _decode_input(self, latents: Tensor) -> Tensor:
        config = self.pipe.vae.config
        if config.get("latents_mean") is None or config.get("latents_std") is None:
            return super()._decode_input(latents)
        mean, std = (latents.new_tensor(config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
        return super()._decode_input(latents * std) + mean
