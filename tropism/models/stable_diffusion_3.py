"""Stable Diffusion 3 and 3.5 (diffusers' ``StableDiffusion3Pipeline``): a transformer for eps - x0 on a straight path.

Without a third text encoder diffusers appends ``max_sequence_length`` (256) rows of zeros where T5's tokens would be,
and so does this, because the pipeline itself encodes. On a CPU they are computed once: see ``joint_attention``.
"""

from __future__ import annotations

from torch import Tensor, nn

from tropism.base import Cond
from tropism.models.flow_pipeline import FlowPipeline
from tropism.models.joint_attention import equal_at_the_end, merges_context
from tropism.models.latent_pipeline import ALL, About
from tropism.schedules import flow_grid


class StableDiffusion3(FlowPipeline):
    """``cond`` is {"prompt_embeds": (B, tokens, width), "pooled": (B, pooled width)}, in the text encoders' dtype."""

    about = About("Stable Diffusion 3, 3.5", "flow (eps - x0)", "classifier-free", "28", ALL)
    default_guidance = 7.0
    default_steps = 28
    feed_forward_targets = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")

    def _patches(self) -> int:
        patch = int(self.pipe.transformer.config.patch_size)
        return (self.latent_shape[1] // patch) * (self.latent_shape[2] // patch)

    def _predict(self, net: nn.Module, x: Tensor, tau: Tensor, cond: Cond) -> Tensor:
        context = cond["prompt_embeds"]
        repeats = equal_at_the_end(context) if merges_context(net) else 1
        output: Tensor = net(
            hidden_states=x,
            timestep=tau,
            encoder_hidden_states=context[:, : context.shape[1] - repeats + 1],
            pooled_projections=cond["pooled"],
            joint_attention_kwargs={"repeats": repeats} if repeats > 1 else None,
            return_dict=False,
        )[0]
        return output

    def _encode(self, prompts: list[str]) -> dict[str, Tensor]:
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompts, None, None, device=self.device, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": embeds, "pooled": pooled}

    def _decode_input(self, latents: Tensor) -> Tensor:
        return super()._decode_input(latents) + float(self.pipe.vae.config.shift_factor)

    def _own_grid(self, steps: int) -> Tensor:
        """(steps + 1,) levels of the scheduler, from 1 to 0; the last above 0 is shifted twice, as in diffusers."""
        last = float(self.pipe.scheduler.sigma_min)
        return flow_grid(steps, self._schedule.shift, last, self._schedule.num_train_timesteps)
