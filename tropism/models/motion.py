"""Training the motion modules of a clip model, and them alone, beside a frozen LoRA of the image model."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import MotionAdapter
from peft import LoraConfig, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tropism.models.adapters import ADAPTER, LORA_FILE, Full, Lora, read_lora

MODULES = "motion_modules"  # the name that diffusers gives them in every block
FOLDER = "motion_adapter"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


class SpatialLora(Lora):
    """A LoRA of the image model inside a clip model: it adapts no motion module, unless its targets name some.

    So a LoRA that was trained on the image model alone fits, and one that is trained here fits the image model.
    """

    def __init__(self, pipe: Any, part: str, config: LoraConfig, generator: torch.Generator | None = None) -> None:
        targets = config.target_modules or ()
        if not any(MODULES in target for target in targets):
            config.exclude_modules = rf".*\.{MODULES}\..*"
        super().__init__(pipe, part, config, generator)

    @property
    def config(self) -> LoraConfig:
        """As it is saved: what is left out need not be said of an image model."""
        config = copy.copy(super().config)
        config.exclude_modules = None
        return config


class Motion(Full):
    """The motion modules of ``pipe.<part>``, in float32; all else is frozen.

    ``spatial`` (PEFT names, config) is a LoRA of the image model that is frozen with it, and part of what is saved:
    the image model distilled. The reference has neither it nor what the modules have learnt; it costs the motion
    modules again. A base of lower precision runs under autocast, as in full training.
    """

    def __init__(self, pipe: Any, part: str, spatial: tuple[dict[str, Tensor], LoraConfig] | None = None) -> None:
        self._pipe, self._part, self._net = pipe, part, getattr(pipe, part)
        first = next(self._net.parameters())
        self._device, self._base_dtype, self.dtype, self._depth = first.device, first.dtype, torch.float32, 0
        self._net.float().requires_grad_(False)
        self._frozen = _apart(self._net)  # before the LoRA takes the place of its layers
        self._spatial = None if spatial is None else SpatialLora(pipe, part, spatial[1])
        if self._spatial is not None and spatial is not None:
            _fits(self._spatial, spatial[0])
            set_peft_model_state_dict(self._net, spatial[0], adapter_name=ADAPTER)
        self._net.eval().requires_grad_(False)
        self._named = {name: each for name, each in self._net.named_parameters() if f".{MODULES}." in name}
        self.parameters = [each.requires_grad_(True) for each in self._named.values()]

    @property
    def has_spatial(self) -> bool:
        """Whether there is a LoRA of the image model."""
        return self._spatial is not None

    def spatial(self, share: float) -> AbstractContextManager[None]:
        """Inside, the LoRA of the image model counts for ``share`` of itself."""
        layers = [layer for layer in self._net.modules() if isinstance(layer, LoraLayer)]
        return _scaled(layers, share)

    def save(self, folder: Path) -> Path:
        """Writes ``folder/motion_adapter``, which ``MotionAdapter.from_pretrained`` reads, and beside it the LoRA."""
        folder.mkdir(parents=True, exist_ok=True)
        if self._spatial is not None:
            self._spatial.save(folder)
        kind: Any = MotionAdapter
        adapter = kind.from_config(self._pipe.motion_adapter.config)
        adapter.load_state_dict({name: value.detach().cpu() for name, value in self._named.items()}, strict=False)
        final = folder / FOLDER
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
            adapter.save_pretrained(Path(temporary) / "new", safe_serialization=True)
            if final.exists():
                os.replace(final, Path(temporary) / "old")
            os.replace(Path(temporary) / "new", final)
        return final

    def load(self, folder: Path) -> None:
        """Continues from saved motion modules and their LoRA. Raises ValueError, before any change, for a misfit."""
        saved = read_motion(folder)
        mine = {name: value.shape for name, value in self._named.items()}
        if {name: value.shape for name, value in saved.items() if name in mine} != mine:
            raise ValueError(f"the motion modules in {folder} have other layers than this model's; use its own model")
        if (folder / LORA_FILE).is_file() != self.has_spatial:
            given = "a" if not self.has_spatial else "no"
            raise ValueError(f"{folder} has {given} LoRA of the image model beside its motion modules; use its own run")
        if self._spatial is not None:
            self._spatial.load(folder)
        with torch.no_grad():
            for name, value in self._named.items():
                value.copy_(saved[name])


def read_motion(folder: Path) -> dict[str, Tensor]:
    """The motion modules that ``Motion.save`` wrote. Raises ValueError in one sentence for anything else."""
    file = folder / FOLDER / WEIGHTS_FILE
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder} has no sound {FOLDER}/{WEIGHTS_FILE}; wanted what save_adapter wrote") from error


def spatial_lora(folder: Path, part: str) -> tuple[dict[str, Tensor], LoraConfig]:
    """A LoRA of the image model. Raises ValueError in one sentence where there is none."""
    weights, config = read_lora(folder, part)
    if any(f".{MODULES}." in name for name in weights):
        raise ValueError(f"the LoRA in {folder} adapts motion modules; wanted one that was trained on the image model")
    return weights, config


def _fits(lora: Lora, weights: Mapping[str, Tensor]) -> None:
    own = {name: value.shape for name, value in lora._state().items()}
    if own != {name: value.shape for name, value in weights.items()}:
        raise ValueError("the LoRA has other layers than the image model inside this one; wanted one of its own base")


def _apart(net: nn.Module) -> nn.Module:
    """A tree of its own that shares every weight but the motion modules', which it has copies of."""
    own = copy.copy(net)
    own._modules = {
        name: child if child is None else copy.deepcopy(child) if name == MODULES else _apart(child)
        for name, child in net._modules.items()
    }
    return own


@contextmanager
def _scaled(layers: list[LoraLayer], share: float) -> Iterator[None]:
    for layer in layers:
        layer.set_scale(ADAPTER, share)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_scale(ADAPTER, 1.0)
