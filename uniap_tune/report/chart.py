"""Points in a plane as plain characters, and the scales that pictures share. Knows nothing of plans."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

# An axis is logarithmic where its largest value is more than so many times its smallest.
_LOG_FROM = 4.0
_MARGIN = 0.05  # of the range, on either side of it
_TICKS = 6


@dataclass(frozen=True, slots=True)
class Mark:
    """A point with a short label and a line of text. ``faint``: it is there, but not to be chosen."""

    x: float
    y: float
    label: str
    text: str = ""
    faint: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """Marks, and the line that joins some of them: a staircase where ``steps``, else straight.

    ``x_ticks``: values of x to mark; round numbers by default.
    """

    title: str
    x_title: str
    y_title: str
    marks: Sequence[Mark]
    line: Sequence[tuple[float, float]] = ()
    steps: bool = True
    x_ticks: Sequence[float] = ()

    @property
    def x_scale(self) -> Scale:
        """The scale of x."""
        return scale_of([mark.x for mark in self.marks], self.x_ticks)

    @property
    def y_scale(self) -> Scale:
        """The scale of y."""
        return scale_of([mark.y for mark in self.marks])

    @property
    def axis_titles(self) -> tuple[str, str]:
        """Those of x and y, which say so where they are logarithmic."""
        return (
            self.x_title + (" (log scale)" if self.x_scale.is_log else ""),
            self.y_title + (" (log scale)" if self.y_scale.is_log else ""),
        )

    def corners(self) -> list[tuple[float, float]]:
        """The corners of the line, by rising x; a staircase keeps its y until the next point."""
        points = sorted(self.line)
        if not self.steps:
            return points
        corners = points[:1]
        for x, y in points[1:]:
            corners += [(x, corners[-1][1]), (x, y)]
        return corners


@dataclass(frozen=True, slots=True)
class Scale:
    """From values to 0…1, linear or logarithmic."""

    low: float
    high: float
    is_log: bool
    ticks: tuple[float, ...]

    def place(self, value: float) -> float:
        """Where a value lies."""
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def scale_of(values: Sequence[float], ticks: Sequence[float] = ()) -> Scale:
    """A scale with room for all values, which must be positive."""
    low, high = min(values), max(values)
    if high / low > _LOG_FROM:
        margin = (high / low) ** _MARGIN
        low, high = low / margin, high * margin
        return Scale(low, high, True, tuple(ticks) or _log_ticks(low, high))
    close = high - low < 1e-6 * high  # as good as one value
    margin = 0.1 * high if close else _MARGIN * (high - low)
    low, high = low - margin, high + margin
    return Scale(low, high, False, tuple(ticks) or _linear_ticks(low, high))


def _linear_ticks(low: float, high: float) -> tuple[float, ...]:
    power = 10.0 ** math.floor(math.log10((high - low) / _TICKS))
    step = next(step for m in (1, 2, 2.5, 5, 10) if (step := m * power) * _TICKS >= high - low)
    return tuple(number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1))


def _log_ticks(low: float, high: float) -> tuple[float, ...]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: tuple[float, ...] = ()
    for mantissas in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5), (1,)):
        found = tuple(m * 10.0**power for power in powers for m in mantissas if low <= m * 10.0**power <= high)
        if len(found) <= _TICKS + 1:
            return found
    return found[:: -(-len(found) // _TICKS)]


def number_text(value: float) -> str:
    """A tick's number."""
    return f"{value:.6g}"


def text_plot(figure: Figure, *, width: int = 78, height: int = 16) -> list[str]:
    """The figure as lines of at most ``width`` characters: ``o`` a mark, ``x`` a faint one, dots the line."""
    y_scale, x_scale = figure.y_scale, figure.x_scale
    left = max(len(number_text(tick)) for tick in y_scale.ticks) + 1
    columns = width - left - 2
    cells = [[" "] * columns for _ in range(height)]

    def cell(x: float, y: float) -> tuple[int, int]:
        row = height - 1 - round(y_scale.place(y) * (height - 1))
        return row, round(x_scale.place(x) * (columns - 1))

    _draw_line(cells, [cell(x, y) for x, y in figure.corners()])
    for mark in figure.marks:
        row, column = cell(mark.x, mark.y)
        cells[row][column] = "x" if mark.faint else "o"
    for mark in figure.marks:
        _write_label(cells, *cell(mark.x, mark.y), mark.label)
    x_title, y_title = figure.axis_titles
    lines = [y_title]
    names = {height - 1 - round(y_scale.place(tick) * (height - 1)): number_text(tick) for tick in y_scale.ticks}
    for row, content in enumerate(cells):
        edge = "+" if row in names else "|"
        lines.append(f"{names.get(row, ''):>{left}} {edge}{''.join(content)}".rstrip())
    ruler, numbers = _x_axis(x_scale, columns)
    lines += [f"{'':>{left}} +{ruler}", f"{'':>{left + 2}}{numbers}".rstrip()]
    return [*lines, f"{x_title:>{width}}"]


def _draw_line(cells: list[list[str]], corners: Sequence[tuple[int, int]]) -> None:
    for (row, column), (next_row, next_column) in pairwise(corners):
        steps = max(abs(next_row - row), abs(next_column - column), 1)
        for step in range(steps + 1):
            part = step / steps
            cells[round(row + part * (next_row - row))][round(column + part * (next_column - column))] = "."


def _write_label(cells: list[list[str]], row: int, column: int, label: str) -> None:
    """Beside or above its mark, where nothing but the line is; nowhere if there is no such place."""
    size = len(label)
    places = [(row, column + 1), (row - 1, column + 1), (row - 1, column), (row, column - size), (row + 1, column)]
    for r, start in places:
        room = cells[r][start : start + size] if 0 <= r < len(cells) and start >= 0 else []
        after = cells[r][start + size : start + size + 1] if room else []
        if len(room) == size and set(room) <= {" ", "."} and not any(text.isalnum() and text != "o" for text in after):
            cells[r][start : start + size] = label
            return


def _x_axis(scale: Scale, columns: int) -> tuple[str, str]:
    """The axis with its ticks, and the numbers below, as many as have room."""
    ruler = ["-"] * columns
    numbers = [" "] * columns
    for tick in scale.ticks:
        column = round(scale.place(tick) * (columns - 1))
        text = number_text(tick)
        start = min(max(0, column - len(text) // 2), columns - len(text))
        ruler[column] = "+"
        around = numbers[max(0, start - 1) : start + len(text) + 1]
        if set(around) <= {" "}:
            numbers[start : start + len(text)] = text
    return "".join(ruler), "".join(numbers)
