"""A line over time as SVG: axes from zero, labels at the ends, nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 720, 280, 80, 40, 40


def line_plot(points: Sequence[tuple[float, float]], title: str, unit: str) -> str:
    """`points`: x in `unit` and y, in the order of x. Without points there is a plot that says so."""
    if not points:
        return _svg(f'<text x="{_LEFT}" y="{_TOP}">{escape(title)}: no samples</text>')
    longest, highest = max(x for x, _ in points) or 1.0, max(y for _, y in points) or 1.0
    width, height = _WIDTH - _LEFT - 20, _HEIGHT - _TOP - _BOTTOM
    line = " ".join(f"{_LEFT + x / longest * width:.1f},{_TOP + (1 - y / highest) * height:.1f}" for x, y in points)
    base = _TOP + height
    return _svg(
        f'<text x="{_LEFT}" y="24" font-weight="bold">{escape(title)}</text>'
        f'<path d="M{_LEFT},{_TOP} V{base} H{_LEFT + width}" fill="none" stroke="#888"/>'
        f'<text x="{_LEFT - 8}" y="{_TOP + 5}" text-anchor="end">{highest:.0f}</text>'
        f'<text x="{_LEFT - 8}" y="{base}" text-anchor="end">0</text>'
        f'<text x="{_LEFT + width}" y="{base + 24}" text-anchor="end">{longest:.0f} {escape(unit)}</text>'
        f'<polyline points="{line}" fill="none" stroke="#1f6feb" stroke-width="1.5"/>'
    )


def _svg(content: str) -> str:
    size = f'width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
    style = 'font-family="sans-serif" font-size="13"'
    background = '<rect width="100%" height="100%" fill="#fff"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{background}{content}</svg>\n'
