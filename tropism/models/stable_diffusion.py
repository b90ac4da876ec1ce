"""Stable Diffusion 1.x and 2.x (diffusers' ``StableDiffusionPipeline``): a UNet for eps, v or x0 on a DDPM table.

Whatever scheduler the pipeline carries, its noise table and timesteps are those of ``DDIMScheduler.from_config`` of its
config: betas, final level, spacing, offset and zero terminal SNR are honoured, multistep solvers are not imitated.
Departure: between non-neighbouring timesteps ("linspace", or "trailing" with steps that do not divide the table)
diffusers' DDIM steps to another level than it evaluates next, ``grid`` does not (see ``schedules.table_grid``).
"""

from __future__ import annotations

from typing import Any

from diffusers import DDIMScheduler
from torch import Tensor, nn

from tropism.base import Cond
from tropism.denoisers import NetDenoiser, Target
from tropism.models.latent_pipeline import LatentPipeline
from tropism.schedules import DDPMTable, table_grid

TARGETS: dict[str, Target] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


class StableDiffusion(LatentPipeline):
    """``cond`` is {"prompt_embeds": (B, tokens, width)}, in the text encoder's dtype."""

    part = "unet"
    default_guidance = 7.5
    default_steps = 50
    attention_targets = ("to_q", "to_k", "to_v", "to_out.0")
    feed_forward_targets = ("ff.net.0.proj", "ff.net.2")

    @staticmethod
    def check(pipe: Any) -> None:
        """A text-to-image UNet without guidance embedding, and a scheduler with betas that does not clip latents."""
        unet, scheduler = pipe.unet.config, pipe.scheduler.config
        if unet.in_channels != pipe.vae.config.latent_channels:
            raise ValueError(
                f"the unet takes {unet.in_channels} channels; wanted the vae's {pipe.vae.config.latent_channels}"
            )
        if unet.get("time_cond_proj_dim") is not None:
            raise ValueError("the unet takes guidance as an input, as a distilled LCM; wanted one that does not")
        if not hasattr(pipe.scheduler, "alphas_cumprod"):
            raise ValueError(
                f"{type(pipe.scheduler).__name__} has no betas; wanted DDIM, PNDM or another DDPM scheduler"
            )
        if scheduler.get("prediction_type", "epsilon") not in TARGETS:
            raise ValueError(f"prediction_type is {scheduler['prediction_type']!r}; wanted one of {', '.join(TARGETS)}")
        if scheduler.get("clip_sample", False) or scheduler.get("thresholding", False):
            raise ValueError("the scheduler clips latents; set clip_sample and thresholding to False in its config")

    def _build_denoiser(self) -> NetDenoiser:
        self._ddim = DDIMScheduler.from_config(self.pipe.scheduler.config)  # type: ignore[no-untyped-call]
        table = self._ddim.alphas_cumprod.float().clone()
        schedule = DDPMTable(table, float(self._ddim.final_alpha_cumprod))
        return NetDenoiser(self.net, schedule, TARGETS[self._ddim.config.prediction_type])

    def _predict(self, net: nn.Module, x: Tensor, tau: Tensor, cond: Cond) -> Tensor:
        output: Tensor = net(x, tau, encoder_hidden_states=cond["prompt_embeds"], return_dict=False)[0]
        return output

    def _encode(self, prompts: list[str]) -> dict[str, Tensor]:
        return {"prompt_embeds": self.pipe.encode_prompt(prompts, self.device, 1, False)[0]}

    def grid(self, steps: int) -> Tensor:
        """(steps + 1,) times of the scheduler's timesteps, then 0. Raises ValueError when they leave the table."""
        config = self._ddim.config
        spacing, offset = config.timestep_spacing, config.steps_offset
        return table_grid(config.num_train_timesteps, steps, spacing, offset)
