"""Say why a plan is as it is: what binds it, where its time and memory go, and what anything else would cost."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from uniap_tune.commands.inputs import add_job_arguments, request_from, seconds
from uniap_tune.commands.outputs import print_infeasible, print_json

if TYPE_CHECKING:
    from uniap_tune.planner import Planning, Request

NAME = "explain"
HELP = "say why a plan is as it is, and what anything else would cost"

_MODEL = "as for plan; or a plan.json, or the folder `plan -o` wrote, which hold their inputs"
_PLAN_FILE = "plan.json"
_REQUIRED = ("cluster", "global_batch", "seq_length")
# Attributes of the arguments that are not inputs of a plan.
_OWN = ("command", "run", "model", "why_not", "time_limit", "json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add_job_arguments(parser, required=False, model=_MODEL)
    parser.set_defaults(target=None, optimizer=None)  # so that it shows whether they are given
    parser.add_argument(
        "--why-not",
        action="append",
        default=[],
        metavar="KNOB=N,…",
        help="what fixing these instead would cost, e.g. tp=8,pp=2; may be repeated",
    )
    parser.add_argument(
        "--time-limit", type=seconds, metavar="S", help="leave out what is not answered after S seconds"
    )
    parser.add_argument("--json", action="store_true", help="the explanation as JSON on stdout")


def run(args: argparse.Namespace) -> int:
    """Plan, ask, print."""
    from uniap_tune.deadline import Deadline
    from uniap_tune.errors import InfeasibleError
    from uniap_tune.explain.explanation import explain

    progress = _progress()
    try:
        questions = [_question(text) for text in args.why_not]
        written = _written(args.model)
        request = _request(args) if written is None else _request_of(written, args)
        deadline = Deadline.after(args.time_limit)
        explanation = explain(request, why_not=questions, deadline=deadline, notify=progress)
    except InfeasibleError as error:
        if args.json:
            print_infeasible(error)
        raise
    finally:
        progress("")
    if written is not None:
        _compare(written, explanation.planning)
    if args.json:
        print_json(explanation.to_dict())
    else:
        from uniap_tune.report.explain import print_explanation

        print_explanation(explanation)
    return 0


def _question(text: str) -> Mapping[str, str]:
    from uniap_tune.space import parse_knobs

    return parse_knobs(text.split(","), [], [], option="--why-not").fix


def _request(args: argparse.Namespace) -> Request:
    """The request of the arguments; what a plan.json may supply is required without one."""
    from uniap_tune.errors import InputError

    missing = [_option(name) for name in _REQUIRED if getattr(args, name) is None]
    if missing:
        raise InputError(
            f"explain {args.model} needs {', '.join(missing)}", fix="give them, or a plan.json, which has its inputs"
        )
    args.target, args.optimizer = args.target or "megatron", args.optimizer or "adam"
    return request_from(args)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


# -- a plan that was written -------------------------------------------------------------------------------------------


def _written(source: str) -> Path | None:
    """The plan.json that a source is or holds; ``None`` for a model."""
    from uniap_tune.adapters.plan_json import is_plan

    path = Path(source)
    if path.is_dir():
        path /= _PLAN_FILE
        return path if path.is_file() else None
    if path.suffix != ".json" or not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None  # the readers of models say what is wrong with it
    return path if path.name == _PLAN_FILE or (isinstance(values, dict) and is_plan(values)) else None


def _request_of(path: Path, args: argparse.Namespace) -> Request:
    """The request that a plan.json was made from."""
    from uniap_tune.adapters.plan_json import read_plan
    from uniap_tune.errors import InputError
    from uniap_tune.planner import request_of

    given = [_option(name) for name, value in vars(args).items() if name not in _OWN and value not in (None, [], False)]
    if given:
        raise InputError(
            f"{path} holds its inputs, so {', '.join(given)} cannot be given",
            fix="leave them out, or give the model and the cluster instead of the plan",
        )
    return request_of(read_plan(path), str(path))


def _compare(path: Path, planning: Planning) -> None:
    """Say so where planning again finds another plan than the one in the file."""
    from uniap_tune.adapters.plan_json import read_plan
    from uniap_tune.explain.summary import grid

    before = read_plan(path).plan
    if before.stages != planning.plan.stages or before.num_microbatches != planning.plan.num_microbatches:
        sys.stderr.write(f"{path} has another plan than is found now, which is explained: {grid(before)}\n")


def _progress() -> Callable[[str], None]:
    """A line on stderr that is rewritten, and cleared by an empty one; on a terminal only."""

    def show(question: str) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[K{f'solving: {question}' if question else ''}")
            sys.stderr.flush()

    return show
