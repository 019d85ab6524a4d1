"""Means, intervals, the table and the picture of the students that `fidelity.py` trained.

Pairs: two arms of one seed started from the same weights and saw the same batches, so their
difference is taken seed by seed. Intervals are 95 % t-intervals over the seeds: they say what
another start and order would change, not another teacher or text.
"""

import math
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

MEASURES = ("loss", "kl", "agreement", "ece")
# 0.975 quantiles of Student's t for 1 to 20 degrees of freedom
T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and half the width of its 95 % interval; NaN from one seed alone."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: list[float]) -> "Interval":
        n = len(values)
        if n < 2:
            return cls(float(np.mean(values)), math.nan)
        return cls(
            float(np.mean(values)), t_quantile(n - 1) * float(np.std(values, ddof=1)) / n**0.5
        )


def t_quantile(degrees: int) -> float:
    """The 0.975 quantile; above 20 degrees of freedom a little too large."""
    return T_975[min(degrees, len(T_975)) - 1]


def share_with_interval(part: list[float], whole: list[float]) -> tuple[float, float, float] | None:
    """mean(part) / mean(whole) of pairs and its 95 % interval by Fieller's theorem (1954).

    The interval holds every ratio r at which the mean of part - r whole does not differ from 0 (a
    paired t test); None where the denominator itself does not differ from 0.
    """
    a, b, n = np.array(part), np.array(whole), len(part)
    if n < 2:
        return None
    scale = t_quantile(n - 1) ** 2 / n
    (var_a, cov), (_, var_b) = np.cov(a, b)
    squared = b.mean() ** 2 - scale * var_b
    linear = a.mean() * b.mean() - scale * cov
    constant = a.mean() ** 2 - scale * var_a
    root = linear**2 - squared * constant
    if squared <= 0 or root < 0:
        return None
    ends = sorted((linear - sign * math.sqrt(root)) / squared for sign in (1, -1))
    return float(a.mean() / b.mean()), ends[0], ends[1]


def summarise(results: list[dict[str, Any]], names: list[str]) -> list[dict[str, Any]]:
    """A line for each arm with results: means, differences to `ce` and `full`, recovered share."""
    by_arm = {n: {r["seed"]: r for r in results if r["arm"] == n} for n in names}
    lines = []
    for name, own in by_arm.items():
        if not own:
            continue
        line: dict[str, Any] = {"arm": name, "seeds": len(own)}
        for measure in MEASURES:
            line[measure] = as_pair(Interval.of([r[measure] for r in own.values()]))
        for other in ("ce", "full"):
            paired = sorted(own.keys() & by_arm.get(other, {}).keys())
            if paired and name != other:
                values = [own[s]["loss"] - by_arm[other][s]["loss"] for s in paired]
                line[f"loss_minus_{other}"] = as_pair(Interval.of(values))
        seeds = sorted(own.keys() & by_arm.get("ce", {}).keys() & by_arm.get("full", {}).keys())
        if seeds and name not in ("ce", "full"):
            ce, full = ([by_arm[n][s]["loss"] for s in seeds] for n in ("ce", "full"))
            part = [c - own[s]["loss"] for c, s in zip(ce, seeds, strict=True)]
            whole = [c - f for c, f in zip(ce, full, strict=True)]
            line["recovered"] = share_with_interval(part, whole)
        lines.append(line)
    return lines


def as_pair(interval: Interval) -> list[float | None]:
    """Mean and half width, None for what one seed cannot tell (JSON has no NaN)."""
    half = None if math.isnan(interval.half) else float(f"{interval.half:.3g}")
    return [float(f"{interval.mean:.6g}"), half]


def table(lines: list[dict[str, Any]]) -> str:
    """For people: one line for each arm."""
    header = (
        f"{'arm':<29}{'seeds':>5}{'held-out loss':>17}{'- ce':>17}{'- full':>17}"
        f"{'recovered, %':>21}{'KL to teacher':>16}{'agree, %':>14}{'ECE, %':>13}"
        f"{'B/token':>8}{'step':>6}"
    )
    return "\n".join([header, *map(table_line, lines)])


def table_line(line: dict[str, Any]) -> str:
    share, size, step = line.get("recovered"), line.get("bytes"), line.get("step_ratio")
    return (
        f"{line['arm']:<29}{line['seeds']:>5}{spread(line['loss'], 4):>17}"
        f"{spread(line.get('loss_minus_ce'), 4):>17}{spread(line.get('loss_minus_full'), 4):>17}"
        f"{share_text(share):>21}{spread(line['kl'], 3):>16}"
        f"{spread(line['agreement'], 1, 100):>14}{spread(line['ece'], 2, 100):>13}"
        f"{'' if size is None else f'{size:.1f}':>8}{'' if step is None else f'{step:.2f}':>6}"
    )


def spread(pair: list[Any] | None, digits: int, factor: float = 1.0) -> str:
    if pair is None:
        return ""
    half = "" if pair[1] is None else f" ±{pair[1] * factor:.{digits}f}"
    return f"{pair[0] * factor:.{digits}f}{half}"


def share_text(share: tuple[float, float, float] | None) -> str:
    if share is None:
        return ""
    middle, low, high = (f"{100 * x:.0f}" for x in share)
    return f"{middle} [{low}, {high}]"


# ---- picture

ROW, LEFT, PANEL, GAP = 26, 250, 330, 60


def picture(lines: list[dict[str, Any]], title: str) -> str:
    """An SVG of two panels, one row for each arm: recovered share, and KL to the teacher."""
    height = 90 + ROW * len(lines)
    second = LEFT + PANEL + GAP
    body = [
        f'<text x="16" y="26" font-size="15" font-weight="600">{escape(title)}</text>',
        *names(lines),
        *panel(
            [(line.get("recovered"), line["arm"] in ("ce", "full")) for line in lines],
            LEFT,
            "share of full distillation's gain over text alone, % (95 %)",
            100,
        ),
        *panel(
            [(around(line["kl"]), line["arm"] in ("ce", "full")) for line in lines],
            second,
            "KL to the live teacher, nats (95 %)",
            1,
        ),
    ]
    width = second + PANEL + 30
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="system-ui, sans-serif" font-size="12">'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(body)}</svg>\n'
    )


def names(lines: list[dict[str, Any]]) -> list[str]:
    out = []
    for row, line in enumerate(lines):
        size = line.get("bytes")
        text = line["arm"] + ("" if size is None else f"  ({size:.0f} B/token)")
        out.append(
            f'<text x="{LEFT - 14}" y="{row_y(row) + 4}" text-anchor="end">{escape(text)}</text>'
        )
    return out


def around(pair: list[Any]) -> tuple[float, float, float]:
    half = pair[1] or 0.0
    return pair[0], pair[0] - half, pair[0] + half


def row_y(row: int) -> int:
    return 70 + ROW * row


def panel(
    values: list[tuple[tuple[float, float, float] | None, bool]],
    left: int,
    title: str,
    factor: float,
) -> list[str]:
    """Dots with their intervals on a common axis; reference arms are hollow."""
    known = [value for value, _ in values if value is not None]
    if not known:
        return []
    means = [factor * value[0] for value in known]
    low, high = min(*means, 0.0), max(*means, 0.0) * 1.08 + 1e-9
    low = low * 1.08
    step = nice_step((high - low) / 5)
    bottom = row_y(len(values) - 1) + 14
    out = [f'<text x="{left}" y="48" fill="#555">{escape(title)}</text>']

    def x_of(value: float) -> float:
        inside = min(max(value, low), high)
        return left + PANEL * (inside - low) / (high - low)

    for tick in np.arange(math.ceil(low / step), math.floor(high / step) + 1) * step:
        x, dark = x_of(float(tick)), "#999" if abs(tick) < 1e-9 else "#e4e4e4"
        out.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="56" y2="{bottom}" stroke="{dark}"/>')
        out.append(
            f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="middle" fill="#555">{tick:g}</text>'
        )
    for row, (value, reference) in enumerate(values):
        if value is None:
            continue
        middle, start, end = (x_of(factor * number) for number in value)
        y, fill = row_y(row), "#fff" if reference else "#1f6feb"
        out.append(
            f'<line x1="{start:.1f}" x2="{end:.1f}" y1="{y}" y2="{y}" stroke="#1f6feb" '
            'stroke-width="2"/>'
        )
        out.append(
            f'<circle cx="{middle:.1f}" cy="{y}" r="5" fill="{fill}" stroke="#1f6feb" '
            'stroke-width="2"/>'
        )
    return out


def nice_step(rough: float) -> float:
    """1, 2 or 5 times a power of ten, at least `rough`."""
    power = 10 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
