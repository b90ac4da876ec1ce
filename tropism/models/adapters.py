"""What is trained inside a network, and how to get back to the network as it was: a LoRA, or all the weights.

A LoRA is a PEFT adapter that diffusers itself adds (``add_adapter``); its reference is the adapter switched off. Full
training keeps a frozen copy as its reference. Trained parameters are float32 whatever the base is: with a bfloat16 base
a LoRA adds its float32 product to the bfloat16 layer, and a fully trained network runs under autocast.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import Tensor, nn

ADAPTER = "tropism"
LORA_FILE = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"  # the entry of a diffusers LoRA file that holds its PEFT config as JSON
MERGE = "to start from it, merge it first: pipe.load_lora_weights, pipe.fuse_lora, pipe.unload_lora_weights"


class Trained(Protocol):
    """The trained part of ``pipe.<part>`` (the UNet or the transformer)."""

    parameters: list[nn.Parameter]

    @property
    def module(self) -> nn.Module:
        """What the denoiser calls now."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """What its inputs are cast to."""
        ...

    def precision(self) -> AbstractContextManager[Any]:
        """What the denoiser runs under."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Inside, ``module`` computes what it did before training."""
        ...

    def forget(self) -> None:
        """``module`` computes what it did before training from now on, and goes on learning from there."""
        ...

    def save(self, folder: Path) -> Path: ...

    def load(self, folder: Path) -> None: ...


class Lora:
    """A LoRA inside ``pipe.<part>``. Building one adds the adapter to that network and freezes the rest of it."""

    def __init__(self, pipe: Any, part: str, config: LoraConfig, generator: torch.Generator | None = None) -> None:
        self._pipe, self._part, self._net = pipe, part, getattr(pipe, part)
        self.dtype: torch.dtype = next(self._net.parameters()).dtype
        _check_free(self._net, part)
        _check_targets(self._net, config)
        with torch.random.fork_rng(devices=[]) if generator is not None else nullcontext():
            self._add(config)
        self._net.eval()  # PEFT adds its layers in training mode
        self.parameters = [parameter for parameter in self._net.parameters() if parameter.requires_grad]
        for parameter in self.parameters:
            parameter.data = parameter.data.float()
        if generator is not None:
            self._draw(generator)

    def _add(self, config: LoraConfig) -> None:
        self._net.add_adapter(config, adapter_name=ADAPTER)

    @torch.no_grad()
    def _draw(self, generator: torch.Generator) -> None:
        """PEFT's start (A uniform in +-fan_in^-1/2, B zero) from ``generator``."""
        for name, parameter in self._net.named_parameters():
            if f".lora_A.{ADAPTER}." in name:
                bound = parameter[0].numel() ** -0.5
                draw = torch.rand(parameter.shape, generator=generator, device=generator.device)
                parameter.copy_((2 * draw - 1) * bound)

    @property
    def config(self) -> LoraConfig:
        """Rank, alpha and targets."""
        return self._net.peft_config[ADAPTER]  # type: ignore[no-any-return]

    @property
    def module(self) -> nn.Module:
        """The network with the adapter inside."""
        return self._net  # type: ignore[no-any-return]

    def precision(self) -> AbstractContextManager[Any]:
        """Nothing: PEFT casts around its own layers."""
        return nullcontext()

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, every layer of this adapter is its base layer; nesting is allowed.

        With gradient checkpointing, run the backward pass on the same side as its forward pass: what is recomputed
        would be another network's.
        """
        layers = [layer for layer in self._net.modules() if isinstance(layer, BaseTunerLayer)]
        if any(layer.disable_adapters for layer in layers):
            yield
            return
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)

    @torch.no_grad()
    def forget(self) -> None:
        """Zeroes what every layer adds; the halves that read stay."""
        for name, parameter in self._net.named_parameters():
            if f".lora_B.{ADAPTER}." in name:
                parameter.zero_()

    def save(self, folder: Path) -> Path:
        """Writes ``folder/pytorch_lora_weights.safetensors`` for ``pipe.load_lora_weights(folder)``, atomically."""
        facts: dict[str, Any] = self.config.to_dict()  # type: ignore[no-untyped-call]
        config = {name: sorted(value) if isinstance(value, set) else value for name, value in facts.items()}
        weights = {name: value.contiguous() for name, value in self._state().items()}
        layers = {f"{self._part}_lora_layers": weights, f"{self._part}_lora_adapter_metadata": config}
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
            self._pipe.save_lora_weights(temporary, **layers)
            os.replace(Path(temporary) / LORA_FILE, folder / LORA_FILE)
        return folder / LORA_FILE

    @staticmethod
    def read(folder: Path, part: str) -> tuple[dict[str, Tensor], LoraConfig]:
        """Weights (PEFT names) and config of what ``save`` wrote. Raises ValueError in one sentence for anything else.

        Also a LoRA that diffusers wrote is read, if its rank and alpha are in it.
        """
        return read_lora(folder, part)

    def load(self, folder: Path) -> None:
        """Continues from a saved LoRA. Raises ValueError, before any change, when it does not fit this one."""
        weights, config = self.read(folder, self._part)
        for name, own, other in zip(("rank", "alpha", "targets"), _facts(self.config), _facts(config), strict=True):
            if own != other:
                raise ValueError(f"the LoRA in {folder} has {name} {other}, this one {own}; add one like the saved")
        shapes = {name: value.shape for name, value in self._state().items()}
        if shapes != {name: value.shape for name, value in weights.items()}:
            raise ValueError(f"the LoRA in {folder} has other layers than this {self._part}; use its own model")
        set_peft_model_state_dict(self._net, weights, adapter_name=ADAPTER)

    def _state(self) -> dict[str, Tensor]:
        return get_peft_model_state_dict(self._net, adapter_name=ADAPTER)  # type: ignore[no-any-return]


class Full:
    """All weights of ``pipe.<part>``, raised to float32. The frozen copy costs the network again (4 bytes a weight).

    With a base of lower precision the network and its copy both run under autocast to that precision, so that policy
    and reference agree exactly before the first step; ``pipe(...)`` itself then needs ``torch.autocast`` around it.
    """

    def __init__(self, pipe: Any, part: str) -> None:
        self._part, self._net = part, getattr(pipe, part)
        _check_free(self._net, part)
        first = next(self._net.parameters())
        self._device, self._base_dtype = first.device, first.dtype
        self.dtype = torch.float32
        self._net.float().requires_grad_(True).eval()
        self._frozen = copy.deepcopy(self._net).requires_grad_(False)
        self._depth = 0
        self.parameters = list(self._net.parameters())

    def unscale_norms(self) -> None:
        """Layer norms scale by 1 from now on; the frozen copy keeps its scales. Raises ValueError without any."""
        norms = [layer for layer in self._net.modules() if isinstance(layer, nn.LayerNorm) and layer.weight is not None]
        if not norms:
            raise ValueError("no layer norm of this network has a scale of its own; leave unscaled_norms out")
        for norm in norms:
            nn.init.ones_(norm.weight.requires_grad_(False))
        fixed = {id(norm.weight) for norm in norms}
        self.parameters = [parameter for parameter in self.parameters if id(parameter) not in fixed]

    @property
    def module(self) -> nn.Module:
        """The network, or inside ``reference`` the frozen copy."""
        return self._frozen if self._depth else self._net  # type: ignore[no-any-return]

    def precision(self) -> AbstractContextManager[Any]:
        """Autocast to the dtype that the network was loaded in."""
        return torch.autocast(self._device.type, self._base_dtype, enabled=self._base_dtype != torch.float32)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, ``module`` is the frozen copy; nesting is allowed."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    def forget(self) -> None:
        """Copies the frozen copy back."""
        self._net.load_state_dict(self._frozen.state_dict())

    def save(self, folder: Path) -> Path:
        """Writes the network (float32, safetensors) to ``folder/<part>``, a folder that ``from_pretrained`` reads.

        Written beside it first, then renamed; an older one is removed last.
        """
        folder.mkdir(parents=True, exist_ok=True)
        final = folder / self._part
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
            self._write(Path(temporary) / "new")
            if final.exists():
                os.replace(final, Path(temporary) / "old")
            os.replace(Path(temporary) / "new", final)
        return final

    def load(self, folder: Path) -> None:
        """Continues from saved weights; the frozen copy stays. Raises ValueError, before any change, for a misfit."""
        source = folder / self._part
        saved = self._read(source)
        own = self._net.state_dict()
        if {name: value.shape for name, value in saved.items()} != {name: value.shape for name, value in own.items()}:
            raise ValueError(f"the network in {source} has other layers than this {self._part}; use its own model")
        self._net.load_state_dict(saved)

    def _write(self, folder: Path) -> None:
        self._net.save_pretrained(folder, safe_serialization=True)

    def _read(self, folder: Path) -> dict[str, Tensor]:
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} holds no network; wanted what save_adapter writes after train_full()")
        saved: dict[str, Tensor] = type(self._net).from_pretrained(folder, use_safetensors=True).state_dict()
        return saved


def lora_config(rank: int, alpha: int | None, targets: Sequence[str]) -> LoraConfig:
    """A plain LoRA without dropout; ``alpha`` defaults to ``rank`` (scale 1). Raises ValueError for a rank below 1."""
    if rank < 1:
        raise ValueError(f"rank must be at least 1; got {rank}")
    return LoraConfig(r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=list(targets))


def read_lora(folder: Path, part: str) -> tuple[dict[str, Tensor], LoraConfig]:
    """Weights (PEFT names) and config of a diffusers LoRA file. Raises ValueError in one sentence when it is none."""
    file = folder / LORA_FILE
    if not file.is_file():
        raise ValueError(f"there is no {LORA_FILE} in {folder}; give the folder that save_adapter or diffusers wrote")
    with safe_open(str(file), framework="pt") as opened:
        metadata = (opened.metadata() or {}).get(METADATA)
        weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, not a mapping
    strangers = sorted({name.split(".")[0] for name in weights} - {part})
    if strangers:
        raise ValueError(f"{file} has weights for {strangers}, wanted only {part}; {MERGE}")
    if metadata is None:
        raise ValueError(f"{file} has no {METADATA}, which says its rank and alpha; {MERGE}")
    return _strip(weights, part), LoraConfig(**_strip(json.loads(metadata), part))


def _strip(entries: Mapping[str, Any], part: str) -> dict[str, Any]:
    return {name.removeprefix(f"{part}."): value for name, value in entries.items()}


def _facts(config: LoraConfig) -> tuple[int, int, list[str]]:
    return config.r, config.lora_alpha, sorted(config.target_modules or ())


def _check_targets(net: nn.Module, config: LoraConfig) -> None:
    """Every target must end the name of some layer with weights; PEFT is content with one of them."""
    names = ["." + name for name, layer in net.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    for target in config.target_modules or ():
        if not any(name.endswith("." + target) for name in names):
            raise ValueError(f"no linear or convolution layer is called {target!r}; names end like {names[-1][1:]!r}")


def _check_free(net: Any, part: str) -> None:
    present = list(getattr(net, "peft_config", {}))
    if present:
        raise ValueError(f"the {part} already has the adapters {present}; {MERGE}")
