"""The half of ``base.TextToImage`` that all latent diffusers pipelines share; a family adds its schedule and calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tropism.base import Cond
from tropism.denoisers import NetDenoiser
from tropism.models.adapters import Full, Lora, Trained, lora_config, read_lora
from tropism.models.onednn import twin, twin_pays
from tropism.models.phrases import token_phrases

CACHE_BYTES = 256 * 2**20


class LatentPipeline(ABC):
    """A diffusers pipeline, in the words of ``base.TextToImage``.

    ``pipe`` is the pipeline itself: nothing in it is replaced, its networks are put in evaluation mode (no dropout,
    ever) and frozen; ``add_lora`` or ``train_full`` then says what is trained. ``guidance_scale`` and ``steps`` are the
    defaults of the pipeline unless given. ``image_size`` is height and width in pixels, its own unless given, in
    multiples of what one latent cell (or patch) covers. Device and dtype are chosen before, on the pipeline.

    On a CPU with AVX-512 the denoiser is a twin of the network (see ``models.onednn``) unless ``onednn`` is False: same
    tensors, results equal up to rounding, first-order gradients only. It is made at the first call, and attention
    processors that the network gets later are not in it.
    """

    part: ClassVar[str]  # what denoises: "unet" or "transformer"
    default_guidance: ClassVar[float]
    default_steps: ClassVar[int]
    attention_targets: ClassVar[tuple[str, ...]]
    feed_forward_targets: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        pipe: Any,
        *,
        guidance_scale: float | None = None,
        steps: int | None = None,
        negative_prompt: str = "",
        image_size: tuple[int, int] | None = None,
        onednn: bool = True,
    ) -> None:
        self.check(pipe)
        self.pipe = pipe
        self.onednn = onednn
        self.steps = self.default_steps if steps is None else steps
        self.negative_prompt = negative_prompt
        self._guidance_scale = self.default_guidance if guidance_scale is None else guidance_scale
        self._trained: Trained | None = None
        self._rows: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self._net: Any = getattr(pipe, self.part)
        self._twins: dict[nn.Module, nn.Module] = {}
        self._dtype = next(self._net.parameters()).dtype
        for module in pipe.components.values():
            if isinstance(module, nn.Module):
                module.eval().requires_grad_(False)
        self.latent_shape = self._latent_shape(image_size)
        self.denoiser = self._build_denoiser()

    # What a family adds.

    @staticmethod
    @abstractmethod
    def check(pipe: Any) -> None:
        """Raises ValueError, in one sentence, for a pipeline of this class that works differently."""

    @abstractmethod
    def _build_denoiser(self) -> NetDenoiser: ...

    @abstractmethod
    def _predict(self, net: nn.Module, x: Tensor, tau: Tensor, cond: Cond) -> Tensor:
        """The network's output; x (B, C, h, w) and cond are in its dtype, tau (B,) is the time it is told."""

    @abstractmethod
    def _encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """One row a prompt, as the pipeline itself encodes them."""

    @abstractmethod
    def grid(self, steps: int) -> Tensor:
        """(steps + 1,) decreasing times from noise to 0, float32: the pipeline's own timesteps."""

    def _decode_input(self, latents: Tensor) -> Tensor:
        return latents / float(self.pipe.vae.config.scaling_factor)

    def _latent_shape(self, image_size: tuple[int, int] | None) -> tuple[int, int, int]:
        config, factor = self._net.config, self.pipe.vae_scale_factor
        size: Any = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        if image_size is not None:
            cell = factor * int(config.get("patch_size", 1) or 1)
            if any(length < cell or length % cell for length in image_size):
                raise ValueError(f"image_size {image_size} must be two positive multiples of {cell} pixels")
            height, width = image_size[0] // factor, image_size[1] // factor
        return config.in_channels, height, width

    # base.TextToImage

    @property
    def guidance_scale(self) -> float:
        """The default; 1 is no guidance."""
        return self._guidance_scale

    @property
    def device(self) -> torch.device:
        """Of the denoising network."""
        device: torch.device = next(self._net.parameters()).device
        return device

    def net(self, x: Tensor, tau: Tensor, cond: Cond) -> Tensor:
        """x (B, C, h, w), tau (B,) -> the network's raw output (B, C, h, w), float32, as trained so far."""
        trained = self._trained
        dtype = self._dtype if trained is None else trained.dtype
        rows = {name: value.to(dtype) for name, value in cond.items()}
        with nullcontext() if trained is None else trained.precision():
            return self._predict(self._network(), x.to(dtype), tau, rows).float()

    def _network(self) -> nn.Module:
        """What is called: the network with its adapter, or the twin of that."""
        net: nn.Module = self._net if self._trained is None else self._trained.module
        if not self.onednn:
            return net
        if net not in self._twins:
            self._twins[net] = twin(net) if twin_pays(net) else net
        return self._twins[net]

    def phrases(self, prompts: Sequence[str]) -> Tensor:
        """(B, L) int64: the phrase of each token of cond["prompt_embeds"], -1 for none (start, end, padding, T5's)."""
        length = self.encode(prompts)["prompt_embeds"].shape[1]
        tokens = min(length, int(self.pipe.tokenizer.model_max_length))
        found = token_phrases(self.pipe.tokenizer, prompts, tokens)
        return torch.nn.functional.pad(found, (0, length - tokens), value=-1)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Cond:
        """B prompts -> B rows; without gradients, each distinct prompt is encoded once (a cache of 256 MiB).

        Raises TypeError for a bare string, which would be read as a list of letters, and ValueError for no prompts.
        """
        if isinstance(prompts, str):
            raise TypeError(f"encode takes a sequence of prompts; got the string {prompts!r}; write [{prompts!r}]")
        if not prompts:
            raise ValueError("there are no prompts to encode; give at least one")
        rows = {prompt: self._rows[prompt] for prompt in prompts if prompt in self._rows}
        fresh = [prompt for prompt in dict.fromkeys(prompts) if prompt not in rows]
        if fresh:
            encoded = self._encode(fresh)
            rows |= {prompt: {k: v[i].clone() for k, v in encoded.items()} for i, prompt in enumerate(fresh)}
        self._remember(rows)
        return {name: torch.stack([rows[prompt][name] for prompt in prompts]) for name in rows[prompts[0]]}

    def _remember(self, rows: dict[str, dict[str, Tensor]]) -> None:
        """Most recent last; forgets the oldest beyond CACHE_BYTES."""
        for prompt, row in rows.items():
            self._rows[prompt] = row
            self._rows.move_to_end(prompt)
        size = sum(value.nbytes for row in rows.values() for value in row.values()) // len(rows)
        while len(self._rows) * size > CACHE_BYTES:
            self._rows.popitem(last=False)

    def null(self) -> Cond:
        """One row: the negative prompt, empty unless another was given."""
        return self.encode([self.negative_prompt])

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> images (B, 3, H, W) in [0, 1], float32; keeps the graph.

        Values are clamped as the pipeline clamps them, but the gradient passes as if they were not: under the clamp's
        own gradient a saturated pixel could never come back.
        """
        scaled = self._decode_input(latents).to(self.pipe.vae.dtype)
        image = self.pipe.vae.decode(scaled, return_dict=False)[0]
        clamped: Tensor = _ClampForward.apply(image.float() * 0.5 + 0.5)  # type: ignore[no-untyped-call]
        return clamped

    # What is trained.

    def add_lora(
        self,
        rank: int = 4,
        alpha: int | None = None,
        targets: Sequence[str] | None = None,
        feed_forward: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        """Trains a LoRA: on the attention layers (query, key, value, out), with ``feed_forward`` also on those.

        ``alpha`` defaults to ``rank``; ``targets`` are ends of layer names instead of the default. It starts as a
        no-op, from ``generator`` if given. Raises ValueError when something is trained already, when the pipeline
        carries adapters, and for an unknown target.
        """
        self._check_untrained()
        names = self.attention_targets + (self.feed_forward_targets if feed_forward else ())
        config = lora_config(rank, alpha, names if targets is None else targets)
        self._train(Lora(self.pipe, self.part, config, generator))

    def train_full(self) -> None:
        """Trains all weights of the denoising network, in float32. ``reference`` then costs a frozen copy in memory."""
        self._check_untrained()
        self._train(Full(self.pipe, self.part))

    def _check_untrained(self) -> None:
        if self._trained is not None:
            raise ValueError(
                f"a {type(self._trained).__name__} is trained already; load the pipeline again to train another"
            )

    def _train(self, trained: Trained) -> None:
        self._trained, self._twins = trained, {}

    def parameters(self) -> list[nn.Parameter]:
        """The trained ones, float32; none before ``add_lora`` or ``train_full``."""
        return [] if self._trained is None else self._trained.parameters

    def reference(self) -> AbstractContextManager[None]:
        """Inside, the denoiser is the model as it was before training, bit by bit."""
        return nullcontext() if self._trained is None else self._trained.reference()

    def save_adapter(self, folder: str | Path) -> Path:
        """Writes what was trained, atomically, and says where: a LoRA file, or the network's folder."""
        if self._trained is None:
            raise ValueError("nothing was trained, so there is nothing to save; call add_lora() or train_full() first")
        return self._trained.save(Path(folder))

    def load_adapter(self, folder: str | Path) -> None:
        """Continues from ``save_adapter``; without anything trained yet, first adds a LoRA like the saved one.

        Parameters keep their identity. Raises ValueError, before any of them changes, when the file is missing or
        does not fit.
        """
        if self._trained is None:
            self._train(Lora(self.pipe, self.part, read_lora(Path(folder), self.part)[1]))
        assert self._trained is not None
        self._trained.load(Path(folder))

    def enable_gradient_checkpointing(self) -> None:
        """Trades time for memory in the denoising network and the image decoder wherever a graph is kept."""
        self._net.enable_gradient_checkpointing()
        self._twins = {}
        self.pipe.vae.enable_gradient_checkpointing()


class _ClampForward(torch.autograd.Function):
    """clamp(x, 0, 1) whose derivative is 1 everywhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]
