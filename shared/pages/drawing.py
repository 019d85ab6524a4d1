"""Charts as numbers: where every line, bar, tick and label stands. `charts.html` makes SVG of them.

Coordinates are those of the SVG, y downwards. No text is put into markup here: the template does,
and escapes it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

WIDTH, HEIGHT = 460.0, 280.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 56.0, 20.0, 12.0, 42.0


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart, through points in ascending x."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    dashed: bool = False
    titles: Sequence[str] = ()  # shown where the mouse rests on a point
    dots: bool = True


@dataclass(frozen=True, slots=True)
class Axis:
    """What an axis shows."""

    label: str
    low: float
    high: float
    log: bool = False
    percent: bool = False

    def share(self, value: float) -> float:
        """Where on the axis, 0 to 1."""
        scale: Callable[[float], float] = math.log if self.log else float
        low, high = scale(self.low), scale(self.high)
        return (scale(max(value, self.low)) - low) / (high - low)

    def ticks(self) -> list[float]:
        if not self.log:
            step = _round_step((self.high - self.low) / 5)
            first = math.ceil(self.low / step - 1e-9)
            return [step * i for i in range(first, math.floor(self.high / step + 1e-9) + 1)]
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for digits in ((1, 2, 5), (1, 3), (1,)):
            found = [d * 10.0**n for n in decades for d in digits]
            found = [v for v in found if self.low * 0.999 <= v <= self.high * 1.001]
            if len(found) <= 7:
                break
        return found

    def text(self, value: float) -> str:
        if self.percent:
            return f"{value:.0%}" if value >= 0.01 or value == 0 else f"{value:.2%}"
        if value >= 10_000:
            return f"{value / 1000:,.0f}k"
        return f"{value:.6g}"


def _round_step(rough: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= rough * 0.999)


def log_axis(label: str, values: Sequence[float], *, percent: bool = False) -> Axis:
    """From a little below the smallest to a little above the largest; all above 0."""
    return Axis(label, min(values) / 1.15, max(values) * 1.15, log=True, percent=percent)


@dataclass(frozen=True, slots=True)
class Chart:
    """What the template draws."""

    title: str
    x_label: str
    y_label: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[dict[str, Any]] = field(default_factory=list)
    bars: list[dict[str, Any]] = field(default_factory=list)
    marks: list[dict[str, Any]] = field(default_factory=list)
    legend: list[dict[str, Any]] = field(default_factory=list)
    width: float = WIDTH
    height: float = HEIGHT
    left: float = _LEFT
    right: float = WIDTH - _RIGHT
    top: float = _TOP
    bottom: float = HEIGHT - _BOTTOM


def _x(axis: Axis, value: float) -> float:
    return round(_LEFT + axis.share(value) * (WIDTH - _LEFT - _RIGHT), 2)


def _y(axis: Axis, value: float) -> float:
    return round(HEIGHT - _BOTTOM - axis.share(value) * (HEIGHT - _TOP - _BOTTOM), 2)


def _ticks(place: Callable[[Axis, float], float], axis: Axis) -> list[tuple[float, str]]:
    return [(place(axis, value), axis.text(value)) for value in axis.ticks()]


def lines(
    title: str,
    x: Axis,
    y: Axis,
    series: Sequence[Series],
    marked: Sequence[tuple[float, float, str]] = (),
) -> Chart:
    """Lines with a dot at every point; `marked` points get a ring and a title."""
    drawn = []
    for one in series:
        places = [(_x(x, a), _y(y, b)) for a, b in one.points]
        titles = one.titles or [f"{one.name}: {x.text(a)}, {y.text(b)}" for a, b in one.points]
        drawn.append(
            {
                "colour": one.colour,
                "dashed": one.dashed,
                "path": " ".join(f"{a},{b}" for a, b in places),
                "dots": [(a, b, t) for (a, b), t in zip(places, titles, strict=True) if one.dots],
            }
        )
    return Chart(
        title,
        x.label,
        y.label,
        _ticks(_x, x),
        _ticks(_y, y),
        lines=drawn,
        marks=[{"x": _x(x, a), "y": _y(y, b), "title": text} for a, b, text in marked],
        legend=[{"name": s.name, "colour": s.colour, "dashed": s.dashed} for s in series],
    )


def bars(
    title: str,
    x: Axis,
    y: Axis,
    columns: Sequence[tuple[float, float, float, str]],
    series: Sequence[Series] = (),
) -> Chart:
    """Columns (from, to, height, title) that stand side by side, and lines in front of them."""
    drawn = []
    for low, high, value, text in columns:
        left, right, top = _x(x, low), _x(x, high), _y(y, value)
        drawn.append(
            {
                "x": left + 0.5,
                "y": top,
                "width": round(max(0.5, right - left - 1), 2),
                "height": round(HEIGHT - _BOTTOM - top, 2),
                "title": text,
            }
        )
    chart = lines(title, x, y, series)
    chart.bars.extend(drawn)
    return chart


def histogram(
    title: str, label: str, found: dict[str, list[float]], *, percent: bool = False
) -> Chart:
    """Bars of `statistics.histogram`, as shares of all."""
    edges, total = found["edges"], sum(found["counts"]) or 1
    shares = [count / total for count in found["counts"]]
    columns = [
        (low, high, share, f"{low:.4g} to {high:.4g}: {share:.1%}")
        for low, high, share in zip(edges, edges[1:], shares, strict=False)
    ]
    x = Axis(label, edges[0], edges[-1], percent=percent)
    y = Axis("positions", 0.0, max(shares) * 1.08 or 1.0, percent=True)
    return bars(title, x, y, columns)
