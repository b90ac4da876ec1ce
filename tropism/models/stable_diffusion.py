"""Stable Diffusion 1.x and 2.x (diffusers' ``StableDiffusionPipeline``): a UNet for eps, v or x0 on a DDPM table.

Distilled ones are of the same family: Turbo is this with trailing timesteps, one to four of them and no guidance, and a
UNet that takes guidance as an input, as LCM's, is told it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tropism.base import Cond
from tropism.denoisers import TOLD
from tropism.models.adapters import Full
from tropism.models.ddpm_pipeline import DDPMPipeline
from tropism.models.image_prompts import IMAGES, image_prompted
from tropism.models.latent_pipeline import NO_FLOW, About
from tropism.models.shared_attention import SharedAttention, aligned

TOLD_WIDTH = 256  # of the embedding of guidance, as in LCM


class StableDiffusion(DDPMPipeline):
    """``cond`` is {"prompt_embeds": (B, tokens, width)}, in the text encoder's dtype."""

    about = About(
        "Stable Diffusion 1.x, 2.x, Turbo",
        "eps, v or x0 on a DDPM table",
        "classifier-free",
        "50; Turbo 1 to 4",
        NO_FLOW,
    )
    part = "unet"
    default_guidance = 7.5
    default_steps = 50
    attention_targets = ("to_q", "to_k", "to_v", "to_out.0")
    feed_forward_targets = ("ff.net.0.proj", "ff.net.2")
    added: ClassVar[str | None] = None  # what the UNet is told besides the prompt

    @classmethod
    def check(cls, pipe: Any) -> None:
        """A text-to-image UNet, and a scheduler as the table wants it."""
        unet = pipe.unet.config
        if unet.in_channels != pipe.vae.config.latent_channels:
            raise ValueError(
                f"the unet takes {unet.in_channels} channels; wanted the vae's {pipe.vae.config.latent_channels}, "
                "as for text to image (inpainting and editing models take a picture as well)"
            )
        told = unet.get("class_embed_type") or unet.get("encoder_hid_dim_type") or unet.get("addition_embed_type")
        if told != cls.added:
            raise ValueError(f"the unet is told {told} besides the prompt; wanted {cls.added or 'nothing'}")
        super().check(pipe)

    @classmethod
    def takes_guidance(cls, pipe: Any) -> bool:
        """Whether the UNet is told the guidance, as LCM's."""
        return pipe.unet.config.get("time_cond_proj_dim") is not None

    def _predict(self, net: nn.Module, x: Tensor, tau: Tensor, cond: Cond) -> Tensor:
        output: Tensor = net(
            x,
            tau,
            encoder_hidden_states=cond["prompt_embeds"],
            timestep_cond=self._guidance(net, x, cond),
            added_cond_kwargs=self._added(x, cond) | {name: [cond[name]] for name in (IMAGES,) if name in cond},
            return_dict=False,
        )[0]
        return output

    def _guidance(self, net: Any, x: Tensor, cond: Cond) -> Tensor | None:
        """(B, width): the embedding of w - 1, which is what LCM calls the scale. None for a network without a place for
        it, as the reference of one that has learnt to be told."""
        size = net.config.get("time_cond_proj_dim")
        if size is None:
            return None
        w = cond.get(TOLD, torch.full(x.shape[:1], self.guidance_scale)).float().cpu()
        embedded: Tensor = self.pipe.get_guidance_scale_embedding(w - 1, embedding_dim=size)
        return embedded.to(x)

    @torch.no_grad()
    def features(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """x (B, ...), t (B,) -> (B, C, h, w) float32: what the middle of the UNet is given."""
        seen: list[Tensor] = []
        middle: Any = self._network().mid_block
        handle = middle.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
        try:
            self.denoiser(x, t, cond)
        finally:
            handle.remove()
        return seen[0].float()

    def shared_attention(
        self,
        before: Sequence[str],
        after: Sequence[str],
        cross_share: float,
        self_share: float,
        blend: float | None = None,
    ) -> SharedAttention:
        """How pictures of P captions are attended to while each is edited to another caption: while less than
        these shares of the moves is made, and with a threshold in (0, 1) for what may move."""
        told = dict(padding="max_length", max_length=self.pipe.tokenizer.model_max_length, truncation=True)
        old, new = (self.pipe.tokenizer(list(some), **told).input_ids for some in (before, after))
        return SharedAttention(self._network, aligned(old, new), cross_share, self_share, blend)

    def be_told(self) -> None:
        """The UNet gets ``time_embedding.cond_proj``, as diffusers builds it for ``time_cond_proj_dim``, of zeros.

        Raises ValueError unless the whole network is trained: a LoRA would not have it.
        """
        unet = self.pipe.unet
        if self.takes_guidance(self.pipe):
            return
        if not isinstance(self._trained, Full):
            raise ValueError(
                "a LoRA cannot hold the input by which a UNet is told its guidance; train it in full (full), or leave "
                "told out"
            )
        first = unet.time_embedding.linear_1
        told = nn.Linear(TOLD_WIDTH, first.in_features, bias=False, device="meta").to_empty(device=first.weight.device)
        nn.init.zeros_(told.weight)
        unet.time_embedding.cond_proj = told.to(first.weight.dtype)
        unet.register_to_config(time_cond_proj_dim=TOLD_WIDTH)
        self._trained.parameters.append(told.weight)
        self._twins.clear()

    def _added(self, x: Tensor, cond: Cond) -> dict[str, Any]:
        return {}

    def image_prompted(self, images: Sequence[Any], file: str | Path | None = None, *how: Any, **more: Any) -> Any:
        """This model, shown PIL pictures; see ``image_prompts.image_prompted``."""
        return image_prompted(self, images, file, *how, **more)

    def _encode(self, prompts: list[str]) -> dict[str, Tensor]:
        return {"prompt_embeds": self.pipe.encode_prompt(prompts, self.device, 1, False)[0]}
