"""The bare optimizer: a problem of your own cost tables in, the proven optimum out."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uniap_tune.commands.inputs import seconds

if TYPE_CHECKING:
    from uniap_tune.problem import Problem, Solution

NAME = "solve"
HELP = "solve a problem given as cost tables (JSON)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("problem", type=Path, metavar="PROBLEM.json", help="see docs/reference/solve.md")
    parser.add_argument("--json", action="store_true", help="the answer as JSON on stdout")
    parser.add_argument(
        "--solver",
        choices=("auto", "columns", "highs", "cbc"),
        default="auto",
        help="auto: stage columns on chains, HiGHS otherwise",
    )
    parser.add_argument(
        "--formulation",
        choices=("auto", "columns", "layers", "counts"),
        default="auto",
        help="of the MILP: over stage columns (chains), over layers, or with equal layers counted",
    )
    parser.add_argument("--gap", type=float, default=1e-9, metavar="G", help="relative gap to stop at (default 1e-9)")
    parser.add_argument("--time-limit", type=seconds, metavar="S", help="stop after S seconds with the best so far")


def run(args: argparse.Namespace) -> int:
    """Solve and print."""
    from uniap_tune.adapters.problem_json import read_problem
    from uniap_tune.errors import ExitCode
    from uniap_tune.problem import Status
    from uniap_tune.solvers import Formulation, solve

    problem = read_problem(args.problem)
    _check(args, problem)
    started = time.process_time()
    formulation = Formulation(args.formulation)
    solution = solve(problem, args.solver, formulation=formulation, gap=args.gap, seconds=args.time_limit)
    document = answer(problem, solution, time.process_time() - started)
    if args.json:
        sys.stdout.write(json.dumps(document, allow_nan=False) + "\n")
    else:
        sys.stdout.write(_for_people(document))
    if solution.status is Status.INFEASIBLE:
        return int(ExitCode.INFEASIBLE)
    return int(ExitCode.OK if solution.assignment is not None else ExitCode.STOPPED)


def _check(args: argparse.Namespace, problem: Problem) -> None:
    from uniap_tune.errors import InputError

    if not 0 <= args.gap < 1:
        raise InputError(f"--gap {args.gap}: must be from 0 to less than 1")
    if "columns" in (args.solver, args.formulation) and not problem.is_chain:
        raise InputError("columns: the graph has edges between layers that are no neighbours", fix="use highs")


def answer(problem: Problem, solution: Solution, cpu_s: float) -> dict[str, Any]:
    """The answer of the ``solve`` format, with nulls where there is no plan."""
    from uniap_tune.problem import evaluate

    document: dict[str, Any] = {"schema_version": 1, "status": str(solution.status)}
    if solution.assignment is None:
        found = dict.fromkeys(("objective_s", "gap", "stage", "strategy", "stage_time_s", "link_time_s", "stage_bytes"))
        bound = solution.bound_s if 0 < solution.bound_s < float("inf") else None
        return {**document, **found, "bound_s": bound, "solver": solution.solver, "cpu_s": cpu_s}
    value = evaluate(problem, solution.assignment)
    return {
        **document,
        "objective_s": value.objective_s,
        "bound_s": solution.bound_s,
        "gap": solution.gap,
        "stage": list(solution.assignment.stage),
        "strategy": list(solution.assignment.strategy),
        "stage_time_s": list(value.stage_time_s),
        "link_time_s": list(value.link_time_s),
        "stage_bytes": list(value.stage_bytes),
        "solver": solution.solver,
        "cpu_s": cpu_s,
    }


def _for_people(document: dict[str, Any]) -> str:
    from uniap_tune.units import format_bytes, format_seconds

    if document["objective_s"] is None:
        return f"{document['status']}: no plan\n"
    lines = [f"{document['status']}: {format_seconds(document['objective_s'])}, gap {document['gap']:.1e}"]
    for i, seconds_ in enumerate(document["stage_time_s"]):
        members = [u for u, stage in enumerate(document["stage"]) if stage == i]
        chosen = ",".join(str(document["strategy"][u]) for u in members)
        size = format_bytes(document["stage_bytes"][i])
        lines.append(f"stage {i}: layers {members[0]}-{members[-1]}, {format_seconds(seconds_)}, {size}, [{chosen}]")
    return "\n".join(lines) + "\n"
