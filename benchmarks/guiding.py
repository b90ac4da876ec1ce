"""What the benchmarks of guides share: chains from the same noise, what they cost, what they are worth, SSIM."""

from __future__ import annotations

import argparse
import datetime
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from side_by_side import machine
from torch import Tensor
from torch.nn.functional import conv2d

from tropism import catalog
from tropism.adaptive import Walk
from tropism.base import Denoiser, take
from tropism.counting import Counted
from tropism.data.prompts import PromptSet
from tropism.evaluate import first_images, interval, paired_gain
from tropism.guidance import ROW, Guided
from tropism.randomness import normal, row_generators, row_seeds
from tropism.samplers import solver, walk


@dataclass(frozen=True)
class Drawn:
    """Pictures and what they cost."""

    images: Tensor  # (N, 3, H, W) in [0, 1]
    calls: float  # rows of the network, an image
    seconds: float  # of this process, an image, drawn and decoded


def draw(
    model: Any,
    text: Sequence[str],
    *,
    steps: int = 20,
    seed: int = 0,
    batch: int = 32,
    along: Walk = walk,
    guide: Callable[[Denoiser], Denoiser] = lambda denoiser: denoiser,
    kernel: Any = None,
    guidance: float | None = None,
) -> Drawn:
    """An image a caption, image i from the noise of (seed, i), as evaluation draws them."""
    counted, images, started = Counted(model), [], time.process_time()
    scale = model.guidance_scale if guidance is None else guidance
    denoiser = guide(Guided(counted.denoiser, model.null(), scale))
    seeds = row_seeds(len(text), torch.Generator().manual_seed(seed))
    with torch.no_grad():
        cond = {**model.encode(text), ROW: torch.arange(len(text))}
        for rows in torch.arange(len(text)).split(batch):
            generators = row_generators(seeds[rows])
            x = normal((len(rows), *model.latent_shape), generators, torch.device("cpu"))
            moves = along(kernel or solver(denoiser), denoiser, x, model.grid(steps), take(cond, rows), generators)
            *_, last = moves
            images.append(model.decode(last.x_next).float())
    return Drawn(torch.cat(images), counted.rows / len(text), (time.process_time() - started) / len(text))


def captions(name: str) -> list[str]:
    """Of a prompt set by name, such as scenes-held-out:256."""
    prompts: PromptSet = catalog.read_prompt_set(name)
    return list(first_images(prompts, len(prompts)).text)


def scores(name: str, images: Tensor, text: Sequence[str], model: str = "scenes") -> Tensor:
    """(N,) of a reward by name."""
    reward = catalog.build_reward(catalog.parse_reward(name), model, torch.device("cpu"))
    parts = torch.arange(len(text)).split(64)
    with torch.no_grad():
        return torch.cat([reward(images[rows], [text[row] for row in rows]) for rows in parts])


def ssim(one: Tensor, other: Tensor) -> Tensor:
    """(N,) mean structural similarity of images (N, 3, H, W) in [0, 1] (Wang et al. 2004): Gaussian window of 11 with
    standard deviation 1.5, constants 0.01^2 and 0.03^2, valid positions, mean over colours."""
    at = torch.arange(11.0) - 5
    line = (-(at**2) / 4.5).exp()
    window = (line[:, None] * line[None] / line.sum() ** 2)[None, None]

    def mean(values: Tensor) -> Tensor:
        return conv2d(values.flatten(0, 1)[:, None], window).reshape(*values.shape[:2], -1)

    a, b = mean(one), mean(other)
    aa, bb, ab = mean(one * one) - a * a, mean(other * other) - b * b, mean(one * other) - a * b
    value = (2 * a * b + 1e-4) * (2 * ab + 9e-4) / ((a * a + b * b + 1e-4) * (aa + bb + 9e-4))
    return value.flatten(1).mean(1)


def cells(drawn: Drawn, scored: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> list[str]:
    """Of a table: calls, CPU seconds, and each score with its 95 % interval and its paired gain over the base."""
    out = [f"{drawn.calls:.1f}", f"{drawn.seconds:.2f}"]
    for name, values in scored.items():
        out += [said(values), told(base[name], values)]
    return out


def said(values: Tensor, digits: int = 3) -> str:
    """A mean with its interval."""
    own = interval(values)
    return f"{own.mean:.{digits}f} ({own.low:.{digits}f} to {own.high:.{digits}f})"


def told(base: Tensor, values: Tensor, digits: int = 3) -> str:
    """A paired gain with its interval."""
    gain = paired_gain(base, values)
    return f"{gain.mean:+.{digits}f} ({gain.low:+.{digits}f} to {gain.high:+.{digits}f})"


def row(*cells: str) -> None:
    """Prints a row of a table."""
    print("| " + " | ".join(cells) + " |", flush=True)


def head(*cells: str) -> None:
    """Prints the head of a table, and what it was made on."""
    print(f"{datetime.date.today()}, {machine()['processor']}, {torch.get_num_threads()} thread")
    row(*cells)
    print("|" + "---|" * len(cells))


def load(name: str, precision: str = "bf16") -> Any:
    """A shipped model."""
    torch.set_num_threads(1)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    return catalog.load_model(name, dtype, torch.device("cpu"))


def parser(description: str | None, captions: str = "scenes-held-out:256") -> argparse.ArgumentParser:
    """The flags that these benchmarks have."""
    flags = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--model", default="scenes-flow")
    flags.add_argument("--captions", default=captions)
    flags.add_argument("--steps", type=int, default=20)
    flags.add_argument("--seed", type=int, default=0)
    return flags
