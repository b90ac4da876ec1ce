"""What the pipelines on a straight path share: their scheduler, and the shift of its levels with the image's size."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

from tropism.base import Denoiser
from tropism.denoisers import NetDenoiser
from tropism.models.latent_pipeline import LatentPipeline
from tropism.schedules import RectifiedFlow

UNSUPPORTED = (
    "invert_sigmas",
    "shift_terminal",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "stochastic_sampling",
)


class FlowPipeline(LatentPipeline):
    """A transformer for eps - x0."""

    part = "transformer"
    attention_targets = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
    )

    @classmethod
    def check(cls, pipe: Any) -> None:
        """A scheduler that walks the straight path by Euler steps on shifted levels."""
        config = pipe.scheduler.config
        if type(pipe.scheduler).__name__ != "FlowMatchEulerDiscreteScheduler":
            raise ValueError(
                f"{type(pipe.scheduler).__name__} is not supported; wanted FlowMatchEulerDiscreteScheduler"
            )
        chosen = [name for name in UNSUPPORTED if config.get(name)]
        if config.get("use_dynamic_shifting") and config.get("time_shift_type") == "linear":
            chosen.append("time_shift_type")
        if chosen:
            raise ValueError(f"the scheduler config sets {chosen}; wanted levels shifted by shift or by image size")

    @abstractmethod
    def _patches(self) -> int:
        """Of an image."""

    def _build_denoiser(self) -> Denoiser:
        config = self.pipe.scheduler.config
        shift = math.exp(self._mu()) if config.get("use_dynamic_shifting") else float(self.pipe.scheduler.shift)
        self._schedule = RectifiedFlow(shift, config.num_train_timesteps)
        return NetDenoiser(self.net, self._schedule, "flow", takes_guidance=self.takes_guidance(self.pipe))

    def _mu(self) -> float:
        """The logarithm of the shift at this image size: linear in the number of patches between two anchors."""
        config = self.pipe.scheduler.config
        few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        return float(low + (high - low) * (self._patches() - few) / (many - few))
