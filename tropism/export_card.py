"""The model card of an export: what it is, pictures, how it is loaded, what its rewards did, and the settings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tropism import __version__
from tropism.card import front_matter, setting_rows
from tropism.catalog import SHIPPED, parse_reward
from tropism.config import BadInput
from tropism.export_header import Facts

if TYPE_CHECKING:
    from tropism.models.exported import Base, Drawing


class Exported(NamedTuple):
    """What the card tells of."""

    kind: str  # diffusers, peft, kohya, comfyui or merged
    facts: Facts
    base: Base
    name: str  # of the file, without .safetensors, where the format leaves that open
    settings: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]  # of the metrics, up to the step
    pictures: Sequence[str]
    drawing: Drawing | None = None  # of a student


def render(exported: Exported) -> str:
    """The whole text."""
    facts = exported.facts
    what = "A whole pipeline" if exported.kind == "merged" else f"A LoRA in the format of {exported.kind}"
    steps = "" if facts.step is None else f", {facts.step} steps"
    done = "on the reward" if exported.drawing is None else f"to draw in {exported.drawing.steps} moves, judged by"
    lines = [
        front_matter(facts.model, facts.method, lora=exported.kind != "merged"),
        f"# {facts.title}",
        "",
        f"{what}, trained by tropism {__version__} with {facts.method} {done} `{facts.rewards}`{steps}.",
        "",
        *(line for name in exported.pictures for line in (f"![{_alt(name)}]({name})", "")),
        "## Use",
        "",
        *use(exported),
        "",
        *_rewards(exported),
    ]
    if exported.settings:
        lines += ["## Settings", "", "| setting | value |", "|---|---|", *setting_rows(exported.settings), ""]
    return "\n".join(lines)


def _alt(name: str) -> str:
    return "The same prompts and seeds, both evaluations" if name.startswith("before") else "Samples"


def use(exported: Exported) -> Iterable[str]:
    """How the export is loaded."""
    name, part = f"{exported.name}.safetensors", exported.base.part
    base = repr(exported.facts.model)
    lines = ["from diffusers import DiffusionPipeline", ""]
    if exported.facts.model in SHIPPED:
        lines.insert(0, "from tropism.catalog import check_model")
        base = f"check_model({base})"
    lines.append(f"pipe = DiffusionPipeline.from_pretrained({base})")
    drawing = exported.drawing
    if drawing is not None:
        yield f"It was made for {drawing.steps} steps with guidance {drawing.guidance_scale:g}."
        yield ""
    if exported.kind == "merged":
        lines = ["from diffusers import DiffusionPipeline", "", 'pipe = DiffusionPipeline.from_pretrained(".")']
    elif exported.kind == "diffusers":
        lines.append('pipe.load_lora_weights(".")')
    elif exported.kind == "peft":
        lines.insert(1, "from peft import PeftModel")
        lines.append(f'pipe.{part} = PeftModel.from_pretrained(pipe.{part}, ".")')
    elif exported.kind == "comfyui":
        yield f"Put `{name}` into `ComfyUI/models/loras` and choose it in a *Load LoRA (Model)* node, strength 1."
        return
    elif part == "transformer":
        yield f"`{name}` is for sd-scripts (`--lora_weights {name}` of its minimal inference scripts) and ComfyUI."
        return
    else:
        yield f"`{name}` goes into `models/Lora` of WebUI or Forge, is `--network_weights` of sd-scripts; in diffusers:"
        yield ""
        lines.append(f'pipe.load_lora_weights(".", weight_name="{name}")')
    if drawing is not None and exported.kind != "merged":
        lines = [*drawing.imports, *lines, *drawing.lines]
    yield "```python"
    yield from lines
    yield "```\n\nThe dot is the folder of this file."


def _rewards(exported: Exported) -> Iterable[str]:
    """Means over the evaluation's images before training and at the last evaluation up to the step."""
    tested = [row for row in exported.rows if isinstance(row.get("eval_reward"), int | float)]
    if not tested:
        return
    first, last = tested[0], tested[-1]
    yield from ("## Rewards", "")
    yield f"Means at steps {first['step']} and {last['step']}, the same prompts from the same noise, without chance."
    ends = "before | after" if exported.drawing is None else "teacher | student"
    yield from ("", f"| reward | {ends} |", "|---|---|---|")
    names = {f"eval_{name}": name for name in _names(exported.settings.get("reward"))}
    for key, name in (names if len(names) == 1 else names | {"eval_reward": "weighted sum"}).items():
        if key in first and key in last:
            yield f"| {name} | {_number(first[key])} | {_number(last[key])} |"
    if {"eval_gain", "eval_gain_low", "eval_gain_high", "eval_win_rate"} <= set(last):
        gain, low, high, wins = (last[f"eval_{key}"] for key in ("gain", "gain_low", "gain_high", "win_rate"))
        yield ""
        yield (
            f"Gain {_number(gain)} (95 % interval {_number(low)} to {_number(high)}); "
            f"better in {_number(100 * wins if isinstance(wins, int | float) else wins)} % of the pairs."
        )
    yield ""


def _names(rewards: Any) -> Iterable[str]:
    for text in rewards if isinstance(rewards, list) else []:
        try:
            yield parse_reward(str(text)).name
        except BadInput:  # of a later version; the sum is told all the same
            continue


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) and math.isfinite(value) else "no score"
