"""Step time against memory or against devices: every plan worth choosing, each proven, or the one a goal asks for."""

from __future__ import annotations

import argparse
import math
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uniap_tune.commands.inputs import (
    add_job_arguments,
    add_megatron_version,
    positive_int,
    price,
    request_from,
    seconds,
)
from uniap_tune.commands.outputs import print_infeasible, print_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from uniap_tune.frontier.tradeoff import Goal, Point, Tradeoff
    from uniap_tune.planner import Request

NAME = "frontier"
HELP = "step time against memory or devices: all the plans worth choosing"

_POINTS = 16
_MOST_POINTS = 1000  # each is a memory limit to look at; no frontier seen has as many points
_GOALS = ("min-time", "min-memory", "min-devices", "min-cost")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add_job_arguments(parser)
    parser.add_argument(
        "--over", choices=("memory", "devices"), help="what step time is traded against (default memory)"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--points", type=_several, metavar="N", help=f"points, spread over the memory (default {_POINTS})"
    )
    size.add_argument("--all", action="store_true", help="every point; over devices, every number of nodes")
    size.add_argument(
        "--devices", type=_counts, metavar="N,N,…", help="numbers of devices to try (default: parts and doublings)"
    )
    goal = parser.add_mutually_exclusive_group()
    goal.add_argument("--min-time", action="store_true", help="only the fastest plan (TensorOpt's mini-time)")
    goal.add_argument("--min-memory", action="store_true", help="only the plan that needs least memory")
    goal.add_argument(
        "--min-devices", action="store_true", help="the fewest devices that do (TensorOpt's mini-parallelism)"
    )
    goal.add_argument("--min-cost", action="store_true", help="the number of devices at which a step costs least")
    parser.add_argument(
        "--deadline", type=seconds, metavar="S", help="with --min-devices or --min-cost: longest step, in seconds"
    )
    parser.add_argument(
        "--price-per-device-hour", type=price, metavar="P", help="shows what a step costs, in the currency of P"
    )
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write a picture there")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write a table there")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="write each plan and its launch files there")
    add_megatron_version(parser)
    parser.add_argument("--force", action="store_true", help="overwrite files that exist")
    parser.add_argument("--json", action="store_true", help="the points and their plans as JSON on stdout")
    parser.add_argument("--time-limit", type=seconds, metavar="S", help="stop after S seconds with the points so far")


def run(args: argparse.Namespace) -> int:
    """Find the points, write what was asked for, print them."""
    from uniap_tune.errors import InfeasibleError

    started = time.perf_counter(), time.process_time()
    _require_sense(args)
    request = request_from(args)
    try:
        found = _find(args, request)
    except InfeasibleError as error:
        if args.json:
            print_infeasible(error)
        raise
    finally:
        if sys.stderr.isatty():
            sys.stderr.write("\r\x1b[K")
    _write(args, found)
    spent = {"cpu_s": time.process_time() - started[1], "wall_s": time.perf_counter() - started[0]}
    if args.json:
        print_json({**_document(found, args.price_per_device_hour), "solver": spent})
    else:
        from uniap_tune.report.frontier import print_tradeoff

        print_tradeoff(found, price=args.price_per_device_hour, next_command=_next_command(args, found))
        count = len(found.points)
        sys.stderr.write(f"{count} point{'s' if count > 1 else ''} in {spent['wall_s']:.2f} s\n")
    return 0


def _goal(args: argparse.Namespace) -> Goal | None:
    from uniap_tune.frontier.tradeoff import Goal

    return next((Goal(name) for name in _GOALS if getattr(args, name.replace("-", "_"))), None)


def _require_sense(args: argparse.Namespace) -> None:
    """Refuse options that do not go together.

    Raises:
        InputError: with the two that clash.
    """
    from uniap_tune.errors import InputError

    on_devices = args.min_devices or args.min_cost or args.devices is not None or args.over == "devices"
    if args.deadline is not None and not (args.min_devices or args.min_cost):
        raise InputError("--deadline: without --min-devices or --min-cost", fix="add one of them, or leave it out")
    if args.min_cost and args.price_per_device_hour is None:
        raise InputError("--min-cost: needs the price of a device", fix="add --price-per-device-hour P")
    if args.points is not None and on_devices:
        raise InputError("--points: against devices there is a point a number", fix="give --devices N,N,… or --all")
    if on_devices and (args.over == "memory" or args.min_time or args.min_memory):
        raise InputError(
            "--over memory, --min-time and --min-memory keep all devices; another option asks for numbers of devices",
            fix="leave one of them out",
        )


def _find(args: argparse.Namespace, request: Request) -> Tradeoff:
    from uniap_tune.deadline import Deadline
    from uniap_tune.frontier.scaling import against_devices, device_counts, reach
    from uniap_tune.frontier.tradeoff import against_memory

    deadline, notify = Deadline.after(args.time_limit), _progress()
    goal = _goal(args)
    counts = args.devices or device_counts(request.cluster, every=args.all)
    if goal is not None:
        longest = args.deadline or math.inf
        return reach(request, goal, counts, longest_step_s=longest, deadline=deadline, notify=notify)
    if args.over == "devices" or args.devices is not None:
        return against_devices(request, counts, deadline=deadline, notify=notify)
    count = None if args.all else args.points or _POINTS
    return against_memory(request, count=count, deadline=deadline, notify=notify)


def _progress() -> Callable[[int], None] | None:
    """A line on stderr that is rewritten, on a terminal only."""
    if not sys.stderr.isatty():
        return None

    def show(count: int) -> None:
        sys.stderr.write(f"\r\x1b[Kpoints found: {count}")
        sys.stderr.flush()

    return show


# -- what is written -------------------------------------------------------------------------------------------------


def _write(args: argparse.Namespace, found: Tradeoff) -> None:
    """The picture, the table and the plans that were asked for: all of them or none."""
    from uniap_tune.files import write_files
    from uniap_tune.render import EXECUTABLE, LAUNCH_FILES
    from uniap_tune.report.frontier import csv_text, figure
    from uniap_tune.report.svg import svg

    table = csv_text(found, args.price_per_device_hour)
    files: dict[Path, str] = {}
    folders: list[Path] = []
    if args.output is not None:
        plans = _plan_files(found, args.megatron_version)
        folders = sorted({(args.output / name).parent for name in plans})
        files |= {args.output / name: text for name, text in plans.items()}
        if found.chosen is None:
            files[args.output / "frontier.csv"] = table
    if args.svg is not None:
        files[args.svg] = svg(figure(found))
    if args.csv is not None:
        files[args.csv] = table
    executable = [str(path) for path in files if path.name in EXECUTABLE]
    write_files(Path(), {str(path): text for path, text in files.items()}, force=args.force, executable=executable)
    if args.force:  # files of an earlier plan that this one does not have would be mistaken for its own
        folders += [] if args.output is None else _earlier_points(args.output)
        for path in {folder / name for folder in folders for name in ("plan.json", *LAUNCH_FILES)} - set(files):
            path.unlink(missing_ok=True)
        for folder in folders:
            with suppress(OSError):
                folder.rmdir()  # refused by a folder with files in it


def _earlier_points(output: Path) -> list[Path]:
    """Folders of points that are there, whoever wrote them."""
    return [path for pattern in ("point-[0-9]*", "devices-[0-9]*") for path in output.glob(pattern) if path.is_dir()]


def _plan_files(found: Tradeoff, version: str) -> dict[str, str]:
    """The launch files of the chosen plan, or those of every point in a folder of its own."""
    if found.chosen is not None:
        return _launch_files(found.points[found.chosen], version)
    files: dict[str, str] = {}
    for number, point in enumerate(found.points, start=1):
        folder = f"point-{number:02d}" if found.axis == "memory" else f"devices-{point.devices}"
        files |= {f"{folder}/{name}": text for name, text in _launch_files(point, version).items()}
    return files


def _launch_files(point: Point, version: str) -> dict[str, str]:
    from uniap_tune.render import render

    request = point.request
    files = render(point.plan, request.model, request.cluster, request.job, megatron_version=version)
    return {"plan.json": point.plan.to_json(), **files}


def _next_command(args: argparse.Namespace, found: Tradeoff) -> str:
    if args.output is None:
        what = "its launch files" if found.chosen is not None else "the launch files of every point"
        return f"the same command with -o DIR writes {what}"
    if found.chosen is not None:
        return f"bash {args.output}/launch.sh" if args.target != "any" else f"read {args.output}/plan.json"
    return f"choose a point; its plan is in {args.output}/"


def _document(found: Tradeoff, price: float | None) -> dict[str, Any]:
    points = []
    for point in found.points:
        plan = point.plan
        data = {
            "step_time_s": plan.step_time_s,
            "objective_s": plan.objective_s,
            "bound_s": plan.bound_s,
            "peak_memory_bytes": plan.peak_memory_bytes,
            "devices": point.devices,
            "dominated": point.dominated,
        }
        if price is not None:
            data["cost_per_step"] = point.cost_per_step(price)
        points.append({**data, "plan": plan.to_dict()})
    return {
        "schema_version": 1,
        "status": "limit" if found.stopped else "optimal",
        "over": str(found.axis),
        "goal": None if found.goal is None else str(found.goal),
        "chosen": found.chosen,
        "complete": found.complete,
        "points": points,
        "left_out": [{"devices": count, "why": why} for count, why in found.left_out],
    }


def _several(text: str) -> int:
    """An argparse type: a whole number above one."""
    value = positive_int(text)
    if value < 2:
        raise argparse.ArgumentTypeError("a frontier has two ends: give at least 2")
    if value > _MOST_POINTS:
        raise argparse.ArgumentTypeError(f"give at most {_MOST_POINTS}, or --all for every point")
    return value


def _counts(text: str) -> list[int]:
    """An argparse type: whole numbers with commas between them."""
    return sorted({positive_int(part) for part in text.split(",")})
