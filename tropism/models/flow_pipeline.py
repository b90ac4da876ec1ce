"""What the pipelines on a straight path share: their scheduler, and the shift of its levels with the image's size."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler
from torch import Tensor

from tropism.base import Denoiser, Hops
from tropism.denoisers import ConsistencyDenoiser, NetDenoiser
from tropism.models.latent_pipeline import LatentPipeline, is_consistency
from tropism.schedules import RectifiedFlow, flow_grid

SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler")
UNSUPPORTED = (
    "invert_sigmas",
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
        if type(pipe.scheduler).__name__ not in SCHEDULERS:
            raise ValueError(f"{type(pipe.scheduler).__name__} is not supported; wanted {' or '.join(SCHEDULERS)}")
        chosen = [name for name in UNSUPPORTED if config.get(name)]
        if config.get("use_dynamic_shifting") and config.get("time_shift_type") == "linear":
            chosen.append("time_shift_type")
        if config.get("shift_terminal") and (config.get("use_dynamic_shifting") or pipe.scheduler.shift != 1):
            chosen.append("shift_terminal")
        if chosen:
            raise ValueError(f"the scheduler config sets {chosen}; wanted levels shifted by shift or by image size")

    @abstractmethod
    def _patches(self) -> int:
        """Of an image."""

    def _build_denoiser(self) -> Denoiser:
        config = self.pipe.scheduler.config
        shift = math.exp(self._mu()) if config.get("use_dynamic_shifting") else float(self.pipe.scheduler.shift)
        self._schedule = RectifiedFlow(shift, config.num_train_timesteps)
        denoiser = NetDenoiser(self.net, self._schedule, "flow", takes_guidance=self.takes_guidance(self.pipe))
        return ConsistencyDenoiser(denoiser, None) if is_consistency(self.pipe) else denoiser

    @classmethod
    def few_step_scheduler(cls, scheduler: Any, hops: Hops, steps: int) -> Any:
        """Even levels: ``num_inference_steps=steps`` ends at 1 / steps, and diffusers has no other way to say so."""
        kind = FlowMatchLCMScheduler if hops == "consistency" else FlowMatchEulerDiscreteScheduler
        size = scheduler.config.num_train_timesteps
        return kind(num_train_timesteps=size, shift=1.0, shift_terminal=1 / steps if steps > 1 else None)

    def grid(self, steps: int) -> Tensor:
        """(steps + 1,) levels from 1 to 0: the scheduler's, or even ones of a pipeline that is made for few steps.

        Those are what diffusers walks for as many steps as it was made for. For another number give its scheduler
        another ``shift_terminal``, 1 / steps or for one step None: it stretches ``sigmas`` of its caller to that as
        well.
        """
        terminal = self.pipe.scheduler.config.get("shift_terminal")
        few = self.hops is not None or is_consistency(self.pipe) or terminal
        return flow_grid(steps, self._schedule.shift, 1 / steps) if few else self._own_grid(steps)

    @abstractmethod
    def _own_grid(self, steps: int) -> Tensor:
        """As the pipeline's own scheduler."""

    def _mu(self) -> float:
        """The logarithm of the shift at this image size: linear in the number of patches between two anchors."""
        config = self.pipe.scheduler.config
        few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        return float(low + (high - low) * (self._patches() - few) / (many - few))
