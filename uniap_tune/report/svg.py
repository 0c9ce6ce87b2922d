"""A figure as one self-contained SVG: no script, no style sheet, no font of its own."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from uniap_tune.report.chart import Figure, Mark, number_text

_WIDTH, _HEIGHT = 860, 460  # of the plot with its axes, in pixels
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 24, 48, 60  # margins around the plot
_LINE = 18  # pixels of a line of the legend
_TEXT = 12  # pixels of a label's height
_MOST_LABELS = 40  # more would cover each other
_INK, _FAINT, _GRID, _CURVE = "#1b1f24", "#8c959f", "#e2e5e9", "#1f6feb"


def svg(figure: Figure) -> str:
    """The figure with axes, grid, numbered marks and a legend of them; on a white ground, readable in print."""
    legend = _legend(figure.marks)
    height = _HEIGHT + (_LINE * len(legend) + 24 if legend else 0)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'viewBox="0 0 {_WIDTH} {height}" role="img" font-family="Helvetica, Arial, sans-serif" font-size="12">',
        f"<title>{escape(figure.title)}</title>",
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        _text(_LEFT, 28, figure.title, size=16, weight="bold"),
        *_axes(figure),
        _curve(figure),
        *_marks(figure),
        *legend,
        "</svg>",
    ]
    return "\n".join(line for line in lines if line) + "\n"


def _x(figure: Figure, value: float) -> float:
    return _LEFT + figure.x_scale.place(value) * (_WIDTH - _LEFT - _RIGHT)


def _y(figure: Figure, value: float) -> float:
    return _HEIGHT - _BOTTOM - figure.y_scale.place(value) * (_HEIGHT - _TOP - _BOTTOM)


def _axes(figure: Figure) -> list[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    x_title, y_title = figure.axis_titles
    lines = []
    last = -100.0
    for tick in figure.x_scale.ticks:
        x = _x(figure, tick)
        lines.append(_segment(x, _TOP, x, bottom, _GRID))
        if x - last >= 8 * len(number_text(tick)):  # else the numbers touch
            lines.append(_text(x, bottom + 18, number_text(tick), anchor="middle"))
            last = x
    for tick in figure.y_scale.ticks:
        y = _y(figure, tick)
        lines.append(_segment(_LEFT, y, right, y, _GRID))
        lines.append(_text(_LEFT - 8, y + 4, number_text(tick), anchor="end"))
    lines += [_segment(_LEFT, bottom, right, bottom, _INK), _segment(_LEFT, _TOP, _LEFT, bottom, _INK)]
    lines.append(_text((_LEFT + right) / 2, bottom + 42, x_title, anchor="middle", size=13))
    middle = (_TOP + bottom) / 2
    turned = f'transform="rotate(-90 20 {middle:.1f})"'
    return [*lines, _text(20, middle, y_title, anchor="middle", size=13, extra=turned)]


def _curve(figure: Figure) -> str:
    points = " ".join(f"{_x(figure, x):.1f},{_y(figure, y):.1f}" for x, y in figure.corners())
    return f'<polyline points="{points}" fill="none" stroke="{_CURVE}" stroke-width="1.5" opacity="0.5"/>'


def _marks(figure: Figure) -> list[str]:
    lines = []
    for mark in figure.marks:
        x, y = _x(figure, mark.x), _y(figure, mark.y)
        colour = _FAINT if mark.faint else _CURVE
        filled = "#ffffff" if mark.faint else colour
        hint = f"<title>{escape(f'{mark.label}: {mark.text}')}</title>"
        lines.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{filled}" stroke="{colour}">{hint}</circle>')
    if len(figure.marks) <= _MOST_LABELS:
        lines += _labels(figure)
    return lines


def _labels(figure: Figure) -> list[str]:
    """Each mark's label above it on the right, or where it covers no other label: below on the left, or further up."""
    lines = []
    taken: list[tuple[float, float]] = []
    for mark in sorted(figure.marks, key=lambda mark: (mark.x, mark.y)):
        x, y = _x(figure, mark.x), _y(figure, mark.y)
        size = 7 * len(mark.label)
        places = [
            (x + 6, y - 6),
            (x - 4 - size, y + 15),
            (x + 6, y + 15),
            *((x + 6, y - 6 - 12 * up) for up in range(1, 20)),
        ]
        place = next(
            (p for p in places if all(abs(p[0] - a) >= size + 3 or abs(p[1] - b) >= _TEXT for a, b in taken)), places[0]
        )
        taken.append(place)
        lines.append(_text(*place, mark.label, fill=_FAINT if mark.faint else _INK))
    return lines


def _legend(marks: Sequence[Mark]) -> list[str]:
    if len(marks) > _MOST_LABELS:
        return []
    lines = []
    for number, mark in enumerate(marks):
        y = _HEIGHT + _LINE * number + 8
        fill = _FAINT if mark.faint else _INK
        lines.append(
            _text(_LEFT - 12, y, mark.label, anchor="end", fill=fill, weight="bold")
            + _text(_LEFT, y, mark.text, fill=fill)
        )
    return lines


def _segment(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def _text(
    x: float,
    y: float,
    text: str,
    *,
    anchor: str = "start",
    size: int = 12,
    weight: str = "normal",
    fill: str = _INK,
    extra: str = "",
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}" '
        f'fill="{fill}"{" " + extra if extra else ""}>{escape(text)}</text>'
    )
