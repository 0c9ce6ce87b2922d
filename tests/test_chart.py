"""Plots of characters and SVG pictures: everything in its place, inside its frame."""

from __future__ import annotations

import re
from collections.abc import Collection
from itertools import combinations
from xml.etree import ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from uniap_tune.report.chart import Figure, Mark, number_text, scale_of, text_plot
from uniap_tune.report.svg import svg

SVG = "{http://www.w3.org/2000/svg}"


def figure_of(points: list[tuple[float, float]], faint: Collection[int] = ()) -> Figure:
    marks = [Mark(x, y, str(i), f"text {i}", i in faint) for i, (x, y) in enumerate(points, start=1)]
    return Figure(
        title="a & b <c>", x_title="memory, GiB", y_title="step, s", marks=marks, line=[(m.x, m.y) for m in marks]
    )


FRONTIER = figure_of([(40.0, 10.0), (30.0, 12.0), (20.0, 18.0), (10.0, 19.0)], faint={3})
VALUES = st.floats(1e-3, 1e6)


@given(st.lists(VALUES, min_size=1, max_size=8))
@example([0.10673967705254152, 0.10673967705254148])
@example([424891.0, 0.015625])
def test_scales_hold_all_values_between_their_ends(values: list[float]) -> None:
    scale = scale_of(values)
    places = [scale.place(value) for value in values]
    assert all(0 < place < 1 for place in places)
    assert scale.is_log == (max(values) / min(values) > 4)
    assert [value for _, value in sorted(zip(places, values, strict=True))] == sorted(values)
    assert all(-1e-9 <= scale.place(tick) <= 1 + 1e-9 for tick in scale.ticks)
    assert len(scale.ticks) <= 8


@pytest.mark.parametrize(("low", "high"), [(10.0, 11.0), (1.0, 3.9), (64.0, 256.0), (65.0, 418.0), (1.0, 1024.0)])
def test_ticks_are_a_few_round_numbers(low: float, high: float) -> None:
    ticks = scale_of([low, high]).ticks
    assert 2 <= len(ticks) <= 8
    digits = [number_text(tick).replace(".", "").strip("0") for tick in ticks]
    assert all(len(text) <= 3 for text in digits)


def rows(figure: Figure) -> list[str]:
    """The lines of the plot that hold marks, without the axis on the left."""
    return [re.split(r"[|+]", line, maxsplit=1)[1] for line in text_plot(figure)[1:-3]]


def test_marks_are_where_they_belong() -> None:
    """From the top: slowest first; from the left: leanest first; a faint one is an x; the line is a staircase."""
    found = [(row, column, cell) for row, text in enumerate(rows(FRONTIER)) for column, cell in enumerate(text)]
    marks = [(row, column, cell) for row, column, cell in found if cell in "ox"]
    assert [cell for *_, cell in marks] == ["o", "x", "o", "o"]
    assert [column for _, column, _ in marks] == sorted(column for _, column, _ in marks)
    labels = [cell for *_, cell in found if cell.isdigit()]
    assert labels == ["4", "3", "2", "1"]
    (first, second) = marks[2:]
    between = rows(FRONTIER)[first[0]][first[1] + 2 : second[1]]
    assert set(between) == {"."}


@given(st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=30, unique=True))
def test_plots_stay_in_their_width(points: list[tuple[float, float]]) -> None:
    lines = text_plot(figure_of(points))
    assert max(len(line) for line in lines) <= 78
    assert all(line.isascii() for line in lines)
    assert any("o" in row for row in rows(figure_of(points)))


def test_axes_are_named_and_say_that_they_are_logarithmic() -> None:
    assert text_plot(FRONTIER)[0] == "step, s"
    assert text_plot(FRONTIER)[-1].endswith("memory, GiB")
    wide = text_plot(figure_of([(1.0, 1.0), (2.0, 100.0)]))
    assert wide[0] == "step, s (log scale)"
    assert wide[-1].endswith("memory, GiB")


def elements(figure: Figure, tag: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(svg(figure)).iter(f"{SVG}{tag}"))


def number(element: ElementTree.Element, name: str) -> float:
    return float(element.attrib[name])


def test_picture_is_one_file_with_named_axes() -> None:
    text = svg(FRONTIER)
    root = ElementTree.fromstring(text)
    words = [element.text for element in root.iter(f"{SVG}text")]
    assert {"a & b <c>", "memory, GiB", "step, s", "text 1", "text 4"} <= set(words)
    assert {element.tag for element in root.iter()} <= {f"{SVG}{tag}" for tag in PLAIN}
    assert "href" not in text
    assert text.count("http") == 1  # the name space


PLAIN = ("svg", "title", "rect", "text", "line", "polyline", "circle")


@given(st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=30, unique=True))
def test_marks_of_a_picture_lie_inside_and_labels_apart(points: list[tuple[float, float]]) -> None:
    figure = figure_of(points)
    root = ElementTree.fromstring(svg(figure))
    circles = list(root.iter(f"{SVG}circle"))
    assert len(circles) == len(points)
    for circle in circles:
        assert 76 < number(circle, "cx") < number(root, "width") - 24
        assert 48 < number(circle, "cy") < 400
    order = sorted(range(len(points)), key=lambda i: points[i][0])
    across = [number(circles[i], "cx") for i in order]
    assert across == sorted(across)
    assert all(number(text, "y") < number(root, "height") for text in root.iter(f"{SVG}text"))


def test_close_points_have_labels_that_do_not_touch() -> None:
    figure = figure_of([(30.0, 20.0), (30.01, 19.99), (30.02, 19.98), (36.0, 15.0)])
    labels = [e for e in elements(figure, "text") if e.text in {"1", "2", "3", "4"} and number(e, "y") < 460]
    assert len(labels) == 4
    for a, b in combinations(labels, 2):
        assert abs(number(a, "x") - number(b, "x")) >= 7 or abs(number(a, "y") - number(b, "y")) >= 12


def test_faint_marks_are_hollow() -> None:
    fills = [circle.attrib["fill"] for circle in elements(FRONTIER, "circle")]
    assert fills[2] == "#ffffff"
    assert "#ffffff" not in fills[:2] + fills[3:]
