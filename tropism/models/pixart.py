"""PixArt-alpha and PixArt-sigma (diffusers' ``PixArtAlphaPipeline``, ``PixArtSigmaPipeline``): a transformer for eps.

Half of what the transformer says is a variance that nobody samples with, and is cut off. The image's size and aspect
are told where the transformer wants them (alpha at 1024 pixels). Prompts are lower-cased and stripped as the pipeline
does without ``clean_caption``, whose cleaning depends on what else is installed; images are never binned to a list of
resolutions. No pipeline loader reads a LoRA of PixArt: it is saved for PEFT.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tropism.base import Cond
from tropism.models.ddpm_pipeline import DDPMPipeline
from tropism.models.latent_pipeline import NO_FLOW, About
from tropism.models.phrases import token_phrases


class PixArt(DDPMPipeline):
    """``cond`` is {"prompt_embeds": (B, tokens, width), "prompt_mask": (B, tokens)}, 0 where there is no token."""

    about = About("PixArt-alpha, PixArt-sigma", "eps on a DDPM table", "classifier-free", "20", NO_FLOW, "PEFT")
    part = "transformer"
    default_guidance = 4.5
    default_steps = 20
    attention_targets = ("to_q", "to_k", "to_v", "to_out.0")
    feed_forward_targets = ("ff.net.0.proj", "ff.net.2")

    @classmethod
    def check(cls, pipe: Any) -> None:
        """A transformer that says eps, with or without a variance, and a scheduler as the table wants it."""
        transformer = pipe.transformer.config
        if transformer.in_channels != pipe.vae.config.latent_channels:
            raise ValueError(
                f"the transformer takes {transformer.in_channels} channels; wanted the vae's "
                f"{pipe.vae.config.latent_channels}"
            )
        if transformer.out_channels not in (transformer.in_channels, 2 * transformer.in_channels):
            raise ValueError(
                f"the transformer says {transformer.out_channels} channels; wanted {transformer.in_channels}, or twice "
                "that with a variance"
            )
        super().check(pipe)

    def _predict(self, net: nn.Module, x: Tensor, tau: Tensor, cond: Cond) -> Tensor:
        output: Tensor = net(
            x,
            encoder_hidden_states=cond["prompt_embeds"],
            encoder_attention_mask=cond["prompt_mask"],
            timestep=tau,
            added_cond_kwargs=self._size(net, x),
            return_dict=False,
        )[0]
        return output[:, : x.shape[1]]

    def _size(self, net: Any, x: Tensor) -> dict[str, Tensor | None]:
        if not net.use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        height, width = (length * self.pipe.vae_scale_factor for length in x.shape[2:])
        resolution, aspect = x.new_tensor([[height, width]]), x.new_tensor([[height / width]])
        return {"resolution": resolution.expand(len(x), 2), "aspect_ratio": aspect.expand(len(x), 1)}

    def _encode(self, prompts: list[str]) -> dict[str, Tensor]:
        embeds, mask, _, _ = self.pipe.encode_prompt(prompts, False, device=self.device)
        return {"prompt_embeds": embeds, "prompt_mask": mask}

    def phrases(self, prompts: Any) -> Tensor:
        """(B, L) int64: the phrase of each of T5's tokens, -1 for none (end, padding)."""
        return token_phrases(self.pipe.tokenizer, prompts, self.encode(prompts)["prompt_embeds"].shape[1])
