"""A tradeoff for people: what to choose, a plot, a table, in at most 80 columns; and its CSV and picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from itertools import groupby

from rich.table import Table
from rich.text import Text

from uniap_tune.explain.summary import recompute_text
from uniap_tune.frontier.tradeoff import Axis, Goal, Point, Tradeoff
from uniap_tune.plan import Plan
from uniap_tune.report.chart import Figure, Mark, text_plot
from uniap_tune.report.console import console, print_sentence
from uniap_tune.spec import Recompute
from uniap_tune.units import GIB, format_count, format_percent, format_seconds

_MOST_ROWS = 40
# How much slower than the fastest plan a leaner one may be to be pointed out.
_SLOWER = (0.05, 0.25)
_NOTABLE = 0.01  # part of the memory that is worth a sentence
_HEIGHT, _WIDTH = 14, 78


def print_tradeoff(found: Tradeoff, *, price: float | None, next_command: str) -> None:
    """What was found, a plot and a table of it, and what to do with it."""
    out = console()
    request = found.request
    title = f"{request.model.name} on {request.cluster.name} with {request.target}: step time against {found.axis}"
    out.print(Text(title, style="bold"))
    out.print(f"{request.memory_limit_bytes / GIB:.1f} GiB of each device may be used")
    out.print()
    if len(found.points) > 1:
        for line in text_plot(figure(found), width=_WIDTH, height=_HEIGHT):
            out.print(line)
        out.print()
    out.print(_table(found, price))
    out.print()
    advice = _on_memory(found) if found.axis is Axis.MEMORY else _on_devices(found, price)
    for label, text in [*advice, *_always(found), ("Next", next_command)]:
        print_sentence(out, label, text)


def numbered(found: Tradeoff) -> list[tuple[str, Point]]:
    """The points with the names they go by: numbers from 1, or their numbers of devices."""
    if found.axis is Axis.DEVICES:
        return [(str(point.devices), point) for point in found.points]
    return [(str(number), point) for number, point in enumerate(found.points, start=1)]


# -- the plot and the picture ----------------------------------------------------------------------------------------


def figure(found: Tradeoff) -> Figure:
    """The points in a plane: step time over memory or devices."""
    request = found.request
    on_memory = found.axis is Axis.MEMORY

    def x(point: Point) -> float:
        return point.plan.peak_memory_bytes / GIB if on_memory else float(point.devices)

    marks = [
        Mark(
            x(point),
            point.plan.step_time_s,
            label,
            f"{format_seconds(point.plan.step_time_s)} a step, {point.plan.peak_memory_bytes / GIB:.1f} GiB, "
            f"{_devices(point.devices)}, {_short(point.plan)}",
            point.dominated,
        )
        for label, point in numbered(found)
    ]
    ticks = () if on_memory else tuple(mark.x for mark in marks)
    line = [(mark.x, mark.y) for mark in marks if not mark.faint]
    return Figure(
        title=f"{request.model.name} on {request.cluster.name}: step time against {found.axis}",
        x_title="peak memory of the fullest device, GiB" if on_memory else "devices",
        y_title="step time, s",
        marks=marks,
        line=line,
        steps=on_memory,
        x_ticks=ticks,
    )


# -- the table -------------------------------------------------------------------------------------------------------


def _table(found: Tradeoff, price: float | None) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    columns = _columns(found, price)
    for title in columns:
        table.add_column(title, justify="left" if title == "plan" else "right", no_wrap=title != "plan")
    rows = [_row(found, name, point, price) for name, point in numbered(found)]
    cut = len(rows) > _MOST_ROWS
    for number, (row, point) in enumerate(zip(rows, found.points, strict=True)):
        if cut and _MOST_ROWS // 2 <= number < len(rows) - _MOST_ROWS // 2:
            if number == _MOST_ROWS // 2:
                table.add_row("...")
            continue
        style = "bold" if number == found.chosen else "dim" if point.dominated else None
        table.add_row(*row, style=style)
    return table


def _columns(found: Tradeoff, price: float | None) -> list[str]:
    if found.axis is Axis.MEMORY:
        return ["point", "GiB", "step", "slower", "plan"]
    spent = "device-s" if price is None else "cost/step"
    return ["devices", "step", "tokens/s", spent, "GiB", "plan"]


def _row(found: Tradeoff, name: str, point: Point, price: float | None) -> list[str]:
    plan = point.plan
    mark = " x" if point.dominated else ""
    memory = _gib(found, point)
    step = format_seconds(plan.step_time_s)
    if found.axis is Axis.MEMORY:
        slower = plan.step_time_s / found.points[0].plan.step_time_s - 1
        return [name, memory, step, f"{slower:+.1%}", _short(plan) + mark]
    spent = _amount(point.device_seconds if price is None else point.cost_per_step(price))
    return [name, step, format_count(plan.tokens_per_s), spent, memory, _short(plan) + mark]


def _gib(found: Tradeoff, point: Point) -> str:
    """GiB with as many decimals as tell the points apart."""
    peaks = [other.plan.peak_memory_bytes for other in found.points]
    decimals = 1 if max(peaks) - min(peaks) > len(peaks) * GIB / 20 or len(peaks) == 1 else 3
    return f"{point.plan.peak_memory_bytes / GIB:.{decimals}f}"


def _amount(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _devices(*counts: int) -> str:
    return ", ".join(map(str, counts)) + (" device" if counts == (1,) else " devices")


def _short(plan: Plan) -> str:
    """The plan in one short line: ``"pp2 vpp5 tp4 dp1 z0 mb1x64 full 30/40"``."""
    uniform = plan.uniform()
    parts = [f"pp{plan.pp}"]
    if plan.virtual_stages > 1:
        parts.append(f"vpp{plan.virtual_stages}")
    blocks = [s for stage in plan.stages for s in stage.block_strategies()]
    modes = [s.recompute for s in blocks]
    parts.append(uniform.describe().partition(" rc-")[0] if uniform is not None else "mixed")
    parts.append(f"mb{plan.micro_batch_size}x{plan.num_microbatches}")
    if Recompute.FULL in modes:
        count = modes.count(Recompute.FULL)
        parts.append("full" if count == len(modes) else f"full {count}/{len(modes)}")
    elif modes[0] is not Recompute.NONE:
        parts.append(recompute_text(plan))
    return " ".join(parts)


# -- what to do with it ----------------------------------------------------------------------------------------------


def _on_memory(found: Tradeoff) -> Iterator[tuple[str, str]]:
    points = numbered(found)
    (_, first), (_, last) = points[0], points[-1]
    if found.goal is None or found.goal is Goal.MIN_TIME:
        yield "Fastest", f"point 1: {_measures(first)}; nothing that fits is faster"
    if found.goal is not None:
        if found.goal is Goal.MIN_MEMORY:
            yield "Leanest", f"{_measures(last)}; no plan of this job on this cluster needs less memory"
        return
    if len(points) > 1:
        yield "How to read", "from row to row steps get longer and memory is freed: take the last whose step you accept"
    for most in _SLOWER:
        within = [x for x in points if _slower(x[1], first) <= most and not x[1].dominated]
        name, leanest = min(within, key=lambda x: x[1].plan.peak_memory_bytes, default=points[0])
        if _saved(leanest, first) >= _NOTABLE and leanest is not last:
            price = (
                f"{format_percent(_saved(leanest, first))} less memory for {format_percent(_slower(leanest, first))}"
            )
            yield f"Within {most:.0%}", f"point {name}: {_measures(leanest)}: {price} more time"
    name = points[-1][0]
    if len(points) == 1 and found.complete:
        yield "Choice", "none to make: the fastest plan is also the one that needs least memory"
    elif found.stopped:
        yield "Leanest", f"so far point {name}: {_measures(last)}"
    else:
        yield "Leanest", f"point {name}: {_measures(last)}; no plan needs less memory"


def _slower(point: Point, than: Point) -> float:
    return point.plan.step_time_s / than.plan.step_time_s - 1


def _saved(point: Point, than: Point) -> float:
    return 1 - point.plan.peak_memory_bytes / than.plan.peak_memory_bytes


def _measures(point: Point) -> str:
    return f"{format_seconds(point.plan.step_time_s)} a step, {point.plan.peak_memory_bytes / GIB:.1f} GiB"


def _on_devices(found: Tradeoff, price: float | None) -> Iterator[tuple[str, str]]:
    if found.chosen is not None:
        yield from _choice(found, found.points[found.chosen], price)
        return
    fastest = min(found.points, key=lambda point: point.plan.step_time_s)
    cheapest = min(found.points, key=lambda point: (point.device_seconds, point.devices))
    yield "Fastest", f"{_devices(fastest.devices)}: {_measures(fastest)}"
    text = (
        f"{_devices(cheapest.devices)}: {_amount(cheapest.device_seconds)} device-seconds a step, at any price a device"
    )
    yield "Cheapest", text + _cost(cheapest, price)
    if fastest.devices > cheapest.devices:
        more, quicker = fastest.devices / cheapest.devices, cheapest.plan.step_time_s / fastest.plan.step_time_s
        yield "Scaling", f"{more:.3g} times the devices of the cheapest make steps {quicker:.3g} times as fast"


def _choice(found: Tradeoff, point: Point, price: float | None) -> Iterator[tuple[str, str]]:
    if found.goal is Goal.MIN_COST:
        yield "Cheapest", f"{_devices(point.devices)}: {_measures(point)}" + _cost(point, price)
        return
    yield "Fewest", f"{_devices(point.devices)}: {_measures(point)}" + _cost(point, price)
    slower = [other for other in found.points if other.devices < point.devices]
    if slower:
        best = min(slower, key=lambda other: other.plan.step_time_s)
        yield "Fewer", f"too slow: {format_seconds(best.plan.step_time_s)} a step on {_devices(best.devices)}"


def _cost(point: Point, price: float | None) -> str:
    if price is None:
        return ""
    tokens = point.plan.tokens_per_s * point.plan.step_time_s
    step = point.cost_per_step(price)
    return f"; a step costs {_amount(step)}, 1B tokens {step / tokens * 1e9:,.0f}, at {price:g} a device-hour"


def _always(found: Tradeoff) -> Iterator[tuple[str, str]]:
    for why, group in groupby(found.left_out, key=lambda item: item[1]):
        yield "Left out", f"{_devices(*(count for count, _ in group))}: {why}"
    if any(point.dominated for point in found.points):
        other = "memory" if found.axis is Axis.MEMORY else "devices"
        yield "Marked x", f"pass over: another point has a step no longer with no more {other}"
    if found.axis is Axis.MEMORY and found.goal is None:
        many = len(found.points)
        all_of_them = "there is no other" if many == 1 else f"these {many} are all there are"
        yield "All", all_of_them if found.complete else "there may be more; --all finds every point"
    if found.stopped:
        yield "Stopped", "before everything asked for was found; what is shown is right"
    yield "Proof", _proof(found.axis)


def _proof(axis: Axis) -> str:
    if axis is Axis.MEMORY:
        return (
            "for each point: no plan within its memory is faster, and none as fast needs less memory. "
            "The times compared are TPI, the solver's closed form; those shown are simulated"
        )
    return "for each number of devices: no plan has a lower TPI, the solver's closed form. Steps shown are simulated"


# -- for machines ----------------------------------------------------------------------------------------------------


def csv_text(found: Tradeoff, price: float | None) -> str:
    """A line a point, with the units in the names of the columns."""
    records = [_record(name, point, price) for name, point in numbered(found)]
    lines = io.StringIO()
    writer = csv.DictWriter(lines, fieldnames=list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return lines.getvalue()


def _record(name: str, point: Point, price: float | None) -> dict[str, object]:
    plan, uniform = point.plan, point.plan.uniform()
    degrees = ("tp", "dp", "cp", "ep", "zero")
    record = {
        "point": name,
        "devices": point.devices,
        "step_time_s": plan.step_time_s,
        "objective_s": plan.objective_s,
        "peak_memory_bytes": plan.peak_memory_bytes,
        "tokens_per_s": plan.tokens_per_s,
        "mfu": plan.mfu,
        "dominated": str(point.dominated).lower(),
        "pp": plan.pp,
        "virtual_stages": plan.virtual_stages,
        **{degree: "mixed" if uniform is None else getattr(uniform, degree) for degree in degrees},
        "micro_batch_size": plan.micro_batch_size,
        "num_microbatches": plan.num_microbatches,
        "recompute": recompute_text(plan),
    }
    return record if price is None else {**record, "cost_per_step": point.cost_per_step(price)}
