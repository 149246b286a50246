"""A chart as SVG, by hand: lines over logarithmic axes, panels side by side, readable in light and in dark mode."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 960, 440
PANEL_WIDTH, PANEL_HEIGHT = 300, 290
TOP, LEFT, BETWEEN = 70, 74, 152

STYLE = """
  text { font: 13px -apple-system, "Segoe UI", "Noto Sans", Helvetica, Arial, sans-serif; fill: #1f2328; }
  .title { font-size: 15px; font-weight: 600; }
  .quiet { fill: #59636e; }
  .paper { fill: #ffffff; }
  .grid { stroke: #d1d9e0; stroke-width: 1; }
  .line { fill: none; stroke-width: 2.25; stroke-linejoin: round; }
  .dashed { stroke-dasharray: 6 4; stroke-width: 1.75; }
  .dotted { stroke-dasharray: 1.5 4; stroke-width: 1.75; stroke-linecap: round; }
  .a { stroke: #0969da; } .dot.a { fill: #0969da; } text.a { fill: #0969da; stroke: none; }
  .b { stroke: #bc4c00; } .dot.b { fill: #bc4c00; } text.b { fill: #bc4c00; stroke: none; }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc; }
    .quiet { fill: #9198a1; }
    .paper { fill: #0d1117; }
    .grid { stroke: #3d444d; }
    .a { stroke: #4493f8; } .dot.a { fill: #4493f8; } text.a { fill: #4493f8; }
    .b { stroke: #f0883e; } .dot.b { fill: #f0883e; } text.b { fill: #f0883e; }
  }
"""


class Line(NamedTuple):
    """Points in order of x. kind: ``a`` or ``b``, its colour. dash: empty, ``dashed`` or ``dotted``."""

    label: str
    kind: str
    dash: str
    points: Sequence[tuple[float, float]]


class Panel(NamedTuple):
    """One diagram; both axes are logarithmic. unit: of y, said at its top."""

    title: str
    unit: str
    lines: Sequence[Line]


class _Scale(NamedTuple):
    """Maps a value to a place between ``start`` and ``end``, by its logarithm."""

    lowest: float
    highest: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (math.log10(value) - math.log10(self.lowest)) / (math.log10(self.highest) - math.log10(self.lowest))
        return self.start + share * (self.end - self.start)

    def decades(self) -> Iterator[float]:
        """The powers of ten from the lowest to the highest."""
        power = math.ceil(math.log10(self.lowest) - 1e-9)
        while 10**power <= self.highest * 1.000001:
            yield 10**power
            power += 1


def render(panels: Sequence[Panel], x_label: str, title: str, note: str) -> str:
    """The chart as the text of an SVG file."""
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escape(title)}">',
        f"<style>{STYLE}</style>",
        f'<rect class="paper" width="{WIDTH}" height="{HEIGHT}" rx="6"/>',
        f'<text class="title" x="24" y="30">{escape(title)}</text>',
    ]
    for place, panel in enumerate(panels):
        parts += _panel(panel, LEFT + place * (PANEL_WIDTH + BETWEEN), x_label)
    parts += [f'<text class="quiet" x="24" y="{HEIGHT - 14}">{escape(note)}</text>', "</svg>"]
    return "\n".join(parts) + "\n"


def _panel(panel: Panel, left: float, x_label: str) -> Iterator[str]:
    xs = [x for line in panel.lines for x, _ in line.points]
    ys = [y for line in panel.lines for _, y in line.points]
    x_scale = _Scale(min(xs), max(xs), left, left + PANEL_WIDTH)
    lowest, highest = 10 ** math.floor(math.log10(min(ys))), 10 ** math.ceil(math.log10(max(ys)))
    y_scale = _Scale(lowest, highest, TOP + PANEL_HEIGHT, TOP)
    unit = f'<tspan class="quiet">{escape(panel.unit)}</tspan>'
    yield f'<text x="{left - 50}" y="{TOP - 14}">{escape(panel.title)}, {unit}</text>'
    for value in y_scale.decades():
        y = y_scale(value)
        yield f'<line class="grid" x1="{left}" y1="{y:.1f}" x2="{left + PANEL_WIDTH}" y2="{y:.1f}"/>'
        yield f'<text class="quiet" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{_number(value)}</text>'
    for value in x_scale.decades():
        x = x_scale(value)
        yield f'<line class="grid" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{TOP + PANEL_HEIGHT}"/>'
        y = TOP + PANEL_HEIGHT + 20
        yield f'<text class="quiet" x="{x:.1f}" y="{y}" text-anchor="middle">{value:,.0f}</text>'
    middle, below = left + PANEL_WIDTH / 2, TOP + PANEL_HEIGHT + 42
    yield f'<text class="quiet" x="{middle}" y="{below}" text-anchor="middle">{escape(x_label)}</text>'
    for line in panel.lines:
        yield _path(line, x_scale, y_scale)
    yield from _labels(panel.lines, y_scale, left + PANEL_WIDTH + 10)


def _path(line: Line, x_scale: _Scale, y_scale: _Scale) -> str:
    places = [(x_scale(x), y_scale(y)) for x, y in line.points]
    drawn = "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    path = f'<path class="line {line.kind} {line.dash}" d="{drawn}"/>'
    if line.dash:
        return path
    return path + "".join(f'<circle class="dot {line.kind}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in places)


def _labels(lines: Sequence[Line], y_scale: _Scale, x: float) -> Iterator[str]:
    """Each line's name at its end, moved apart where two would meet."""
    ends = sorted((y_scale(line.points[-1][1]), place) for place, line in enumerate(lines))
    lowest_free = -math.inf
    for y, place in ends:
        lowest_free = max(y, lowest_free + 16)
        line = lines[place]
        yield f'<text class="{line.kind}" x="{x}" y="{lowest_free + 4:.1f}">{escape(line.label)}</text>'


def _number(value: float) -> str:
    for size, letter in ((1_000_000, "M"), (1_000, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
