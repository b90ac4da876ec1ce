"""Adapters of networks that no loader of diffusers knows (PixArt, a network of one's own): PEFT's format, safetensors.

``peft.PeftModel.from_pretrained(network, folder)`` loads the LoRA; all the weights are a plain state dictionary.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from tropism.models.adapters import ADAPTER, Full, Lora

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # what PEFT calls the network inside its own module
FULL_FILE = "model.safetensors"


class PlainLora(Lora):
    """A LoRA that PEFT itself adds and loads."""

    def _add(self, config: LoraConfig) -> None:
        self._net.requires_grad_(False)
        inject_adapter_in_model(config, self._net, ADAPTER)

    def save(self, folder: Path) -> Path:
        """Writes ``adapter_config.json`` and ``adapter_model.safetensors``, each atomically; returns the second."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = {PREFIX + name: value.detach().cpu().contiguous() for name, value in self._state().items()}
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
            save_file(weights, Path(temporary) / WEIGHTS_FILE, metadata={"format": "pt"})
            self.config.save_pretrained(temporary)
            for name in (CONFIG_FILE, WEIGHTS_FILE):
                os.replace(Path(temporary) / name, folder / name)
        return folder / WEIGHTS_FILE

    @staticmethod
    def read(folder: Path, part: str) -> tuple[dict[str, Tensor], LoraConfig]:
        """Weights (names without PEFT's prefix) and config. Raises ValueError when either file is missing."""
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise ValueError(f"there is no {name} in {folder}; give the folder that save_adapter or PEFT wrote")
        weights = {name.removeprefix(PREFIX): value for name, value in load_file(folder / WEIGHTS_FILE).items()}
        return weights, LoraConfig.from_pretrained(str(folder))


class PlainFull(Full):
    """All the weights of any module."""

    def _write(self, folder: Path) -> None:
        folder.mkdir()
        save_file({name: value.contiguous() for name, value in self._net.state_dict().items()}, folder / FULL_FILE)

    def _read(self, folder: Path) -> dict[str, Tensor]:
        if not (folder / FULL_FILE).is_file():
            raise ValueError(f"there is no {FULL_FILE} in {folder}; wanted what save_adapter writes after train_full()")
        return load_file(folder / FULL_FILE)
