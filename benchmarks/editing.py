"""Pictures whose caption changes in one word: InfEdit against DDIM inversion and SDEdit, on drawn scenes.

Each of ``--pictures`` single objects a seed is drawn by the renderer, and its caption changed in colour, shape or
background, in turn. Of every way: how often the verifier accepts the edit under the new caption, and how much of what
the captions share has changed: the mean squared error (pixels in [0, 1]) outside a disc around the object, or of the
inside of the object where the background changes; where the edited object stands, and how large it is.

    python benchmarks/editing.py --seeds 0 1 2
    python benchmarks/editing.py --attributes color --ways infedit:0.7 infedit:0.7+cross:1
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from guiding import head, load, row, said, told
from torch import Tensor

from tropism import pictures
from tropism.counting import Counted
from tropism.evaluate import deterministic
from tropism.guidance import ROW
from tropism.randomness import normal, row_generators, row_seeds
from tropism.samplers import invert, walk
from tropism.samplers.ddcm import DDCM
from tropism.worlds.scenes import alter, caption, render, sample_scene, verify
from tropism.worlds.scenes.render import REACH, Placed, coverage, place
from tropism.worlds.scenes.verify import look

ATTRIBUTES = ("color", "shape", "background")
SHARED = "infedit:0.7+cross:1+self:1"
WAYS = ("inversion", "sdedit:0.4", "infedit", "infedit:0.7", "infedit:0.7+guidance:1.5", SHARED,
        SHARED + "+guidance:1.5", "lcm:0.5", "dmd:0.5")  # fmt: skip
FEW = {"lcm": "scenes-lcm", "dmd": "scenes-dmd"}
BESIDE = 3  # pixels between the object and what is called outside


@dataclass(frozen=True)
class Task:
    """Pictures and their two captions."""

    images: Tensor  # (N, 3, 64, 64)
    before: Sequence[str]
    after: Sequence[str]
    attribute: Sequence[str]
    placed: Sequence[Placed]
    kept: Tensor  # (N, 64, 64) bool: what both captions say alike
    seed: int


def task_of(seed: int, count: int, attributes: Sequence[str]) -> Task:
    """``count`` single objects, drawn by the renderer."""
    rng, rows = np.random.default_rng(1000 + seed), []
    for number in range(count):
        scene, name = sample_scene(rng, "any", "single"), attributes[number % len(attributes)]
        other, (item,) = alter(scene, rng, name), place(scene, number)
        rows.append((render(scene, number), caption(scene), caption(other), name, item, kept_of(item, name)))
    images, before, after, names, items, kept = zip(*rows, strict=True)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    return Task(pixels, before, after, names, items, torch.from_numpy(np.stack(kept)), seed)


def kept_of(item: Placed, attribute: str) -> np.ndarray:
    """(64, 64) bool: inside the object where the background changes, otherwise outside a disc that holds any shape."""
    if attribute == "background":
        return coverage(item.shape, item.radius - 1, item.turn, item.x, item.y, 64) == 255
    y, x = np.mgrid[:64, :64] + 0.5
    return np.hypot(x - item.x, y - item.y) > REACH * item.radius + BESIDE


@dataclass(frozen=True)
class Edited:
    """What came out, and what it cost."""

    images: Tensor
    calls: float
    seconds: float


def edit(way: str, models: dict[str, Any], task: Task, steps: int, batch: int) -> Edited:
    """By NAME[:NUMBER][+SETTING:NUMBER ...]: see ``WAYS``."""
    name, *settings = way.split("+")
    name, _, number = name.partition(":")
    few = name.partition("-")[0]
    model = models[FEW.get(few, "scenes-sd")]
    name = name.removeprefix(few).lstrip("-") or "infedit" if few in FEW else name
    counted, images = Counted(model), []
    policy = deterministic(counted, 4 if few in FEW else steps, microbatch=batch)
    by: dict[str, Callable[..., Tensor]] = {
        "autoencoder": by_nothing, "inversion": by_inversion, "sdedit": by_sdedit, "infedit": by_infedit,
    }  # fmt: skip
    told = {} if not settings else {"settings": dict(each.split(":") for each in settings)}
    run = partial(by[name], policy, number=float(number) if number else None, **told)
    started = time.process_time()
    seeds = row_seeds(len(task.images), torch.Generator().manual_seed(task.seed))
    with torch.no_grad():
        for rows in torch.arange(len(task.images)).split(batch):
            before, after = ([text[i] for i in rows.tolist()] for text in (task.before, task.after))
            clean, generators = model.latents(task.images[rows]), row_generators(seeds[rows])
            noise = normal(clean.shape, generators, clean.device)
            images.append(model.decode(run(clean, noise, before, after, generators)).float())
    count = len(task.images)
    return Edited(torch.cat(images), counted.rows / count, (time.process_time() - started) / count)


def by_nothing(policy: Any, clean: Tensor, *others: Any, **settings: Any) -> Tensor:
    """Through the autoencoder only."""
    return clean


def by_infedit(
    policy: Any, clean: Tensor, noise: Tensor, before: Any, after: Any, generators: Any, number: float | None = None,
    settings: dict[str, str] | None = None,
) -> Tensor:  # fmt: skip
    """``number`` is the share of the moves; ``settings`` are cross, self, blend, and guidance."""
    said = {name: float(value) for name, value in (settings or {}).items()}
    policy = policy.with_(guidance=said.pop("guidance", None))
    attending = None
    if said:
        shares = said.get("cross", 0.0), said.get("self", 0.0), said.get("blend")
        attending = policy.model.shared_attention(before, after, *shares)
    walker = DDCM(clean, policy.model.encode(before), ROW, number or 1.0, attending)
    cond = {**policy.model.encode(after), ROW: torch.arange(len(clean))}
    *_, last = walker(policy.kernel, policy.denoiser, noise, policy.ts, cond, generators)
    return last.x_next


def by_inversion(
    policy: Any, clean: Tensor, noise: Tensor, before: Any, after: Any, generators: Any, number: float | None = None
) -> Tensor:
    """Up with the old caption, without guidance, and down with the new one; ``number`` is the guidance down."""
    found = invert(policy.with_(guidance=1.0).denoiser, clean, policy.ts, policy.model.encode(before))
    down = policy if number is None else policy.with_(guidance=number)
    *_, last = down.chain(found, policy.model.encode(after), generators)
    return last.x_next


def by_sdedit(
    policy: Any, clean: Tensor, noise: Tensor, before: Any, after: Any, generators: Any, number: float | None = None
) -> Tensor:
    """Noised to the last ``number`` of the moves, and drawn from there (2108.01073)."""
    moves = max(1, round((number or 0.5) * policy.steps))
    ts, schedule = policy.ts[-moves - 1 :], policy.denoiser.schedule
    x = schedule.alpha(ts[:1]) * clean + schedule.sigma(ts[:1]) * noise
    *_, last = walk(policy.kernel, policy.denoiser, x, ts, policy.model.encode(after), generators)
    return last.x_next


@dataclass(frozen=True)
class Judged:
    """(N,) each; NaN where no object is seen."""

    verified: Tensor
    error: Tensor  # of what is kept, mean square
    away: Tensor  # pixels from where the object was
    size: Tensor  # radius over that of the object, minus 1, absolute


def judge(images: Tensor, task: Task) -> Judged:
    """Of edits (N, 3, 64, 64)."""
    verified = [float(verify(image.numpy(), text).passed) for image, text in zip(images, task.after, strict=True)]
    error = [
        float((one - other).square().mean(0)[kept].mean())
        for one, other, kept in zip(images, task.images, task.kept, strict=True)
    ]
    away, size = zip(*(seen_at(image, item) for image, item in zip(images, task.placed, strict=True)), strict=True)
    return Judged(*(torch.tensor(values) for values in (verified, error, away, size)))


def seen_at(image: Tensor, item: Placed) -> tuple[float, float]:
    """Of the largest object that is seen."""
    objects = look(image.numpy()).objects
    if not objects:
        return float("nan"), float("nan")
    found = objects[0]
    return float(np.hypot(found.x + 0.5 - item.x, found.y + 0.5 - item.y)), abs(found.radius / item.radius - 1)


def joined(parts: Sequence[Judged]) -> Judged:
    """Of several seeds."""
    names = ("verified", "error", "away", "size")
    return Judged(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def show(options: Any, task: Task, drawn: dict[str, Tensor]) -> None:
    """A row a way, the pictures first."""
    shown = 12
    rows = [task.images[:shown], *(images[:shown] for images in drawn.values())]
    pictures.save(pictures.grid(torch.cat(rows), [""] * (shown * len(rows)), columns=shown), options.pictures_file)


def main() -> None:
    """Edits, judges, prints; the first way is what the others are paired with."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--ways", nargs="+", default=list(WAYS))
    flags.add_argument("--attributes", nargs="+", default=list(ATTRIBUTES), choices=ATTRIBUTES)
    flags.add_argument("--pictures", type=int, default=64, help="a seed")
    flags.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    flags.add_argument("--steps", type=int, default=10, help="moves of scenes-sd")
    flags.add_argument("--batch", type=int, default=32)
    flags.add_argument("--pictures-file", type=Path, help="where the first pictures of the first seed go, as a grid")
    options = flags.parse_args()
    wanted = {FEW.get(way.partition(":")[0].partition("-")[0].partition("+")[0], "scenes-sd") for way in options.ways}
    models = {name: load(name) for name in wanted}
    tasks = [task_of(seed, options.pictures, options.attributes) for seed in options.seeds]
    names = [name for task in tasks for name in task.attribute]
    head("way", "calls", "CPU s", "verified", "paired", *(f"verified, {each}" for each in options.attributes),
         "error outside, 1e-3", "paired", "error inside", "moved, pixels", "size changed",
         "verified, each seed")  # fmt: skip
    drawn: dict[str, Tensor] = {}
    base: Judged | None = None
    for way in ["autoencoder", *options.ways]:
        edits = [edit(way, models, task, options.steps, options.batch) for task in tasks]
        found = [judge(each.images, task) for each, task in zip(edits, tasks, strict=True)]
        whole = joined(found)
        base = whole if base is None and way != "autoencoder" else base
        drawn[way] = edits[0].images
        against = base or whole
        of = [torch.tensor([name == each for name in names]) for each in options.attributes]
        outside = torch.tensor([name != "background" for name in names])
        inside = float(1e3 * whole.error[~outside].mean())
        row(
            way, f"{edits[0].calls:.1f}", f"{np.mean([each.seconds for each in edits]):.2f}",
            said(whole.verified), told(against.verified, whole.verified),
            *(f"{float(whole.verified[rows].mean()):.3f}" for rows in of),
            said(1e3 * whole.error[outside], 2), told(1e3 * against.error[outside], 1e3 * whole.error[outside], 2),
            f"{inside:.1f}",
            f"{float(whole.away.nanmean()):.2f}", f"{float(whole.size.nanmean()):.3f}",
            ", ".join(f"{float(each.verified.mean()):.3f}" for each in found),
        )  # fmt: skip
    if options.pictures_file:
        show(options, tasks[0], drawn)


if __name__ == "__main__":
    main()
