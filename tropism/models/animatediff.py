"""AnimateDiff (Guo et al. 2024, 2307.04725; diffusers' ``AnimateDiffPipeline``): a Stable Diffusion UNet with motion
modules, temporal transformers that see one place of all frames at a time.

A clip is one sample: its latents are (C, F, h, w), and its picture is a film strip, the F frames side by side, the
first at the left. So whatever takes pictures takes clips: grids and reports, rewards that look at pixels, files of
pictures. What knows frames cuts the strip.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tropism.base import WORDS, Cond
from tropism.models.adapters import LORA_FILE, Lora
from tropism.models.latent_pipeline import NO_FLOW, About
from tropism.models.motion import FOLDER, Motion, SpatialLora, spatial_lora
from tropism.models.stable_diffusion import StableDiffusion

USUAL_FRAMES = 16  # of a call of the pipeline


class AnimateDiff(StableDiffusion):
    """``cond`` as of Stable Diffusion, one row a clip. A LoRA adapts the image model, ``train_motion`` the rest.

    ``frames`` is 16, or as many as the motion modules have positions for, if those are fewer.
    """

    about = About(
        "AnimateDiff: clips as film strips",
        "eps, v or x0 of F frames on a DDPM table",
        "classifier-free",
        "50; AnimateLCM 4",
        NO_FLOW,
    )
    frame_axis = 2  # of latents (B, ...)

    @classmethod
    def check(cls, pipe: Any) -> None:
        """As Stable Diffusion, with motion modules that take no picture besides."""
        adapter = getattr(pipe, "motion_adapter", None)
        if adapter is None:
            raise ValueError("the pipeline has no motion_adapter; wanted the motion modules of a clip model")
        if adapter.config.get("conv_in_channels"):
            raise ValueError("the motion_adapter takes a picture besides (PIA); wanted one that takes text only")
        super().check(pipe)

    @property
    def frames(self) -> int:
        """Of a clip."""
        return min(USUAL_FRAMES, int(self.pipe.motion_adapter.config.motion_max_seq_length))

    def _latent_shape(self, image_size: tuple[int, int] | None) -> tuple[int, ...]:
        channels, *cells = super()._latent_shape(image_size)
        return channels, self.frames, *cells

    def shared_attention(self, *args: Any, **kwargs: Any) -> Any:
        """Raises ValueError: rows of its attention are frames and places, not samples."""
        raise ValueError("the attention of a clip model cannot be shared; set cross_share and self_share to 0")

    def _predict(self, net: nn.Module, x: Tensor, tau: Tensor, cond: Cond) -> Tensor:
        told = {**cond, WORDS: cond[WORDS].repeat_interleave(x.shape[2], 0)}
        return super()._predict(net, x, tau, told)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, F, h, w) -> film strips (B, 3, H, F * W) in [0, 1], float32; keeps the graph."""
        count, _, frames = latents.shape[:3]
        pictures: Tensor = super().decode(latents.transpose(1, 2).flatten(0, 1)).unflatten(0, (count, frames))
        return pictures.permute(0, 2, 3, 1, 4).flatten(3)

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """Film strips (B, 3, H, F * W) in [0, 1] -> (B, C, F, h, w). Raises ValueError for another size or F."""
        frames, *cells = self.latent_shape[1:]
        height, width = (cell * int(self.pipe.vae_scale_factor) for cell in cells)
        if tuple(images.shape[2:]) != (height, frames * width):
            raise ValueError(
                f"strips of {tuple(images.shape[2:])} pixels do not hold this model's {frames} frames of {height} x "
                f"{width}; wanted ({height}, {frames * width}), the frames side by side"
            )
        pictures = images.unflatten(3, (frames, width)).permute(0, 3, 1, 2, 4).flatten(0, 1)
        latents: Tensor = self._encoded(self._vae_latents(pictures)).unflatten(0, (len(images), frames))
        return latents.transpose(1, 2)

    def output(self, images: Any) -> Any:
        """Clips as frames: of film strips (B, 3, H, F * W), or B pictures, (B, F, 3, H, W), or B lists of F."""
        frames = self.latent_shape[1]
        if isinstance(images, Tensor):
            clips: Any = images if images.ndim > 4 else images.unflatten(3, (frames, -1)).permute(0, 3, 1, 2, 4)
            return super().output(clips)
        width = images[0].width // frames
        boxes = [(place * width, 0, (place + 1) * width, images[0].height) for place in range(frames)]
        return super().output([[strip.crop(box) for box in boxes] for strip in images])

    # What is trained.

    def _lora_kind(self) -> type[Lora]:
        return SpatialLora

    def train_motion(self, spatial: str | Path | None = None) -> None:
        """Trains the motion modules alone, beside the LoRA of the image model in the folder ``spatial``, frozen.

        ``reference`` is the model without that LoRA, as it was. Raises ValueError, before anything changes, when
        something is trained already, and for a folder without a LoRA that fits the image model.
        """
        self._check_untrained()
        lora = None if spatial is None else spatial_lora(Path(spatial), self.part)
        self._train(Motion(self.pipe, self.part, lora))

    @property
    def has_spatial(self) -> bool:
        """Whether motion modules are trained beside a LoRA of the image model."""
        return isinstance(self._trained, Motion) and self._trained.has_spatial

    def spatial(self, share: float) -> Any:
        """A context inside which the LoRA of the image model counts for ``share`` of itself."""
        if not isinstance(self._trained, Motion):
            raise ValueError("no motion modules are trained here; call train_motion first")
        return self._trained.spatial(share)

    def load_adapter(self, folder: str | Path) -> None:
        """Also of motion modules, with the LoRA beside them."""
        place = Path(folder)
        if self._trained is None and (place / FOLDER).is_dir():
            self.train_motion(place if (place / LORA_FILE).is_file() else None)
        super().load_adapter(place)

    def use(self, base: str, adapter: str, full: bool, prompt: str) -> list[str]:
        """As of any pipeline, but for motion modules, and for the file, which moves."""
        lines = super().use(base, adapter, full, prompt)
        lines[-1] = lines[-1].replace('.images[0].save("image.png")', '.frames[0], "clip.gif")')
        lines[-1] = "export_to_gif(" + lines[-1].replace("num_inf", f"num_frames={self.frames}, num_inf")
        lines[0] += "\nfrom diffusers.utils import export_to_gif"
        if isinstance(self._trained, Motion):
            lines[0] += "\nfrom diffusers import MotionAdapter"
            motion = f'pipe.unet.load_motion_modules(MotionAdapter.from_pretrained("{adapter}/{FOLDER}"))'
            lines.insert(-1, motion)
        if isinstance(self._trained, Motion) and not self._trained.has_spatial:
            lines = [line for line in lines if "load_lora_weights" not in line]
        return "\n".join(lines).split("\n")
