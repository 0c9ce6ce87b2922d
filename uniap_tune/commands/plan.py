"""Plan a training job: the fastest parallel configuration that fits, with a proof, and its launch files."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uniap_tune.commands.inputs import add_job_arguments, add_megatron_version, positive_int, request_from, seconds
from uniap_tune.commands.outputs import print_infeasible, print_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from uniap_tune.explain.summary import Binding
    from uniap_tune.planner import Planning, Request
    from uniap_tune.search import Progress

# With --rank simulated, plans this much above the proven optimum are considered.
_SIMULATED_WINDOW = 0.03

NAME = "plan"
HELP = "plan a training job and write its launch files"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add_job_arguments(parser)
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="write plan.json and launch files there")
    parser.add_argument("--force", action="store_true", help="overwrite files that exist")
    parser.add_argument("--json", action="store_true", help="the plan as JSON on stdout")
    parser.add_argument("--top", type=positive_int, default=1, metavar="K", help="the K best different plans")
    parser.add_argument("--solver", choices=("auto", "highs", "cbc"), default="auto", help="auto: stage columns")
    parser.add_argument(
        "--time-limit", type=seconds, metavar="S", help="stop after S seconds with the best plan so far"
    )
    parser.add_argument(
        "--rank",
        choices=("proven", "simulated"),
        default="proven",
        help="proven: the optimum (default); simulated: of plans within 3 percent of it, the shortest simulated step",
    )
    parser.add_argument("--certify", action="store_true", help="prove the optimum a second time by another method")
    add_megatron_version(parser)
    parser.add_argument("--jobs", type=positive_int, default=1, metavar="N", help="processes to search with")
    parser.add_argument(
        "--no-check", action="store_true", help="do not try what is written with -o on an installed DeepSpeed first"
    )


def run(args: argparse.Namespace) -> int:
    """Plan, print, write."""
    from uniap_tune.errors import InfeasibleError
    from uniap_tune.planner import certify

    started = time.perf_counter(), time.process_time()
    try:
        request = request_from(args)
        planning, prices = _plan(args, request)
        certificate = certify(planning) if args.certify else None
    except InfeasibleError as error:
        if args.json:
            print_infeasible(error)
        raise
    if args.output is not None:
        if request.target == "deepspeed" and not args.no_check:
            _check(planning)
        write(planning, args.output, force=args.force, megatron_version=args.megatron_version)
    spent = {"cpu_s": time.process_time() - started[1], "wall_s": time.perf_counter() - started[0]}
    if args.json:
        document = _document(planning, prices, spent, args.top)
        print_json(document if certificate is None else {**document, "certificate": certificate})
    else:
        from uniap_tune.report.plan import print_planning

        print_planning(
            planning,
            prices,
            _binding(planning, args.time_limit),
            output=args.output,
            shown=args.top,
            next_command=_next_command(args),
        )
        if certificate is not None:
            sys.stderr.write(f"certified by {certificate['method']}\n")
        sys.stderr.write(f"planned in {spent['wall_s']:.2f} s\n")
    return 0


def _plan(args: argparse.Namespace, request: Request) -> tuple[Planning, dict[str, float | None]]:
    from uniap_tune.deadline import Deadline
    from uniap_tune.explain.whatif import target_prices
    from uniap_tune.planner import RERANK_GAP
    from uniap_tune.planner import run as run_planner
    from uniap_tune.strategy import Target

    deadline = Deadline.after(args.time_limit)
    planning = run_planner(
        request,
        top=max(args.top, 2),  # the runner-up is part of the answer
        deadline=deadline,
        solver=args.solver,
        near=_SIMULATED_WINDOW if args.rank == "simulated" else RERANK_GAP,
        jobs=args.jobs,
        notify=_progress(),
    )
    prices: dict[str, float | None] = {}
    if request.target is Target.ANY and not deadline.is_over():
        others = (Target.MEGATRON, Target.DEEPSPEED)
        prices = dict(target_prices(planning, others, deadline))
    return planning, prices


def _binding(planning: Planning, time_limit: float | None) -> Binding | None:
    """What binds the plan; left out when time is short."""
    from uniap_tune.explain.summary import binding

    return None if time_limit is not None else binding(planning.plan, planning.space, planning.prices)


def _next_command(args: argparse.Namespace) -> str:
    if args.output is not None:
        return f"bash {args.output}/launch.sh" if args.target != "any" else f"read {args.output}/plan.json"
    return "the same command with -o DIR writes plan.json and the launch files"


def _check(planning: Planning) -> None:
    """Try the plan on DeepSpeed's own engine, where DeepSpeed is installed.

    Raises:
        UnsupportedError: this DeepSpeed refuses it.
    """
    from importlib.util import find_spec

    if find_spec("deepspeed") is None:
        return
    from uniap_tune.deepspeed.check import check_plan
    from uniap_tune.errors import UnsupportedError

    verdict = check_plan(planning.plan, planning.request)
    if verdict.refused:
        fix = "--no-check writes it regardless; another version of DeepSpeed may accept it"
        raise UnsupportedError("the installed DeepSpeed refuses this plan", why=verdict.reason, fix=fix)
    sys.stderr.write(f"{verdict.sentence}\n")


def write(planning: Planning, folder: Path, *, force: bool, megatron_version: str) -> None:
    """plan.json and the launch files of the best plan."""
    from uniap_tune.files import write_files
    from uniap_tune.render import EXECUTABLE, LAUNCH_FILES, render

    request = planning.request
    files = {"plan.json": planning.plan.to_json()}
    files |= render(planning.plan, request.model, request.cluster, request.job, megatron_version=megatron_version)
    write_files(folder, files, force=force, executable=EXECUTABLE)
    if force:  # files of an earlier plan that this one does not have would be mistaken for its own
        for name in sorted(LAUNCH_FILES - set(files)):
            (folder / name).unlink(missing_ok=True)


def _progress() -> Callable[[Progress], None] | None:
    """A line on stderr that is rewritten, on a terminal only."""
    if not sys.stderr.isatty():
        return None
    from uniap_tune.units import format_seconds

    last = [0.0]

    def show(progress: Progress) -> None:
        now = time.monotonic()
        if now - last[0] < 0.1 and progress.left:
            return
        last[0] = now
        best = format_seconds(progress.incumbent_s) if progress.incumbent_s < float("inf") else "none yet"
        line = f"solved {progress.solved}, pruned {progress.pruned}, left {progress.left}; best {best}"
        sys.stderr.write(f"\r\x1b[K{line}, bound {format_seconds(progress.bound_s)}")
        if not progress.left:
            sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()

    return show


def _document(planning: Planning, prices: dict[str, float | None], spent: dict[str, float], top: int) -> dict[str, Any]:
    document = planning.plan.to_dict()
    if top > 1:
        document["alternatives"] = [plan.to_dict() for plan in planning.plans[1:top]]
    if prices:
        document["restrictions"] = prices
    result = planning.result
    document["solver"] = {
        "name": result.solver,
        "pairs": [
            {
                "pp": pair.pp,
                "num_microbatches": pair.num_microbatches,
                "outcome": str(pair.outcome),
                "bound_s": pair.bound_s if pair.bound_s < float("inf") else None,
                "objective_s": pair.objective_s,
            }
            for pair in result.pairs
        ],
        **spent,
    }
    return document
