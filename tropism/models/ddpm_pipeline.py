"""What the pipelines on a DDPM table share: the table, its timesteps, and consistency models distilled on it.

Whatever scheduler the pipeline carries, the noise table, the last level and the timesteps are that scheduler's (betas,
spacing, offset, zero terminal SNR), but multistep solvers are not imitated: the chain is DDIM's. So with DDIM, Euler,
or DPM-Solver++ of first order in the pipeline it is the pipeline's own. With ``LCMScheduler`` the network is a
consistency model.

Departures: between non-neighbouring timesteps ("linspace", or "trailing" with steps that do not divide the table)
diffusers' DDIM steps to another level than it evaluates next, ``grid`` does not (see ``schedules.table_grid``). Euler's
timesteps under "linspace" lie between entries of the table, here they are the nearest. Under "trailing" and "linspace"
diffusers' Euler schedulers start from noise of a standard deviation 0.2 % below 1; here noise is standard normal.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler, LCMScheduler
from torch import Tensor

from tropism.base import Denoiser, Hops
from tropism.denoisers import ConsistencyDenoiser, NetDenoiser, Target
from tropism.models.latent_pipeline import LatentPipeline, is_consistency
from tropism.schedules import DDPMTable, ladder_grid, table_grid

TARGETS: dict[str, Target] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
ONE_MORE = ("DPMSolverMulti", "DPMSolverSingle", "UniPC", "DEIS", "SASolver")  # divide the table by steps + 1
TABLE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
    "steps_offset",  # not used, but StableDiffusionPipeline warns of another than 1
)


class DDPMPipeline(LatentPipeline):
    """A network for eps, v or x0 on a DDPM table."""

    @classmethod
    def check(cls, pipe: Any) -> None:
        """A scheduler with betas that does not clip latents, for a known prediction."""
        scheduler = pipe.scheduler.config
        if not hasattr(pipe.scheduler, "alphas_cumprod"):
            raise ValueError(
                f"{type(pipe.scheduler).__name__} has no betas; wanted DDIM, PNDM or another DDPM scheduler"
            )
        if scheduler.get("prediction_type", "epsilon") not in TARGETS:
            raise ValueError(f"prediction_type is {scheduler['prediction_type']!r}; wanted one of {', '.join(TARGETS)}")
        if scheduler.get("clip_sample", False) or scheduler.get("thresholding", False):
            raise ValueError("the scheduler clips latents; set clip_sample and thresholding to False in its config")

    def _build_denoiser(self) -> Denoiser:
        scheduler, config = self.pipe.scheduler, self.pipe.scheduler.config
        table = scheduler.alphas_cumprod.float().clone().cpu()
        last = float(getattr(scheduler, "final_alpha_cumprod", 1.0))
        if config.get("final_sigmas_type", "zero") == "sigma_min":
            last = float(table[0])
        target = TARGETS[config.get("prediction_type", "epsilon")]
        denoiser = NetDenoiser(self.net, DDPMTable(table, last), target, takes_guidance=self.takes_guidance(self.pipe))
        return ConsistencyDenoiser(denoiser, float(config.timestep_scaling)) if is_consistency(self.pipe) else denoiser

    @classmethod
    def few_step_scheduler(cls, scheduler: Any, hops: Hops, steps: int) -> Any:
        """LCM's, or DDIM's from the last level of the table, on the same betas."""
        own = scheduler.config
        kept = {name: own[name] for name in TABLE if own.get(name) is not None}
        if hops == "consistency":
            return LCMScheduler(**kept, clip_sample=False)  # type: ignore[no-untyped-call]
        kept |= {"clip_sample": False, "timestep_spacing": "trailing", "set_alpha_to_one": True}
        return DDIMScheduler(**kept)  # type: ignore[no-untyped-call]

    def grid(self, steps: int) -> Tensor:
        """(steps + 1,) times of the scheduler's timesteps, then 0. Raises ValueError when they leave the table."""
        config = self.pipe.scheduler.config
        size, spacing = int(config.num_train_timesteps), config.get("timestep_spacing", "leading")
        offset = config.get("steps_offset", 0) if spacing == "leading" else 0
        if is_consistency(self.pipe):
            return ladder_grid(size, steps, int(config.original_inference_steps))
        if spacing != "trailing" and type(self.pipe.scheduler).__name__.startswith(ONE_MORE):
            finer = table_grid(size, steps + 1, spacing, offset)
            return torch.cat([finer[:-2], finer[-1:]])
        return table_grid(size, steps, spacing, offset)
