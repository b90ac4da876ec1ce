"""A network of one's own, as any other model: it is sampled, trained, saved and drawn with by the same code."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tropism.base import Cond, Hops
from tropism.denoisers import ConsistencyDenoiser, NetDenoiser, Target
from tropism.models.trainable import Trainable, clamped
from tropism.schedules import DDPMTable, NetSchedule, RectifiedFlow, flow_grid, table_grid

Encode = Callable[[list[str]], Mapping[str, Tensor]]
"""B prompts -> tensors of B rows each, which the network gets by name."""


class OwnModel(Trainable):
    """``network(x, tau, **encode(prompts))`` says ``target`` on ``schedule``; ``decode`` makes images of the last x,
    ``latents`` the x of images, for methods that learn from pictures.

    ``shape`` is that of one x, ``decode`` returns (B, 3, H, W), which is clamped to [0, 1]. Without a ``schedule`` it
    is the straight path (rectified flow) and tau is the time itself, from 1 (noise) to 0. ``grid(steps)`` are the times
    of a chain, (steps + 1,); none: even levels of a flow, trailing timesteps of a DDPM table, even times of another.
    With ``takes_end`` the network also has an argument ``end_time``, which may be missing: where on the path it is
    asked to go, as tau; it can then be trained to jump there (``denoisers.FlowMap``). With ``takes_guidance`` it has
    an argument ``told_guidance``, which may be missing as well: the scale of guidance, (B,), which a distillation can
    then teach it to follow.

    The network is put in evaluation mode and frozen, until ``add_lora`` (all linear layers unless told otherwise) or
    ``train_full``. A LoRA is saved in PEFT's format, all weights as a state dictionary, both as safetensors.
    """

    part = "network"

    def __init__(
        self,
        network: nn.Module,
        encode: Encode,
        decode: Callable[[Tensor], Tensor],
        shape: Sequence[int],
        *,
        target: Target = "flow",
        schedule: NetSchedule | None = None,
        grid: Callable[[int], Tensor] | None = None,
        guidance_scale: float = 1.0,
        steps: int = 20,
        negative_prompt: str = "",
        takes_end: bool = False,
        takes_guidance: bool = False,
        latents: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        network.eval().requires_grad_(False)
        super().__init__(SimpleNamespace(network=network))
        self.latent_shape, self.steps, self.negative_prompt = tuple(shape), steps, negative_prompt
        self._own_encode: Encode | None = encode
        self._own_latents = latents
        self._own_decode, self._own_grid, self._guidance_scale = decode, grid, guidance_scale
        self._schedule = RectifiedFlow(num_train_timesteps=1) if schedule is None else schedule
        self._checkpointing = self._slicing = False
        self._takes_guidance, self._told = takes_guidance, False
        self.denoiser = self._plain = NetDenoiser(self.net, self._schedule, target, takes_end=takes_end)

    @property
    def guidance_scale(self) -> float:
        """The default; 1 is no guidance."""
        return self._guidance_scale

    @property
    def attention_targets(self) -> list[str]:
        """Every linear layer, or where there is none every convolution. Raises ValueError for a network without."""
        for kind in (nn.Linear, nn.Conv2d):
            names = [name for name, layer in self._net.named_modules() if isinstance(layer, kind)]
            if names:
                return names
        raise ValueError(f"{type(self._net).__name__} has no linear or convolution layer for a LoRA; train it in full")

    def _predict(self, net: nn.Module, x: Tensor, tau: Tensor, cond: Cond) -> Tensor:
        answer: Tensor
        if self._checkpointing and torch.is_grad_enabled():
            answer = checkpoint(lambda x, tau: net(x, tau, **cond), x, tau, use_reentrant=False)
        else:
            answer = net(x, tau, **cond)
        return answer

    def _encode(self, prompts: list[str]) -> dict[str, Tensor]:
        assert self._own_encode is not None
        rows = dict(self._own_encode(prompts))
        wrong = {name: tuple(value.shape) for name, value in rows.items() if len(value) != len(prompts)}
        if wrong or not rows:
            raise ValueError(f"encode gave {wrong or 'nothing'} for {len(prompts)} prompts; wanted one row each")
        return rows

    def decode(self, latents: Tensor) -> Tensor:
        """(B, *shape) -> images (B, 3, H, W) in [0, 1], float32; keeps the graph, also of what is clamped."""
        parts = latents.split(1) if self._slicing else [latents]
        return clamped(torch.cat([self._own_decode(part) for part in parts]).float())

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, *shape), as the network's data are. Raises ValueError where none was given, and
        where it gives something else."""
        if self._own_latents is None:
            raise ValueError("this model was made without latents, which a method that learns from pictures needs")
        found = self._own_latents(images.to(self.device)).float()
        if found.shape != (len(images), *self.latent_shape):
            raise ValueError(
                f"latents gave {tuple(found.shape)} for images {tuple(images.shape)}; wanted "
                f"{(len(images), *self.latent_shape)}: images of the model's own size"
            )
        return found

    def grid(self, steps: int) -> Tensor:
        """(steps + 1,) decreasing times from noise to 0, float32."""
        if self._own_grid is not None:
            return self._own_grid(steps)
        if isinstance(self._schedule, RectifiedFlow):
            return flow_grid(steps, self._schedule.shift, 1 / steps)
        if isinstance(self._schedule, DDPMTable):
            return table_grid(self._schedule.size, steps, "trailing")
        return torch.linspace(1, 0, steps + 1)

    def be_told(self) -> None:
        """As of any model, where the network ``takes_guidance``."""
        if not self._takes_guidance:
            raise ValueError(
                "the network of this model is not told its guidance; give it an argument told_guidance, and OwnModel "
                "takes_guidance, or leave told out"
            )
        self._told = True

    def _few_step_view(self, hops: Hops, steps: int) -> Self:
        view = copy.copy(self)
        view._own_grid, view._guidance_scale = None, 1.0
        view.denoiser = replace(self._plain, takes_guidance=self._told)
        if hops == "consistency":
            flow = isinstance(self._schedule, RectifiedFlow)
            view.denoiser = ConsistencyDenoiser(view.denoiser, None if flow else 10.0)
        return view

    def phrases(self, prompts: Sequence[str]) -> Tensor:
        """Raises ValueError: nobody said which of the network's inputs are words."""
        raise ValueError("a network of one's own does not say which tokens make a phrase; leave explore_weights at 1 1")

    def to(self, device: torch.device, dtype: torch.dtype) -> OwnModel:
        """The network there; what ``encode`` and ``decode`` hold is their own affair."""
        self._net.to(device, dtype)
        self._dtype = dtype
        return self

    def enable_gradient_checkpointing(self) -> None:
        """Computes the network again in the backward pass."""
        self._checkpointing = True

    def enable_vae_slicing(self) -> None:
        """Decodes one image at a time."""
        self._slicing = True

    def _forget_encoders(self) -> None:
        self._own_encode = None

    def use(self, base: str, adapter: str, full: bool, prompt: str) -> list[str]:
        """Lines of Python that draw ``prompt``."""
        few = f'"{self.hops}", {self.steps}' + (f", {self.guidance_scale:g}" if self.is_told else "")
        return [
            "import torch",
            "",
            "from tropism.catalog import load_model",
            "from tropism.evaluate import deterministic",
            "",
            f'model = load_model({base}, torch.float32, torch.device("cpu"))',
            *(["model.train_full()"] if full else []),
            f'model.load_adapter("{adapter}")  # the folder beside this file',
            *([] if self.hops is None else [f"model = model.few_step({few})"]),
            f"images = deterministic(model, model.steps).images([{prompt!r}])  # (1, 3, H, W) in [0, 1]",
        ]
