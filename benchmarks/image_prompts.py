"""Image prompts on the shipped Stable-Diffusion-shaped pipeline: agreement, style without content, two references.

Every picture is drawn from the noise of (seed, number of the case); objects are read by the verifier. References are
held-out combinations, drawn afresh. Prompts leave out the colours of objects, or their shapes, which can then only come
from a reference.

    python benchmarks/image_prompts.py agreement style pair
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from guiding import head, load, row
from PIL import Image
from torch import Tensor

from tropism import pictures
from tropism.catalog import WEIGHTS
from tropism.evaluate import deterministic, draw_images
from tropism.image_prompts import without_content
from tropism.models.image_prompts import Clip, ImagePrompted, adapted, by_relevance, encoder_folder, read_adapter
from tropism.worlds.scenes import BACKGROUNDS, SHAPES, Group, Scene, caption, render, sample_scene
from tropism.worlds.scenes.verify import Found, look

FILE = WEIGHTS / "ip" / "ip_adapter.safetensors"
BLOCKS = (
    "down_blocks.0.attentions.0",
    "mid_block.attentions.0",
    "up_blocks.0.attentions.0",
    "up_blocks.0.attentions.1",
)


How = Callable[[Any, dict[str, Tensor]], Any]


@dataclass(frozen=True)
class Case:
    """A prompt and the objects of its references, one each."""

    text: str
    shown: tuple[Group, ...]

    def reference(self, place: int, seed: int) -> Image.Image:
        """Alone, on a background that follows from the case's place."""
        ground = BACKGROUNDS[(place + seed) % len(BACKGROUNDS)]
        return Image.fromarray(render(Scene((self.shown[place],), None, ground), seed))


def told(scene: Scene, what: str) -> str:
    """Its caption that says of objects only their ``what``: shape, color, or nothing at all."""
    if what == "nothing":
        return ""
    text = caption(scene)
    for group in scene.groups:
        text = text.replace(f"{group.color} {group.shape}", getattr(group, what), 1)
    return re.sub(rf"\ban (?={'|'.join(SHAPES)})", "a ", text)


def cases(count: int, kind: str, rng: np.random.Generator, what: str, another: bool = False) -> list[Case]:
    """Held-out scenes whose prompts all differ. ``another``: the prompt asks for another shape than the reference's."""
    found: dict[str, Case] = {}
    while len(found) < count:
        scene = sample_scene(rng, "held_out", kind)
        groups = tuple(Group(each.shape, each.color) for each in scene.groups)
        if len({each.shape for each in groups}) + len({each.color for each in groups}) < 2 * len(groups):
            continue
        other = str(rng.choice([shape for shape in SHAPES if shape != groups[0].shape]))
        asked = Scene((Group(other, groups[0].color),), None, scene.background) if another else scene
        text = told(asked, what) or " " * len(found)  # prompts are keys here, and blanks are no words
        found.setdefault(text, Case(text, groups))
    return list(found.values())


class Drawer:
    """Draws cases in every way from the same noise."""

    def __init__(self, model: Any, clip: Clip, options: argparse.Namespace, items: list[Case]) -> None:
        self.model, self.clip, self.options, self.items = model, clip, options, items
        each = range(len(items[0].shown))
        self.images = torch.stack([clip.images([case.reference(m, i) for m in each]) for i, case in enumerate(items)])

    def __call__(self, seed: int, how: Callable[[Any, dict[str, Tensor]], Any] | None, images: Tensor | None = None,
                 texts: Sequence[str] | None = None, **scales: Any) -> Tensor:  # fmt: skip
        """(N, 3, H, W); ``how`` makes a model of the view with the adapter and the references of each prompt."""
        texts = [case.text for case in self.items] if texts is None else texts
        model = self.model
        if how is not None:
            own = dict(zip(texts, self.images if images is None else images, strict=True))
            model = how(adapted(self.model, self.options.adapter, **scales), own)
        policy = deterministic(model, self.options.steps, None, self.options.batch)
        return torch.cat([each.float() for each in draw_images(policy, texts, seed)])


def objects(images: Tensor) -> list[tuple[Found, ...]]:
    """What is seen in each picture."""
    return [look(image).objects for image in images.numpy()]


def largest(seen: Sequence[Found]) -> Found:
    """The object of a picture that asks for one; nothing known where there is none."""
    return max(seen, key=lambda each: each.radius) if seen else Found(None, None, 0.0, 0.0, 0.0)


def shares(values: Sequence[float]) -> str:
    """The mean over seeds, and every seed."""
    return f"{np.mean(values):.3f} ({', '.join(f'{value:.2f}' for value in values)})"


def agreement(options: argparse.Namespace, model: Any, clip: Clip) -> None:
    """(a) what the prompt leaves open is the reference's."""
    head("prompt says", "references", "colour is the reference's", "shape is the reference's", "one object", "seconds")
    for what in ("shape", "color", "nothing"):
        items, kept = cases(options.cases, "single", np.random.default_rng(11), what), []
        drawer = Drawer(model, clip, options, items)
        ways: list[tuple[str, How | None, float]] = [("none", None, 1.0)]
        for name, how, scale in [*ways, *((f"scale {each:g}", ImagePrompted, each) for each in options.scales)]:
            color, shape, alone, started = [], [], [], time.perf_counter()
            for seed in options.seeds:
                images = drawer(seed, how, scale=scale)
                seen = objects(images)
                pairs = [(largest(each), case.shown[0]) for each, case in zip(seen, items, strict=True)]
                color.append(np.mean([each.color == group.color for each, group in pairs]))
                shape.append(np.mean([each.shape == group.shape for each, group in pairs]))
                alone.append(np.mean([len(each) == 1 for each in seen]))
                if seed == options.seeds[0]:
                    kept.append(images[:8])
            spent = (time.perf_counter() - started) / (len(items) * len(options.seeds))
            row(what, name, shares(color), shares(shape), shares(alone), f"{spent:.2f}")
        save(options, f"agreement-{what}", items, kept)


def style(options: argparse.Namespace, model: Any, clip: Clip) -> None:
    """(b) which block carries what: colour (style) where the prompt asks for another shape than the reference's, and
    shape (content) where it asks for a colour only; then both with the content's text taken out."""
    drawers = {}
    for what in ("shape", "color"):
        items = cases(options.cases, "single", np.random.default_rng(12), what, another=what == "shape")
        drawers[what] = Drawer(model, clip, options, items)
    chosen = dict.fromkeys(options.style, 1.0)
    ways: list[tuple[str, How | None, float, dict[str, float] | None]] = [("none", None, 0.0, None)]
    ways += [("all blocks", ImagePrompted, 0.0, None)]
    ways += [(f"only {name}", ImagePrompted, 0.0, {name: 1.0}) for name in BLOCKS]
    ways += [(f"all blocks, less {each:g} content", ImagePrompted, each, None) for each in options.subtract]
    ways += [
        (f"style block, less {each:g} content", ImagePrompted, each, chosen) for each in options.subtract if chosen
    ]
    head("blocks", "style: its colour", "its shape, against the prompt's", "the prompt's shape", "content: its shape")
    kept: dict[str, list[Tensor]] = {"shape": [], "color": []}
    for name, how, strength, blocks in ways:
        found: dict[str, list[float]] = {"color": [], "leak": [], "asked": [], "content": []}
        for what, drawer in drawers.items():
            texts = torch.stack([clip.text(f"a {case.shown[0].shape}") for case in drawer.items])
            images = without_content(drawer.images, texts[:, None], strength)
            for seed in options.seeds:
                drawn = drawer(seed, how, images, blocks=blocks)
                pairs = list(zip(map(largest, objects(drawn)), drawer.items, strict=True))
                shapes = float(np.mean([seen.shape == case.shown[0].shape for seen, case in pairs]))
                found["leak" if what == "shape" else "content"].append(shapes)
                if what == "shape":
                    found["color"].append(float(np.mean([seen.color == case.shown[0].color for seen, case in pairs])))
                    found["asked"].append(float(np.mean([seen.shape == case.text.split()[1] for seen, case in pairs])))
                if seed == options.seeds[0]:
                    kept[what].append(drawn[:8])
        row(name, *(shares(values) for values in found.values()))
    for what, drawer in drawers.items():
        save(options, f"style-{what}", drawer.items, kept[what])


def evenly(query: Tensor, key: Tensor, real: Tensor) -> Tensor:
    """Every reference everywhere, each by 1: the plain sum."""
    return torch.ones(*key.shape[:2], query.shape[2])


def halves(query: Tensor, key: Tensor, real: Tensor) -> Tensor:
    """Every reference everywhere, together by 1."""
    return evenly(query, key, real) / key.shape[1]


def pair(options: argparse.Namespace, model: Any, clip: Clip) -> None:
    """(c) two references: of the objects that the prompt tells by ``what``, is the other attribute that of the right
    reference? Entities are the references' own captions."""
    head(
        "prompt says",
        "merge",
        "both objects seen",
        "right, of those seen",
        "the other's, of those seen",
        "both right, of all",
    )
    for what in ("color", "shape"):
        items, kept = cases(options.cases, "pair", np.random.default_rng(13), what), []
        drawer = Drawer(model, clip, options, items)
        names = {each.text: [caption(Scene((group,), None, "white")) for group in each.shown] for each in items}
        ways: dict[str, How | None] = {
            "no references": None,
            "one softmax over both (diffusers)": ImagePrompted,
            "sum": lambda view, own, names=names: ImagePrompted(view, own, names, evenly),
            "mean": lambda view, own, names=names: ImagePrompted(view, own, names, halves),
            "weighed by relevance": lambda view, own, names=names: ImagePrompted(view, own, names, by_relevance),
        }
        for name, how in ways.items():
            both, right, other, whole = [], [], [], []
            for seed in options.seeds:
                images = drawer(seed, how)
                found = [bound(seen, case, what) for seen, case in zip(objects(images), items, strict=True)]
                flat = [one for each in found for one in each if one is not None]
                both.append(np.mean([None not in each for each in found]))
                right.append(np.mean([one == "right" for one in flat]))
                other.append(np.mean([one == "other" for one in flat]))
                whole.append(np.mean([each == ["right", "right"] for each in found]))
                if seed == options.seeds[0]:
                    kept.append(images[:8])
            row(what, name, shares(both), shares(right), shares(other), shares(whole))
        save(options, f"pair-{what}", items, kept)


def bound(seen: Sequence[Found], case: Case, what: str) -> list[str | None]:
    """Of the object with each reference's ``what``: the rest is right, the other reference's, or wrong; None unseen."""
    rest, found = {"color": "shape", "shape": "color"}[what], list[str | None]()
    for m, group in enumerate(case.shown):
        own = [getattr(each, rest) for each in seen if getattr(each, what) == getattr(group, what)]
        others = {getattr(each, rest) for k, each in enumerate(case.shown) if k != m}
        best = "right" if getattr(group, rest) in own else "other" if others & set(own) else "wrong"
        found.append(best if own else None)
    return found


def save(options: argparse.Namespace, name: str, items: list[Case], kept: list[Tensor]) -> None:
    """The references of the first cases, then a row a way."""
    if options.pictures is None:
        return
    top = [
        torch.from_numpy(np.array(items[i].reference(m, i))).permute(2, 0, 1).float() / 255
        for m in range(len(items[0].shown))
        for i in range(len(kept[0]))
    ]
    images = torch.cat([torch.stack(top), *kept])
    texts = [case.text for case in items[: len(kept[0])]]
    blank = [""] * (len(images) - len(texts))
    pictures.save(pictures.grid(images, [*blank, *texts], columns=len(kept[0])), options.pictures / f"{name}.png")


def main() -> None:
    """Prints the tables that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=["agreement", "style", "pair"])
    parser.add_argument("--adapter", type=Path, default=FILE)
    parser.add_argument("--cases", type=int, default=24)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0])
    parser.add_argument("--subtract", type=float, nargs="+", default=[0.25])
    parser.add_argument("--style", nargs="*", default=[], help="the blocks that the probe found")
    parser.add_argument("--pictures", type=Path, help="a folder")
    options = parser.parse_args()
    model, clip = load("scenes-sd"), Clip(encoder_folder(options.adapter, read_adapter(options.adapter)[1]))
    for what in options.what:
        print(f"\n{what}: {options.cases} cases, seeds {options.seeds}, {options.steps} moves")
        {"agreement": agreement, "style": style, "pair": pair}[what](options, model, clip)


if __name__ == "__main__":
    main()
