"""Latent consistency models (Luo et al. 2023, 2310.04378; diffusers' ``LatentConsistencyModelPipeline``).

A Stable Diffusion UNet that answers with the clean sample in one to eight moves and takes guidance as an input. The
same UNet, or an LCM-LoRA that was merged, in the pipelines of Stable Diffusion and SDXL is known by their
``LCMScheduler``. A move noises the answer again: with DDPO that draw is the action, which is RLCM (2404.03673).
"""

from __future__ import annotations

from typing import Any

from tropism.models.latent_pipeline import FEW_STEPS, About, is_consistency
from tropism.models.stable_diffusion import StableDiffusion


class LatentConsistency(StableDiffusion):
    """``cond`` as of Stable Diffusion."""

    about = About(
        "LCM; SD and SDXL with LCMScheduler",
        "consistency function on a DDPM table",
        "an input (or none)",
        "1 to 8",
        "all but distill-samples, flow-grpo, raft, rwr, distillation",
    )
    default_guidance = 8.5
    default_steps = FEW_STEPS

    @classmethod
    def check(cls, pipe: Any) -> None:
        """As Stable Diffusion, with the scheduler and the input of an LCM."""
        super().check(pipe)
        if not is_consistency(pipe):
            raise ValueError(f"{type(pipe.scheduler).__name__} does not sample consistency models; wanted LCMScheduler")
        if pipe.unet.config.get("time_cond_proj_dim") is None:
            raise ValueError(
                "the unet takes no guidance; load it with StableDiffusionPipeline and LCMScheduler instead"
            )
