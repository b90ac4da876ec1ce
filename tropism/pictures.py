"""Pictures of a run: grids with captions, before and after, and the curve of rewards."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

TILE = 192  # pixels of the long side of a picture in a grid
MARGIN, GAP, GUTTER = 20, 14, 76
STRIP, STRIP_SIDE = 6, 96  # pictures of a strip, and the most pixels of one
PROMPTS = "prompts.json"  # beside the strips
LINE, SIZE, LINES = 17, 13, 4  # of captions: height of a line, of a letter, and most lines
INK, FAINT, GOOD, BAD, PAPER = "#1f2328", "#6b7280", "#15803d", "#b91c1c", "#ffffff"


@cache
def _font(size: int = SIZE, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu, which matplotlib brings along: it has most alphabets, Pillow's own font only the Latin one."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def to_image(pixels: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] -> an 8-bit picture."""
    array = (pixels.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array)


def _tile(pixels: Tensor) -> Image.Image:
    """Within TILE x TILE; small pictures are enlarged by a whole number, pixels stay sharp."""
    image = to_image(pixels)
    longest = max(image.size)
    if longest <= TILE:
        times = TILE // longest
        return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    scale = TILE / longest
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)


def wrap(text: str, width: int, lines: int = LINES, size: int = SIZE) -> list[str]:
    """The text in at most so many lines of so many pixels, with dots where it goes on."""
    font = _font(size)
    found, line = [], ""
    for word in " ".join(text.split()).split(" "):
        longer = f"{line} {word}".strip()
        if font.getlength(longer) <= width or not line:
            line = longer
        else:
            found.append(line)
            line = word
    found.append(line)
    kept = found[:lines]
    if len(found) > lines:
        kept[-1] += " …"
    return [_cut(each, width, font) for each in kept]


def _cut(line: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    if font.getlength(line) <= width:
        return line
    text = line.rstrip(" …")
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


class _Sheet:
    """A white page with pictures and lines of text."""

    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("RGB", (width, height), PAPER)
        self._draw = ImageDraw.Draw(self.image)

    def picture(self, tile: Image.Image, x: int, y: int, tall: int) -> None:
        """In the middle of a cell, TILE wide and so tall, with a hairline around it."""
        x, y = x + (TILE - tile.width) // 2, y + (tall - tile.height) // 2
        self.image.paste(tile, (x, y))
        self._draw.rectangle((x - 1, y - 1, x + tile.width, y + tile.height), outline="#d0d7de")

    def text(self, x: int, y: int, line: str, colour: str = INK, size: int = SIZE, bold: bool = False) -> None:
        self._draw.text((x, y), line, fill=colour, font=_font(size, bold))

    def lines(self, x: int, y: int, lines: Sequence[str], colour: str = INK) -> None:
        for number, line in enumerate(lines):
            self.text(x, y + number * LINE, line, colour)


def grid(
    images: Tensor, captions: Sequence[str], notes: Sequence[str] = (), title: str = "", columns: int = 0
) -> Image.Image:
    """Pictures (N, 3, H, W) in rows, captions below them, and below those a note (a reward), if given."""
    tiles = [_tile(pixels) for pixels in images]
    tall = max(tile.height for tile in tiles)
    columns = min(len(images), columns or max(4, min(8, math.isqrt(len(images)))))
    texts = [wrap(text, TILE) for text in captions]
    rows = [range(start, min(start + columns, len(images))) for start in range(0, len(images), columns)]
    heights = [max(len(texts[i]) for i in row) * LINE + (LINE if notes else 0) + tall + 8 for row in rows]
    top = MARGIN + (30 if title else 0)
    wide = columns * TILE + (columns - 1) * GAP
    sheet = _Sheet(wide + 2 * MARGIN, top + sum(heights) + GAP * (len(rows) - 1) + MARGIN)
    if title:
        sheet.text(MARGIN, MARGIN - 4, _cut(title, wide, _font(15, True)), size=15, bold=True)
    y = top
    for row, height in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            x = MARGIN + column * (TILE + GAP)
            sheet.picture(tiles[i], x, y, tall)
            sheet.lines(x, y + tall + 6, texts[i])
            if notes:
                sheet.text(x, y + tall + 6 + len(texts[i]) * LINE, notes[i], FAINT)
        y += height + GAP
    return sheet.image


def strip(images: Tensor, most: int = STRIP, side: int = STRIP_SIDE) -> Image.Image:
    """The first pictures of (N, 3, H, W) side by side, none larger than ``side``: small enough to keep of each step."""
    tiles = [to_image(pixels) for pixels in images[:most]]
    for tile in tiles:
        tile.thumbnail((side, side), Image.Resampling.LANCZOS)
    width, height = tiles[0].size
    row = Image.new("RGB", (width * len(tiles), height))
    for place, tile in enumerate(tiles):
        row.paste(tile, (place * width, 0))
    return row


def keep_strip(folder: Path, name: str, images: Tensor, text: Sequence[str]) -> None:
    """The strip as a file of that name, and once the prompts of its pictures."""
    save(strip(images), folder / name)
    if not (folder / PROMPTS).exists():
        (folder / PROMPTS).write_text(json.dumps(list(text[:STRIP])), encoding="utf-8")


def before_after(
    before: Tensor,
    after: Tensor,
    captions: Sequence[str],
    scores: tuple[Tensor, Tensor],
    title: str,
    subtitle: str,
    labels: tuple[str, str] = ("before", "after"),
) -> Image.Image:
    """One column a prompt: the caption, the picture before (N, 3, H, W), its reward, the picture after, its reward."""
    texts, tiles = [wrap(text, TILE) for text in captions], [[_tile(each) for each in row] for row in (before, after)]
    tall = max(tile.height for tile in [*tiles[0], *tiles[1]])
    head, caption = MARGIN + 54, max(len(text) for text in texts) * LINE + 8
    first, second = head + caption, head + caption + tall + LINE + 18
    wide = GUTTER + len(before) * (TILE + GAP) - GAP
    sheet = _Sheet(wide + 2 * MARGIN, second + tall + LINE + 8 + MARGIN)
    sheet.text(MARGIN, MARGIN - 4, _cut(title, wide, _font(17, True)), size=17, bold=True)
    sheet.text(MARGIN, MARGIN + 22, _cut(subtitle, wide, _font(SIZE)), FAINT)
    sheet.text(MARGIN, first + tall // 2 - 8, labels[0], FAINT, 15, True)
    sheet.text(MARGIN, second + tall // 2 - 8, labels[1], INK, 15, True)
    for i, (old, new) in enumerate(zip(scores[0].tolist(), scores[1].tolist(), strict=True)):
        x = MARGIN + GUTTER + i * (TILE + GAP)
        sheet.lines(x, first - 6 - len(texts[i]) * LINE, texts[i])
        sheet.picture(tiles[0][i], x, first, tall)
        sheet.picture(tiles[1][i], x, second, tall)
        sheet.text(x, first + tall + 5, number(old), FAINT)
        sheet.text(x, second + tall + 5, number(new))
        if not math.isnan(new - old):
            colour = GOOD if new > old else BAD if new < old else FAINT
            sheet.text(x + 62, second + tall + 5, f"{new - old:+.{_decimals(old, new)}f}", colour, bold=True)
    return sheet.image


def number(value: float) -> str:
    """Three digits, so that 1 is 1.00; a missing one is said."""
    return "no score" if math.isnan(value) else f"{value:#.3g}".rstrip(".")


def _decimals(*values: float) -> int:
    """As many as the largest shows."""
    largest = max(abs(value) for value in values)
    return max(0, 2 - math.floor(math.log10(largest))) if largest > 0 else 2


def curve(rows: Sequence[Mapping[str, Any]], title: str, reward: str) -> Any:
    """A matplotlib figure of metrics rows: the reward in training, and on held-out prompts with its 95 % band."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _axes(title, "step", reward)
    trained = [(row["step"], row["reward_mean"]) for row in rows if row.get("reward_mean") is not None]
    tested = [row for row in rows if row.get("eval_reward") is not None]
    if trained:
        axes.plot(*zip(*trained, strict=True), color="#94a3b8", linewidth=1.3, label="training images")
    if tested:
        steps = [row["step"] for row in tested]
        low, high = ([row[f"eval_reward_{end}"] for row in tested] for end in ("low", "high"))
        axes.fill_between(steps, low, high, color="#2563eb", alpha=0.16, linewidth=0, label="95 % interval")
        axes.plot(steps, [row["eval_reward"] for row in tested], color="#2563eb", linewidth=2, marker="o",
                  markersize=4, label="evaluation, equal seeds")  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


class Measured(NamedTuple):
    """A line of ``against_cost``: points with their interval, and a word at each."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    words: Sequence[str]


def against_cost(lines: Sequence[Measured], title: str, xlabel: str, ylabel: str) -> Any:
    """A matplotlib figure: what costs twice as much lies one step to the right."""
    from matplotlib.ticker import NullLocator, StrMethodFormatter

    figure, axes = _axes(title, xlabel, ylabel)
    axes.set_xscale("log", base=2)
    for place, line in enumerate(lines):
        colour = f"C{place}"
        axes.fill_between(line.xs, line.low, line.high, color=colour, alpha=0.14, linewidth=0)
        axes.plot(line.xs, line.ys, color=colour, linewidth=2, marker="o", markersize=4, label=line.name)
        for x, y, word in zip(line.xs, line.ys, line.words, strict=True):
            axes.annotate(word, (x, y), xytext=(0, 5), textcoords="offset points", ha="center", fontsize=8)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _axes(title: str, xlabel: str, ylabel: str) -> tuple[Any, Any]:
    """A figure in the style of the house, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(picture: Any, file: Path) -> Path:
    """Writes a Pillow picture or a matplotlib figure as PNG, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=".saving-", suffix=".png")
    os.close(handle)
    try:
        getattr(picture, "savefig" if hasattr(picture, "savefig") else "save")(temporary, format="png")
        Path(temporary).chmod(0o644)
        os.replace(temporary, file)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return file
