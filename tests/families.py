"""One row a family: a tiny pipeline, and what its own ``pipe(...)`` is called with so that it draws without chance."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import tiny
import torch
from diffusers import (
    AnimateDiffPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FluxPipeline,
    LCMScheduler,
)

from tropism.models.latent_pipeline import LatentPipeline
from tropism.models.pipelines import wrap_pipeline
from tropism.policy import Policy
from tropism.samplers import solver

HOPS = ("lasro", "rlcm")  # methods for consistency models


@dataclass(frozen=True)
class Row:
    """``guidance`` is None for the pipeline's default; ``call`` are further arguments of ``pipe(...)``."""

    build: Callable[[], Any]
    steps: int = 4
    guidance: float | None = None
    call: Mapping[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ("flow-grpo", *HOPS, "scm")  # methods that do not suit
    peft: bool = False  # no loader of diffusers reads its LoRA

    def model(self, **options: Any) -> LatentPipeline:
        """Wrapped, with images of 16 x 16."""
        return wrap_pipeline(self.build(), image_size=(tiny.IMAGE_SIZE, tiny.IMAGE_SIZE), **options)


def with_scheduler(build: Callable[[], Any], scheduler: Callable[..., Any], **config: Any) -> Callable[[], Any]:
    """The pipeline with another scheduler of the same betas."""

    def built() -> Any:
        pipe = build()
        kept = ("beta_start", "beta_end", "beta_schedule", "prediction_type")
        betas = {name: pipe.scheduler.config[name] for name in kept}
        pipe.scheduler = scheduler(**{**betas, **config})
        return pipe

    return built


def v_sd() -> Any:
    return tiny.sd_pipeline(prediction_type="v_prediction")


def v_sdxl() -> Any:
    return tiny.sdxl_pipeline(zeros=False, prediction_type="v_prediction")


def schnell() -> Any:
    return tiny.flux_pipeline(guidance=False)


def v_clips() -> Any:
    return tiny.animatediff_pipeline(prediction_type="v_prediction")


def sigma() -> Any:
    return tiny.pixart_pipeline(sigma=True)


def told_sdxl() -> Any:
    return tiny.sdxl_pipeline(unet={"time_cond_proj_dim": 8})


def turbo(build: Callable[[], Any]) -> Callable[[], Any]:
    return with_scheduler(build, EulerDiscreteScheduler, timestep_spacing="trailing", steps_offset=1)


clips = {"num_frames": tiny.FRAMES}
CONSISTENCY = ("distill-samples", "flow-grpo", "raft", "rwr", "distillation")
PIXART = {"use_resolution_binning": False, "clean_caption": False}
LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
DPM1 = {"solver_order": 1, "timestep_spacing": "linspace"}
ROWS = {
    "sd": Row(v_sd, call={"eta": 0.0}),
    "sd-turbo": Row(turbo(tiny.sd_pipeline), 4, 1.0),
    "sd-turbo-1": Row(turbo(tiny.sd_pipeline), 1, 1.0),
    "lcm": Row(tiny.lcm_pipeline, 4, without=CONSISTENCY),
    "lcm-1": Row(tiny.lcm_pipeline, 1, 3.0, without=CONSISTENCY),
    "lcm-lora": Row(with_scheduler(tiny.sd_pipeline, LCMScheduler), 4, 1.5, without=CONSISTENCY),
    "sdxl": Row(tiny.sdxl_pipeline, call={"eta": 0.0}),
    "sdxl-v-empty": Row(v_sdxl, call={"eta": 0.0}),
    "sdxl-euler": Row(with_scheduler(tiny.sdxl_pipeline, EulerDiscreteScheduler, **LEADING)),
    "sdxl-turbo": Row(turbo(tiny.sdxl_pipeline), 2, 1.0),
    "sdxl-lcm": Row(with_scheduler(told_sdxl, LCMScheduler), 4, 8.0, without=CONSISTENCY),
    "sd3": Row(tiny.sd3_pipeline, without=HOPS),
    "flux-dev": Row(tiny.flux_pipeline, without=HOPS),
    "flux-dev-low": Row(tiny.flux_pipeline, 4, 1.0, without=HOPS),
    "flux-schnell": Row(schnell, 4, without=HOPS),
    "flux-schnell-cfg": Row(schnell, 4, 3.0, call={"negative_prompt": ["", ""]}, without=HOPS),
    "pixart-alpha": Row(tiny.pixart_pipeline, call=PIXART, peft=True),
    "pixart-sigma": Row(sigma, call=PIXART, peft=True),
    "sd-dpm": Row(with_scheduler(v_sd, DPMSolverMultistepScheduler, solver_order=1, timestep_spacing="leading")),
    "animatediff": Row(v_clips, call={"eta": 0.0, "num_frames": tiny.FRAMES}),
    "animatediff-lcm": Row(with_scheduler(v_clips, LCMScheduler), 4, 1.5, clips, without=CONSISTENCY),
    "pixart-dpm": Row(with_scheduler(sigma, DPMSolverMultistepScheduler, **DPM1), call=PIXART, peft=True),
}  # fmt: skip
MAIN = ("sd", "animatediff", "lcm", "sdxl", "sd3", "flux-dev", "flux-schnell", "pixart-alpha")


def ours(row: Row, model: LatentPipeline) -> torch.Tensor:
    """Pictures of the house's chain from ``tiny.noise(2)``."""
    policy = Policy(model, solver(model.denoiser), row.steps, row.guidance)
    with torch.no_grad():
        x = start_of(model.pipe)
        *_, last = policy.chain(x, model.encode(tiny.PROMPTS), torch.Generator().manual_seed(3))
        return model.decode(last.x_next)


def theirs(row: Row, pipe: Any) -> torch.Tensor:
    """Pictures of ``pipe(...)`` itself from the same noise, and the same later noise where it draws some."""
    latents = start_of(pipe)
    options = dict(row.call)
    if isinstance(pipe, FluxPipeline):
        latents = pipe._pack_latents(latents, *latents.shape)
    if row.guidance is not None:
        options["true_cfg_scale" if "negative_prompt" in options else "guidance_scale"] = row.guidance
    drawn = pipe(
        tiny.PROMPTS,
        latents=latents / start(pipe, row.steps),
        num_inference_steps=row.steps,
        height=tiny.IMAGE_SIZE,
        width=tiny.IMAGE_SIZE,
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
        **options,
    )
    if isinstance(pipe, AnimateDiffPipeline):  # (B, F, 3, H, W), as a film strip
        return torch.cat(list(drawn.frames.unbind(1)), dim=3)
    images: torch.Tensor = drawn.images
    return images


def start_of(pipe: Any) -> torch.Tensor:
    """(2, 4, 8, 8) noise, the same for every pipeline; of clips (2, 4, F, 8, 8)."""
    if not isinstance(pipe, AnimateDiffPipeline):
        return tiny.noise(2)
    return torch.stack([tiny.noise(2, seed) for seed in range(tiny.FRAMES)], dim=2)


def start(pipe: Any, steps: int) -> float:
    """The standard deviation that diffusers' Euler schedulers start from, in units where the house starts from 1."""
    if not isinstance(pipe.scheduler, EulerDiscreteScheduler):
        return 1.0
    pipe.scheduler.set_timesteps(steps)
    level = float(pipe.scheduler.init_noise_sigma)
    top = float(pipe.scheduler.sigmas[0])
    return level / math.sqrt(top**2 + 1)
