"""Curves as inline SVG: data to coordinates here, the drawing in a template, the colours in the page's style."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 340.0, 190.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 8.0, 8.0, 34.0


@dataclass(frozen=True)
class Series:
    """Points of a line; a ``band`` has (low, high) for each. ``colour`` is a number of the page's palette."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    band: tuple[Sequence[float], Sequence[float]] | None = None
    colour: int = 0
    dots: bool = True
    labels: Sequence[str] = ()  # what is said of each point; its numbers, unless given


@dataclass(frozen=True)
class Line:
    """A series in the coordinates of its chart."""

    series: Series
    path: str
    area: str
    points: list[tuple[float, float, str]]


@dataclass(frozen=True)
class Chart:
    """What the template draws."""

    title: str
    xlabel: str
    lines: list[Line]
    xticks: list[tuple[float, str]]
    yticks: list[tuple[float, str]]
    zero: float | None  # the height of y = 0, where that lies within
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT
    right: float = WIDTH - RIGHT
    top: float = TOP
    bottom: float = HEIGHT - BOTTOM


def chart(title: str, series: Sequence[Series], xlabel: str = "step", least: float = 0.0) -> Chart | None:
    """None where there is no point to draw. The height shows ``least`` of the largest value or more."""
    drawn = [each for each in series if len(each.xs)]
    if not drawn:
        return None
    xs = [x for each in drawn for x in each.xs]
    ys = [y for each in drawn for row in (each.ys, *(each.band or ())) for y in row]
    (x0, x1), (y0, y1) = _span(xs), _span(ys, 0.06, least)

    def at(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
        return round(across, 1), round(HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM), 1)

    lines = []
    for each in drawn:
        points = [at(x, y) for x, y in zip(each.xs, each.ys, strict=True)]
        said = each.labels or [f"{xlabel} {x:g}: {y:.4g}" for x, y in zip(each.xs, each.ys, strict=True)]
        low, high = ([at(x, y) for x, y in zip(each.xs, row, strict=True)] for row in each.band or (each.ys, each.ys))
        edge = [] if each.band is None else [*low, *reversed(high)]
        lines.append(Line(each, _path(points), _path(edge), [(*p, text) for p, text in zip(points, said, strict=True)]))
    xticks = [(at(x, y0)[0], f"{x:g}") for x in _ticks(x0, x1, xlabel == "step")]
    yticks = [(at(x0, y)[1], f"{y:.6g}") for y in _ticks(y0, y1)]
    return Chart(title, xlabel, lines, xticks, yticks, at(x0, 0.0)[1] if y0 < 0 < y1 else None)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in points)


def _span(values: Sequence[float], margin: float = 0.0, least: float = 0.0) -> tuple[float, float]:
    """From the least to the largest, a little wider, and never empty."""
    low, high = min(values), max(values)
    largest = max(abs(low), abs(high)) or 1.0
    more = max(margin * (high - low), (least * largest - (high - low)) / 2, 0.0)
    if low == high and not more:
        more = 0.1 * largest
    return low - more, high + more


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    found = MaxNLocator(5, integer=whole, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [float(tick) for tick in found if low <= tick <= high]
