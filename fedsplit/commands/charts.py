"""Charts as SVG, for a page: no library, no script, and the page's own colours, so that they follow its theme.

A chart is 400 units wide, which is about a phone's width: its text is as large there as on the page around it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 400, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 8, 10, 38
_MOST_POINTS = 60
_MOST_BARS = 120


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line of a chart.

    Attributes
    ----------
    values : sequence of float
        One for each round; NaN is a gap.
    color : str
        The name of one of the page's colours, such as ``train``.
    faint : bool
        One client's line, behind the mean's.
    """

    label: str
    values: Sequence[float]
    color: str
    faint: bool = False


def line_chart(title: str, rounds: Sequence[int], series: Sequence[Series]) -> str:
    """Draw values by round; each point of a line that is not faint tells its value to a pointer that rests on it."""
    values = [value for each in series for value in each.values if math.isfinite(value)]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    ticks = _ticks(low, high)
    scale = _Scale(rounds, (min(low, ticks[0]), max(high, ticks[-1])))
    parts = [_axes(scale, ticks, rounds)]
    for each in sorted(series, key=lambda each: not each.faint):
        parts += _line(each, rounds, scale)
    return _svg(title, parts)


def stacked_bars(title: str, rounds: Sequence[int], rows: Mapping[str, Sequence[float]]) -> str:
    """Draw a bar for each round, divided into rows; more rounds than fit are drawn as means of neighbours."""
    size = math.ceil(len(rounds) / _MOST_BARS)
    groups = [slice(start, start + size) for start in range(0, len(rounds), size)]
    heights = {name: [_mean(row[group]) for group in groups] for name, row in rows.items()}
    totals = [sum(column) for column in zip(*heights.values(), strict=True)] or [0.0]
    ticks = _ticks(0.0, max(totals))
    # Half a bar's room at both ends.
    scale = _Scale((rounds[0] - size / 2, rounds[-1] + size / 2), (0.0, max(max(totals), ticks[-1])))
    parts = [_axes(scale, ticks, rounds)]
    width = max(0.8, min(60.0, 0.75 * (scale.x(size) - scale.x(0))))
    for index, group in enumerate(groups):
        members = rounds[group]
        middle, base = scale.x(sum(members) / len(members)), 0.0
        for name, row in heights.items():
            top, bottom = scale.y(base + row[index]), scale.y(base)
            base += row[index]
            told = f"round {_span(members)}: {name} {row[index]:.3f} s"
            parts.append(
                f'<rect x="{middle - width / 2:.1f}" y="{top:.1f}" width="{width:.1f}" height="{bottom - top:.2f}" '
                f'class="{_css(name)}"><title>{escape(told)}</title></rect>'
            )
    return _svg(title, parts)


def legend(entries: Mapping[str, str]) -> str:
    """Return a legend: label to colour."""
    items = "".join(f'<li><i class="{_css(color)}"></i>{escape(label)}</li>' for label, color in entries.items())
    return f'<ul class="legend">{items}</ul>'


class _Scale:
    def __init__(self, rounds: Sequence[float], values: tuple[float, float]) -> None:
        self._first, self._last = rounds[0], rounds[-1]
        self.low, self.high = values

    def x(self, server_round: float) -> float:
        if self._first == self._last:
            return (_LEFT + _WIDTH - _RIGHT) / 2
        share = (server_round - self._first) / (self._last - self._first)
        return _LEFT + 6 + share * (_WIDTH - _LEFT - _RIGHT - 12)

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def _line(series: Series, rounds: Sequence[int], scale: _Scale) -> list[str]:
    style = f"{_css(series.color)}{' faint' if series.faint else ''}"
    parts, run = [], list[str]()
    for server_round, value in [*zip(rounds, series.values, strict=True), (0, math.nan)]:
        if math.isfinite(value):
            run.append(f"{scale.x(server_round):.1f},{scale.y(value):.1f}")
            continue
        if len(run) > 1:
            parts.append(f'<polyline class="{style}" points="{" ".join(run)}"/>')
        run = []
    if series.faint or len(rounds) > _MOST_POINTS:
        return parts
    for server_round, value in zip(rounds, series.values, strict=True):
        if math.isfinite(value):
            told = escape(f"round {server_round}: {series.label} {value:.4g}")
            parts.append(
                f'<circle class="{style}" cx="{scale.x(server_round):.1f}" cy="{scale.y(value):.1f}" r="3">'
                f"<title>{told}</title></circle>"
            )
    return parts


def _axes(scale: _Scale, ticks: Sequence[float], rounds: Sequence[int]) -> str:
    parts = []
    for tick in ticks:
        y = scale.y(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in _round_ticks(rounds):
        parts.append(f'<text x="{scale.x(tick):.1f}" y="{_HEIGHT - _BOTTOM + 17}" text-anchor="middle">{tick}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 4}" text-anchor="middle">round</text>')
    return "".join(parts)


def _ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers that enclose a range."""
    if high <= low:
        room = abs(low) / 2 or 1.0
        low, high = low - room, high + room
    raw = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{number * step:.10g}") for number in range(first, last + 1)]


def _round_ticks(rounds: Sequence[int]) -> list[int]:
    step = max(1, math.ceil(len(rounds) / 8))
    return list(rounds[::step])


def _span(members: Sequence[int]) -> str:
    return str(members[0]) if len(members) == 1 else f"{members[0]} to {members[-1]}, mean"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _css(name: str) -> str:
    return f"c-{name}"


def _svg(title: str, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">' + "".join(parts) + "</svg>"
