"""What a command can be told: plain dataclasses, each with a ``check`` that needs nothing loaded, and their YAML.

Every field is a flag and a YAML key; the string below it is its help. What is wrong with a value is one sentence that
names the field, the value and what was expected.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from tropism import __version__

Precision = Literal["no", "bf16", "fp16"]
ExportFormat = Literal["diffusers", "peft", "kohya", "comfyui"]


class BadInput(ValueError):
    """What was asked for cannot be done: one sentence. Nothing has begun and nothing was written (exit code 2)."""


class RunFailed(RuntimeError):
    """A run that had begun could not go on: one sentence that names what is kept (exit code 1)."""


@dataclass(frozen=True)
class PlaceSettings:
    """Where to compute."""

    device: str | None = None
    """Such as cpu, cuda or cuda:1; none: a GPU if there is one."""
    threads: int | None = None
    """Processor threads; none: as torch decides."""

    def check(self) -> None:
        """Raises BadInput."""
        require(self.threads is None or self.threads >= 1, "threads", self.threads, "at least 1, or none")


@dataclass(frozen=True)
class DeviceSettings(PlaceSettings):
    """Where and how precisely to compute."""

    mixed_precision: Precision = "no"
    """Number format of the frozen base model (no is float32); a LoRA is float32 always."""
    image_size: tuple[int, int] | None = None
    """Height and width in pixels; none: the model's own."""
    vae_slicing: bool = False
    """Decode one image at a time: less memory."""

    def check(self) -> None:
        """Raises BadInput."""
        super().check()
        size = self.image_size
        require(size is None or min(size) >= 1, "image_size", size, "a height and a width, such as 512 512, or none")


@dataclass(frozen=True)
class HealthSettings(DeviceSettings):
    """What counts as trouble in a run, and what follows from it."""

    on_trouble: Literal["stop", "rollback", "warn"] = "stop"
    """stop; rollback: the last checkpoint with half the learning rate, three times at most; warn: say so and go on."""
    max_blank: float = 0.5
    """Share of a step's pictures that may be black or of one colour."""
    max_flat: float = 0.95
    """Share of prompts whose images may all score the same, three steps in a row."""
    max_ratio: float = 1.5
    """Largest ratio to the acting policy (policy gradients; per dimension, as it is clipped)."""
    max_kl: float | None = None
    """Most nats between the model and itself before training, at an evaluation; none: not checked."""

    def check(self) -> None:
        """Raises BadInput."""
        super().check()
        for name in ("max_blank", "max_flat"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "a share from 0 to 1 (1: never)")
        require(self.max_ratio > 1, "max_ratio", self.max_ratio, "above 1")
        require(self.max_kl is None or self.max_kl > 0, "max_kl", self.max_kl, "above 0, or none")


@dataclass(frozen=True)
class TrainSettings(HealthSettings):
    """Settings of every training run, whatever the method."""

    model: str = "scenes"
    """scenes, scenes-sd, scenes-flow, -lcm, -dmd, -clips or -tokens, melodies, a diffusers folder, a hub name
    (owner/model), or MODULE:FUNCTION."""
    reward: list[str] = field(default_factory=list)
    """One or more of NAME, NAME:SOURCE or MODULE:FUNCTION, each with =WEIGHT if wanted; none: the model's own."""
    reward_cache: str | None = None
    """A file in which scores are kept, so that no image is scored twice; runs may share it; none: not kept."""
    prompts: str | None = None
    """A set of prompts by name, or a .txt or .jsonl file; none: the model's own."""
    steps: int = 100
    """Batches of images to learn from."""
    seed: int = 0
    """Of everything that is drawn in training: adapter, prompts, noise."""
    out: str | None = None
    """Folder of the run, new or empty; none: runs/METHOD-MODEL-NUMBER."""
    save_every: int = 25
    """Steps between checkpoints, of which one is at the end; 0: none but the final adapter."""
    save_total_limit: int = 2
    """The last so many checkpoints are kept, and the one of the best evaluation."""
    eval_every: int = 20
    """Steps between evaluations; 0: only before and after."""
    eval_prompts: str | None = None
    """As prompts; none: the model's own held-out prompts, or the prompts trained on."""
    eval_images: int = 64
    """Images of an evaluation, one a prompt, going round the prompts where there are fewer."""
    eval_seed: int = 0
    """Of the noise that evaluation starts from: the same in every evaluation and every run."""
    eval_reward: list[str] = field(default_factory=list)
    """Held-out rewards: evaluated, never trained on; none: the model's own, where that is not trained on."""
    best_by: str | None = None
    """The reward whose best evaluation is kept as a checkpoint; none: the first held-out one, else reward, the sum."""
    patience: int = 0
    """Evaluations without a better one, after which training stops; 0: it does not."""
    lora_rank: int = 8
    """Size of the LoRA."""
    lora_alpha: int | None = None
    """Scale of the LoRA times its rank; none: the rank."""
    lora_targets: list[str] | None = None
    """Ends of the names of the layers to adapt; none: all attention layers."""
    full: bool = False
    """Train all weights of the denoising network instead of a LoRA."""
    ema: float = 0.0
    """Decay of an average of the trained weights, which is what is evaluated and saved; 0: no average."""
    start_from: str | None = None
    """Folder of a run, of its adapter or of a checkpoint to begin with; the model without it stays the reference."""
    gradient_checkpointing: bool = False
    """Less memory, more time."""
    shard: bool = False
    """Several processes split the weights of the frozen network (FSDP) instead of holding all of them each."""
    drop_text_encoders: bool = False
    """Encode all prompts once, then free the text encoders: less memory."""
    reward_device: str | None = None
    """Where rewards compute, such as cpu beside a model on a GPU; none: with the model."""
    resume: str | None = None
    """A run's folder, one of its checkpoints, or latest: go on with that run, in its folder, with its settings."""
    report_to: str = "none"
    """Trackers, separated by commas: tensorboard, wandb, trackio, comet_ml, aim, mlflow, clearml, dvclive, swanlab."""

    def check(self) -> None:
        """Raises BadInput."""
        super().check()
        require(self.steps >= 1, "steps", self.steps, "at least 1")
        for name in ("seed", "eval_seed", "save_every", "eval_every", "patience"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(self.save_total_limit >= 1, "save_total_limit", self.save_total_limit, "at least 1")
        require(self.eval_images >= 2, "eval_images", self.eval_images, "at least 2, and 64 for a useful interval")
        require(self.lora_rank >= 1, "lora_rank", self.lora_rank, "at least 1")
        require(self.lora_alpha is None or self.lora_alpha >= 1, "lora_alpha", self.lora_alpha, "at least 1, or none")
        require(0 <= self.ema < 1, "ema", self.ema, "0 (off) or a decay below 1, such as 0.99")
        if self.full and (self.lora_alpha is not None or self.lora_targets is not None):
            raise BadInput("lora_alpha and lora_targets are settings of a LoRA and full trains none; leave one out")


@dataclass(frozen=True)
class PickSettings(DeviceSettings):
    """Which model draws, and how."""

    model: str = "scenes"
    """scenes, scenes-sd, scenes-flow, -lcm, -dmd, -clips or -tokens, melodies, a diffusers folder, a hub name
    (owner/model), or MODULE:FUNCTION."""
    adapter: str | None = None
    """Folder of a run, of its adapter or of a checkpoint; none: the model as it is."""
    seed: int = 0
    """Image number i starts from the noise of (seed, i), whatever else is drawn."""
    inference_steps: int | None = None
    """Moves of a chain; none: the model's default."""
    guidance_scale: float | None = None
    """Classifier-free guidance; none: the model's default; 1 is no guidance."""
    batch_size: int = 16
    """Images that are drawn at once; bounds memory, never changes what is drawn."""

    def check(self) -> None:
        """Raises BadInput."""
        super().check()
        require(self.seed >= 0, "seed", self.seed, "0 or more")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        steps, guidance = self.inference_steps, self.guidance_scale
        require(steps is None or steps >= 1, "inference_steps", steps, "at least 1, or none")
        require(guidance is None or guidance >= 0, "guidance_scale", guidance, "0 or more, or none")


@dataclass(frozen=True)
class SampleSettings(PickSettings):
    """Settings of ``tropism sample``."""

    prompt: list[str] = field(default_factory=list)
    """What to draw, in quotes; may be given more than once."""
    prompts: str | None = None
    """A set of prompts by name, or a .txt or .jsonl file."""
    images: int = 1
    """Images of each prompt."""
    steer: str | None = None
    """Steer while drawing: NAME or NAME+NAME (tropism steerers lists them); none: draw as the model does."""
    reward: list[str] = field(default_factory=list)
    """By which drawing is steered; as in training; none: the model's own."""
    reward_cache: str | None = None
    """As in training."""
    out: str | None = None
    """A new or empty folder, or a .png file for the grid alone; none: runs/sample-NUMBER."""

    def check(self) -> None:
        """Raises BadInput."""
        super().check()
        require(self.images >= 1, "images", self.images, "at least 1")
        if self.steer is None and (self.reward or self.reward_cache):
            raise BadInput("reward is given and steer is not; wanted steer as well, such as best-of-n or fk")
        if bool(self.prompt) == bool(self.prompts):
            raise BadInput("wanted either prompt (one or more texts) or prompts (a file or a set by name)")


@dataclass(frozen=True)
class EvalSettings(PickSettings):
    """Settings of ``tropism eval``."""

    reward: list[str] = field(default_factory=list)
    """As in training; none: the model's own."""
    reward_cache: str | None = None
    """As in training."""
    prompts: str | None = None
    """As in training; none: the model's own held-out prompts."""
    images: int = 64
    """Images to score, one a prompt, going round the prompts where there are fewer."""
    out: str | None = None
    """A .json file to write; none: only the table is printed."""

    def check(self) -> None:
        """Raises BadInput."""
        super().check()
        require(self.images >= 2, "images", self.images, "at least 2, and 64 for a useful interval")
        require(self.out is None or self.out.endswith(".json"), "out", self.out, "a .json file")


@dataclass(frozen=True)
class ModelsSettings:
    """Settings of ``tropism models``."""

    model: str | None = None
    """As in training: say what it is; none: list the families."""


@dataclass(frozen=True)
class ExportSettings:
    """Settings of ``tropism export``."""

    run: str | None = None
    """Folder of a run, of its adapter or of a checkpoint."""
    format: ExportFormat = "diffusers"
    """For whom: diffusers, peft, kohya (sd-scripts, WebUI) or comfyui."""
    merge: bool = False
    """Write the whole pipeline with what was trained inside its weights (diffusers only; a full run has to)."""
    model: str | None = None
    """The model that was trained; none: as the run's config.yaml says."""
    out: str | None = None
    """A new or empty folder; none: export-FORMAT in the run."""
    precision: Literal["float32", "float16", "bfloat16"] = "float32"
    """Number format of the weights that are written; float32 keeps a LoRA exactly."""

    def check(self) -> None:
        """Raises BadInput."""
        if self.run is None:
            raise BadInput("run is not given; wanted the folder of a run, as in tropism export runs/demo-1")
        if self.merge and self.format != "diffusers":
            raise BadInput(f"merge is given with format {self.format}; wanted diffusers, the one for whole pipelines")


@dataclass(frozen=True)
class DemoSettings:
    """Settings of ``tropism demo``; none: as in its preset."""

    out: str | None = None
    """Folder of the run, new or empty; none: runs/demo-NUMBER."""
    steps: int | None = None
    """Batches of images to learn from."""
    seed: int | None = None
    """Of everything that is drawn in training."""
    device: str | None = None
    """Such as cpu, cuda or cuda:1; none: a GPU if there is one."""
    threads: int | None = None
    """Processor threads; none: as torch decides."""
    preset: str | None = None
    """A YAML file with a method and its settings; none: the one in the package."""


def require(condition: bool, name: str, value: Any, wanted: str) -> None:
    """Raises BadInput, naming the field, unless the condition holds."""
    if not condition:
        raise BadInput(f"{name} is {value}; wanted {wanted}")


def config_entries(method: str, settings: TrainSettings, method_settings: Any) -> dict[str, Any]:
    """Everything needed to run again, as YAML keeps it, but for the folder: a run is never written over another."""
    entries = asdict(settings) | asdict(method_settings)
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in entries.items()}
    return {"method": method} | {name: value for name, value in plain.items() if name not in ("out", "resume")}


def save_config(file: Path, method: str, settings: TrainSettings, method_settings: Any) -> None:
    """``config_entries`` as a YAML file."""
    head = f"# tropism {__version__}; run again with: tropism train {method} --config {file}\n"
    entries = config_entries(method, settings, method_settings)
    file.write_text(head + yaml.safe_dump(entries, sort_keys=False, allow_unicode=True))


def read_config(path: str | Path) -> dict[str, Any]:
    """The entries of a YAML file, their names with underscores. Raises BadInput for what is not such a file."""
    file = Path(path)
    if not file.is_file():
        raise BadInput(f"there is no configuration file {path}; give a YAML file of settings")
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), PlainLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" at line {mark.line + 1}"
        raise BadInput(f"{path} is not YAML{where}; wanted lines such as 'learning_rate: 3e-4'") from error
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise BadInput(f"{path} holds no settings by name; wanted lines such as 'learning_rate: 3e-4'")
    return {name.replace("-", "_"): value for name, value in content.items()}


class PlainLoader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML as people write it: 3e-4 is a number, and only true and false are truth values (``no`` is a word)."""


PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if not tag.endswith((":bool", ":float", ":timestamp"))]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_NUMBER = r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?$"
PlainLoader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_NUMBER), list("-+.0123456789"))
PlainLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"true$|True$|false$|False$"), list("tTfF"))


# Words.


def one_line(error: BaseException) -> str:
    """What an exception says: its first line, without a full stop."""
    said = str(error).strip().split("\n")[0].rstrip(". ")
    return said or type(error).__name__


def suggest(name: str, known: Iterable[str]) -> str:
    """What was perhaps meant, or all there is."""
    names = list(known)
    likely = difflib.get_close_matches(name, names, 1, 0.6)
    return f"did you mean {likely[0]}?" if likely else "wanted one of " + ", ".join(names)
