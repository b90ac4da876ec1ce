"""How much memory a run will need, phase by phase, before it begins: weights counted, network calls measured.

The plan is arithmetic on a ``Footprint`` (see ``footprint``) and the settings, so that it can be asked again with other
settings. Not seen is what a reward holds outside torch; what an allocator keeps beyond what is in use is an allowance.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tropism.base import Cond
from tropism.footprint import Footprint, Line, call_sizes, measure, weight_bytes

MIB = 2**20
FLOAT = 4  # bytes; latents, images and all that is trained are float32
SPARE_SHARE, SPARE_MOST = {"cpu": 0.5, "gpu": 0.1}, 300 * MIB
"""What allocators hold beyond what is in use. glibc's heap was seen to hold up to 0.8 of small working sets and up to
500 MiB of large ones (docs/memory.md); torch's blocks on a GPU were not measured here."""
Kind = Literal["policy gradient", "direct gradient", "regression"]


NOTHING = Line(0, 0)
Score = Callable[[Tensor], Tensor]


class Row(NamedTuple):
    """One line of the plan."""

    phase: str
    mib: float
    note: str


@dataclass(frozen=True)
class Needs:
    """What the plan is computed from; bytes but for counts."""

    kind: Kind
    footprint: Footprint
    models: Mapping[str, int]  # by part, without what is trained
    trained: int  # parameters
    process: int = 0  # held by the process beside the models: libraries, a device's context
    full: bool = False  # all weights are trained, and a frozen copy is kept
    ema: bool = False
    images: int = 64  # of a step
    kept: int = 64  # of those, the ones that a regression learns from
    sample_batch: int = 64
    minibatch: int = 64
    updates: int = 1  # optimizer steps that a pass over a rollout is divided among
    moves: int = 20  # of a chain
    window: int = 1  # moves that keep a graph
    guided: bool = True  # every row of a chain is two of the network's
    latent: int = 0  # one latent
    prompt: int = 0  # one encoded prompt
    picture: int = 0  # one image
    reward: Line = NOTHING  # of images; with a graph where the reward is differentiated
    checkpointing: bool = False
    half: bool = False  # frozen weights of 16 bits
    on_gpu: bool = False


def plan(needs: Needs) -> list[Row]:
    """The phases, and at the end the most that is resident. What is said of a phase comes on top of the first rows."""
    always = {
        "process": (needs.process, "libraries and the device's context, measured"),
        "models": (sum(needs.models.values()) + _copy(needs), _said(needs)),
        "training": (_training(needs), f"{needs.trained:,} parameters: they, gradients, AdamW" + ", EMA" * needs.ema),
    }
    working = {
        "rollout": (_rollout(needs), f"{needs.images} chains, {needs.sample_batch} at once (sample_batch)"),
        "reward": (_reward(needs), f"{needs.images} images, decoded {needs.sample_batch} at once"),
        "backward": (_backward(needs), f"{needs.minibatch} rows at once (minibatch)" + _moves(needs)),
    }
    largest = max(working, key=lambda phase: working[phase][0])
    working["spare"] = (_spare(needs, working[largest][0]), "freed, and kept by the allocator; a share of the above")
    total = sum(size for size, _ in always.values()) + working[largest][0] + working["spare"][0]
    rows = [Row(phase, size / MIB, note) for phase, (size, note) in (always | working).items()]
    return [*rows, Row("peak", total / MIB, f"in {largest}; lower it by {levers(needs, largest)}")]


def _said(needs: Needs) -> str:
    parts = [f"{name} {size / MIB:.0f}" for name, size in needs.models.items() if size]
    return " + ".join([*parts, *([f"frozen copy {_copy(needs) / MIB:.0f}"] if needs.full else [])])


def _copy(needs: Needs) -> int:
    return needs.trained * FLOAT if needs.full else 0


def _training(needs: Needs) -> int:
    """Weights, gradients, AdamW's two moments; an average, and what is set aside while it is evaluated."""
    return needs.trained * FLOAT * (4 + 2 * needs.ema)


def _rows(needs: Needs, rows: int) -> int:
    return rows * (2 if needs.guided else 1)


def _call(needs: Needs, line: Line, rows: int) -> float:
    """A network call for so many chains, with the rows that guidance puts together for it."""
    asked = _rows(needs, rows)
    return line.at(asked) + (asked + rows) * (needs.prompt + 2 * needs.latent)


def _states(needs: Needs) -> int:
    """What a rollout leaves until the step is over; all states of a chain are put together once."""
    kept = needs.latent * (2 * (needs.moves + 1) if needs.kind == "policy gradient" else 1)
    return needs.images * (kept + needs.prompt)


def _rollout(needs: Needs) -> float:
    if needs.kind == "direct gradient":  # chains run inside the loss
        return 0.0
    return _states(needs) + _call(needs, needs.footprint.forward, min(needs.sample_batch, needs.images))


def _reward(needs: Needs) -> float:
    if needs.kind == "direct gradient":
        return 0.0
    pictures = needs.images * needs.picture
    decoding = needs.footprint.decode.at(min(needs.sample_batch, needs.images))
    return _states(needs) + pictures + max(decoding, needs.reward.at(needs.images))


def _backward(needs: Needs) -> float:
    some = {"policy gradient": needs.images * needs.moves, "direct gradient": needs.images, "regression": needs.kept}
    rows, foot = min(needs.minibatch, -(-some[needs.kind] // needs.updates)), needs.footprint
    if needs.kind == "regression":
        needs = replace(needs, guided=False)
    if needs.kind != "direct gradient":
        return max(_states(needs) + _call(needs, foot.backward, rows), _step(needs))
    graph, once = _call(needs, foot.held, rows), _call(needs, foot.backward, rows)
    picture = foot.decode_held.at(rows) + needs.reward.at(rows) + rows * needs.picture
    ends = (needs.window * graph + max(picture, foot.decode_backward.at(rows)), (needs.window - 1) * graph + once)
    return max(_states(needs) + max(ends), _step(needs))


def _step(needs: Needs) -> int:
    return needs.trained * FLOAT if needs.on_gpu else 0


def _spare(needs: Needs, working: float) -> float:
    share = working * SPARE_SHARE["gpu" if needs.on_gpu else "cpu"]
    return share if needs.on_gpu else min(share, SPARE_MOST)


def _moves(needs: Needs) -> str:
    return f", a graph of {needs.window} of {needs.moves} moves" if needs.kind == "direct gradient" else ""


def levers(needs: Needs, phase: str) -> str:
    """What lowers a phase, with the peak that each would leave, as far as that is known without measuring again."""
    name = {"rollout": "sample_batch", "reward": "sample_batch", "backward": "minibatch"}[phase]
    rows = min(getattr(needs, name), needs.images)
    changes: dict[str, dict[str, Any]] = {}
    if rows > 1:
        changes[f"{name} {max(1, rows // 4)}"] = {name: max(1, rows // 4)}
    if phase == "backward" and needs.window > 1:
        changes["a window of one move"] = {"window": 1}
    if phase != "backward" and needs.images > 1:
        changes["half as many images a step"] = {"images": needs.images // 2}
    found = [f"{said} ({_peak_of(replace(needs, **change)):.0f} MiB)" for said, change in changes.items()]
    unmeasured = {
        "gradient_checkpointing": phase == "backward" and not needs.checkpointing,
        "a LoRA instead of full": needs.full,
        "mixed_precision bf16": not needs.half,
    }
    return ", ".join([*found, *(said for said, open_ in unmeasured.items() if open_)]) or "another model"


def _peak_of(needs: Needs) -> float:
    always = needs.process + sum(needs.models.values()) + _copy(needs) + _training(needs)
    largest = max(_rollout(needs), _reward(needs), _backward(needs))
    return (always + largest + _spare(needs, largest)) / MIB


# From a loaded model.


def memory_plan(
    model: Any,
    settings: Any,
    method_settings: Any,
    device: torch.device,
    score: Score | None = None,
) -> list[Row]:
    """The plan of a run with a loaded model, LoRA added, in the process that will run it. ``score`` asks the reward:
    images (N, 3, H, W) -> (N,). Nothing of the model is changed."""
    return plan(needs_of(model, settings, method_settings, device, score))


def needs_of(
    model: Any,
    settings: Any,
    method_settings: Any,
    device: torch.device,
    score: Score | None = None,
) -> Needs:
    """Measures what ``memory_plan`` computes with."""
    cond: Cond = model.null()
    kind, window = method_kind(method_settings), gradient_window(method_settings)
    trained = model.parameters()
    with torch.no_grad():
        picture = model.decode(torch.zeros(1, *model.latent_shape, device=model.device)).nbytes
    components = getattr(model.pipe, "components", {model.part: getattr(model.pipe, model.part)})
    models = weight_bytes(components, without=trained)
    guidance = method_settings.guidance_scale
    needs = Needs(
        kind=kind,
        footprint=measure(model, cond, graph_to_noise=kind == "direct gradient"),
        models=models,
        trained=sum(parameter.numel() for parameter in trained),
        full=settings.full,
        ema=settings.ema > 0,
        images=method_settings.prompts_per_step * method_settings.images_per_prompt,
        kept=_kept(method_settings),
        sample_batch=method_settings.sample_batch,
        minibatch=method_settings.minibatch,
        updates=getattr(method_settings, "updates", 1),
        moves=method_settings.inference_steps,
        window=window,
        guided=(model.guidance_scale if guidance is None else guidance) != 1,
        latent=FLOAT * torch.Size(model.latent_shape).numel(),
        prompt=sum(value.nbytes for value in cond.values()),
        picture=picture,
        reward=NOTHING if score is None else _score_line(model, score, kind == "direct gradient"),
        checkpointing=settings.gradient_checkpointing,
        half=settings.mixed_precision != "no",
        on_gpu=device.type == "cuda",
    )
    weights = sum(models.values()) + _copy(needs) + needs.trained * FLOAT
    return replace(needs, process=max(0, round(resident_bytes(device) - weights)))


def method_kind(settings: Any) -> Kind:
    """How the method of these settings learns: on moves, through the chain, or on kept samples."""
    if hasattr(settings, "window"):
        return "direct gradient"
    return "regression" if hasattr(settings, "weigh") else "policy gradient"


def _kept(settings: Any) -> int:
    """Of the images of a step, how many have weight when all rewards differ."""
    group = settings.images_per_prompt
    if not hasattr(settings, "weigh"):
        return int(settings.prompts_per_step * group)
    weight = settings.weigh()(torch.linspace(0, 1, group), torch.zeros(group, dtype=torch.int64))
    return int(settings.prompts_per_step * weight.count_nonzero())


def gradient_window(settings: Any) -> int:
    """Most moves that keep a graph at once."""
    if not hasattr(settings, "window"):
        return 1
    window, steps = settings.window(), settings.inference_steps
    spans = (window(steps, torch.Generator().manual_seed(seed)) for seed in range(64))
    return int(getattr(window, "longest", None) or max(span.last - span.first for span in spans))


def _score_line(model: Any, score: Score, graph: bool) -> Line:
    """Bytes that the reward needs by images."""
    with torch.no_grad():
        picture = model.decode(torch.zeros(1, *model.latent_shape, device=model.device))

    def size(count: int) -> int:
        images = picture.repeat(count, 1, 1, 1).requires_grad_(graph)
        return max(call_sizes(lambda: score(images), graph))

    size(1)
    one, two = size(1), size(2)
    return Line(2 * one - two, two - one)


# The device.


def resident_bytes(device: torch.device) -> int:
    """What this process holds on the device: pages in memory, or a GPU's blocks in use and its context."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        others = max(0, total - free - torch.cuda.memory_reserved(device))
        return others + torch.cuda.memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():
        return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    import resource  # where there is no /proc: the most so far, in kilobytes, on a Mac in bytes

    unit = 1 if os.uname().sysname == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_mib(device: torch.device) -> float:
    """What can still be had: a GPU's free memory and torch's own spare blocks; of a processor, what Linux calls
    available, within the limit of the control group; elsewhere all its memory."""
    if device.type == "cuda":
        spare = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (torch.cuda.mem_get_info(device)[0] + spare) / MIB
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / MIB
    lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) / 1024
    limit = _group_left()
    return available if limit is None else min(available, limit)


def _group_left() -> float | None:
    """MiB that the control group (a container's limit) still allows; none where it has no limit."""
    group = Path("/sys/fs/cgroup")
    try:
        most, used = (group / "memory.max").read_text().strip(), int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return None
    return None if most == "max" else max(0, int(most) - used) / MIB
