"""The half of every model that is about training: what is trained, the prompts it has seen, and what it can do."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from tropism.base import Cond, Denoiser, Hops
from tropism.denoisers import END, TOLD, ConsistencyDenoiser, FlowMap
from tropism.models.adapters import Full, Lora, Trained, lora_config
from tropism.models.plain_adapters import PlainFull, PlainLora

DEFAULTS_FILE = "tropism.json"
CACHE_BYTES = 256 * 2**20
AT_ONCE = 16  # prompts that are encoded together before the encoders go


class Trainable(ABC):
    """``base.TextToImage`` and what a run needs besides: defaults, an adapter, and how to save it.

    ``pipe`` is what holds the network under the name ``part``. ``steps`` and ``guidance_scale`` are the defaults.
    """

    part: ClassVar[str]
    feed_forward_targets: ClassVar[tuple[str, ...]] = ()
    denoiser: Denoiser
    latent_shape: tuple[int, ...]
    steps: int
    negative_prompt: str
    hops: Hops | None = None  # of a model that is made for few steps

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self._net: nn.Module = getattr(pipe, self.part)
        self._dtype = next(self._net.parameters()).dtype
        self._trained: Trained | None = None
        self._rows: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self._all: dict[str, dict[str, Tensor]] | None = None  # once the text encoders are gone

    # What a model adds.

    @property
    @abstractmethod
    def guidance_scale(self) -> float:
        """The default; 1 is no guidance."""

    @property
    @abstractmethod
    def attention_targets(self) -> Sequence[str]:
        """Ends of the names of the layers that a LoRA adapts unless told otherwise."""

    @abstractmethod
    def _predict(self, net: nn.Module, x: Tensor, tau: Tensor, cond: Cond) -> Tensor:
        """The network's output; x (B, ...) and cond are in its dtype, tau (B,) is the time it is told."""

    @abstractmethod
    def _encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """One row a prompt."""

    @abstractmethod
    def _forget_encoders(self) -> None:
        """Frees what ``_encode`` needs."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """(B, ...) -> images (B, 3, H, W) in [0, 1]; keeps the graph."""

    def latents(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> clean latents, without gradients: ``decode`` backwards. Raises ValueError
        where there is no encoder."""
        raise ValueError(f"{type(self).__name__} has no encoder of pictures; use a method that learns without data")

    @abstractmethod
    def grid(self, steps: int) -> Tensor:
        """(steps + 1,) decreasing times, the first is noise and the last is clean, float32."""

    @abstractmethod
    def phrases(self, prompts: Sequence[str]) -> Tensor:
        """(B, L) int64: which phrase of its prompt each token belongs to; -1 for none."""

    @abstractmethod
    def enable_gradient_checkpointing(self) -> None:
        """Trades time for memory wherever a graph is kept."""

    @abstractmethod
    def enable_vae_slicing(self) -> None:
        """Decodes one image at a time."""

    @abstractmethod
    def to(self, device: torch.device, dtype: torch.dtype) -> Trainable:
        """The same model, there and in that format; before anything is trained."""

    @abstractmethod
    def use(self, base: str, adapter: str, full: bool, prompt: str) -> list[str]:
        """Lines of Python that draw ``prompt`` with what was trained, without tropism where that is possible.

        ``base`` is the expression that names the model, ``adapter`` the folder of what was trained.
        """

    @abstractmethod
    def _few_step_view(self, hops: Hops, steps: int) -> Self:
        """A copy that shares the network and what is trained, with even times and the denoiser of these hops."""

    def few_step(self, hops: Hops, steps: int) -> Self:
        """The same network, and what is trained in it so far, drawn with in ``steps`` unguided moves on even times.

        The view shares everything but how it is drawn with; what it saves says how. Raises ValueError for a model that
        is made for few steps already, and for jumps of a network that cannot be told where to.
        """
        if self.hops is not None or isinstance(self.denoiser, ConsistencyDenoiser):
            raise ValueError("model is made for few steps already; wanted the model that it was distilled from")
        if steps < 1:
            raise ValueError(f"steps must be at least 1; got {steps}")
        jumping = FlowMap(self.denoiser) if hops == "jump" else None  # refuses what cannot be told
        view = self._few_step_view(hops, steps)
        view.denoiser = view.denoiser if jumping is None else jumping
        view.hops, view.steps = hops, steps
        return view

    @property
    def device(self) -> torch.device:
        """Of the denoising network."""
        return next(self._net.parameters()).device

    def net(self, x: Tensor, tau: Tensor, cond: Cond) -> Tensor:
        """x (B, ...), tau (B,) -> the network's raw output (B, ...), float32, as trained so far."""
        trained = self._trained
        dtype = self._dtype if trained is None else trained.dtype
        exact = {name for name, value in cond.items() if name in (TOLD, END) or not value.is_floating_point()}
        rows = {name: value if name in exact else value.to(dtype) for name, value in cond.items()}
        with nullcontext() if trained is None else trained.precision():
            return self._predict(self._network(), x.to(dtype), tau, rows).float()

    def _network(self) -> nn.Module:
        """What is called: the network with its adapter."""
        return self._net if self._trained is None else self._trained.module

    def bare_network(self) -> nn.Module:
        """The network with its adapter; from now on it is called itself, and no faster stand-in."""
        return self._network()

    # Prompts.

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Cond:
        """B prompts -> B rows; without gradients, each distinct prompt is encoded once (a cache of 256 MiB).

        Raises TypeError for a bare string, which would be read as a list of letters, and ValueError for no prompts and,
        after ``drop_text_encoders``, for a new one.
        """
        if isinstance(prompts, str):
            raise TypeError(f"encode takes a sequence of prompts; got the string {prompts!r}; write [{prompts!r}]")
        if not prompts:
            raise ValueError("there are no prompts to encode; give at least one")
        rows = self._kept(prompts) if self._all is not None else self._cached(prompts)
        stacked = {name: torch.stack([rows[prompt][name] for prompt in prompts]) for name in rows[prompts[0]]}
        return {name: value.to(self.device) for name, value in stacked.items()}

    def _kept(self, prompts: Sequence[str]) -> dict[str, dict[str, Tensor]]:
        assert self._all is not None
        new = [prompt for prompt in prompts if prompt not in self._all]
        if new:
            raise ValueError(
                f"the text encoders were dropped after {len(self._all)} prompts, of which {new[0]!r} is none; leave "
                "drop_text_encoders out to draw new prompts"
            )
        return self._all

    def _cached(self, prompts: Sequence[str]) -> dict[str, dict[str, Tensor]]:
        rows = {prompt: self._rows[prompt] for prompt in prompts if prompt in self._rows}
        fresh = [prompt for prompt in dict.fromkeys(prompts) if prompt not in rows]
        if fresh:
            encoded = self._encode(fresh)
            rows |= {prompt: {k: v[i].clone() for k, v in encoded.items()} for i, prompt in enumerate(fresh)}
        self._remember(rows)
        return rows

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

    @torch.no_grad()
    def drop_text_encoders(self, prompts: Sequence[str]) -> None:
        """Encodes these prompts and the null one, keeps them in main memory, and frees the text encoders.

        From then on ``encode`` knows no other prompt. ``pipe`` has no text encoders either.
        """
        known = list(dict.fromkeys([*prompts, self.negative_prompt]))
        kept: dict[str, dict[str, Tensor]] = {}
        for start in range(0, len(known), AT_ONCE):
            some = known[start : start + AT_ONCE]
            rows = {name: value.cpu() for name, value in self._encode(some).items()}
            kept |= {prompt: {name: value[i].clone() for name, value in rows.items()} for i, prompt in enumerate(some)}
        self._all = kept
        self._rows.clear()
        self._forget_encoders()

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
        no-op, from ``generator`` if given. Raises ValueError when something is trained already, when the network
        carries adapters, and for an unknown target.
        """
        self._check_untrained()
        names = (*self.attention_targets, *(self.feed_forward_targets if feed_forward else ()))
        config = lora_config(rank, alpha, names if targets is None else targets)
        self._train(self._lora_kind()(self.pipe, self.part, config, generator))

    def train_full(self) -> None:
        """Trains all weights of the denoising network, in float32. ``reference`` then costs a frozen copy in memory."""
        self._check_untrained()
        kind = Full if hasattr(self._net, "save_pretrained") else PlainFull
        self._train(kind(self.pipe, self.part))

    def unscale_norms(self) -> None:
        """Sets the learnt scales of layer norms to 1, and trains them no more (2502.01441, non-scaling LayerNorm).

        The layers keep their scales of 1, so that what is saved loads as ever. Raises ValueError unless the whole
        network is trained, and for one without such scales.
        """
        if not isinstance(self._trained, Full):
            raise ValueError("layer norms can lose their scales in full training only; give full, or leave them")
        self._trained.unscale_norms()

    def _lora_kind(self) -> type[Lora]:
        """In the format of diffusers where the pipeline has one, else in that of PEFT."""
        return Lora if hasattr(self.pipe, "save_lora_weights") else PlainLora

    def _check_untrained(self) -> None:
        if self._trained is not None:
            raise ValueError(
                f"a {type(self._trained).__name__} is trained already; load the pipeline again to train another"
            )

    def _train(self, trained: Trained) -> None:
        self._trained = trained

    def parameters(self) -> list[nn.Parameter]:
        """The trained ones, float32; none before ``add_lora`` or ``train_full``."""
        return [] if self._trained is None else self._trained.parameters

    def reference(self) -> AbstractContextManager[None]:
        """Inside, the denoiser is the model as it was before training, bit by bit."""
        return nullcontext() if self._trained is None else self._trained.reference()

    def forget(self) -> None:
        """What is trained goes back to where it began, bit by bit as ``reference`` has it; nothing else changes."""
        if self._trained is not None:
            self._trained.forget()

    def save_adapter(self, folder: str | Path) -> Path:
        """Writes what was trained, atomically, and says where: a LoRA file, or the network's folder."""
        if self._trained is None:
            raise ValueError("nothing was trained, so there is nothing to save; call add_lora() or train_full() first")
        saved = self._trained.save(Path(folder))
        if self.hops is not None:
            (Path(folder) / DEFAULTS_FILE).write_text(json.dumps(self.told()), encoding="utf-8")
        return saved

    def told(self) -> dict[str, Any]:
        """How it is drawn with, as ``tropism.json`` says it."""
        said = {"guidance_scale": self.guidance_scale, "steps": self.steps}
        return said if self.hops is None else said | {"hops": self.hops}

    def load_adapter(self, folder: str | Path) -> None:
        """Continues from ``save_adapter``; without anything trained yet, first adds a LoRA like the saved one.

        Parameters keep their identity. Raises ValueError, before any of them changes, when the file is missing or
        does not fit.
        """
        if self._trained is None:
            kind = self._lora_kind()
            self._train(kind(self.pipe, self.part, kind.read(Path(folder), self.part)[1]))
        assert self._trained is not None
        self._trained.load(Path(folder))


def clamped(images: Tensor) -> Tensor:
    """clamp(images, 0, 1) whose derivative is 1 everywhere."""
    answer: Tensor = _ClampForward.apply(images)  # type: ignore[no-untyped-call]
    return answer


class _ClampForward(torch.autograd.Function):
    """clamp(x, 0, 1) whose derivative is 1 everywhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]
