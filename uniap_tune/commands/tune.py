"""Tune a training recipe: the same recipe with the fastest parallel settings that fit, the changes, and the gain."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uniap_tune.commands.inputs import add_megatron_version, add_recipe_reading, fraction, seconds, set_values
from uniap_tune.commands.outputs import print_infeasible, print_json

if TYPE_CHECKING:
    from uniap_tune.planner import Request
    from uniap_tune.recipe import Changes, Recipe
    from uniap_tune.tuning import Configuration, Tuning

NAME = "tune"
HELP = "tune an existing training recipe: same format, few changes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        help="a Megatron-LM script, model_config.yaml, NeMo YAML, Megatron-Bridge FILE.py[::FUNCTION], argument list",
    )
    parser.add_argument(
        "--cluster", required=True, help="NODESxDEVICES:DEVICE such as 8x8:h100, a shipped cluster, or a YAML/TOML file"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="write the tuned recipe and plan.json there")
    parser.add_argument(
        "--check", action="store_true", help="exit 6 if the recipe differs from its plan (DIR's, if -o)"
    )
    parser.add_argument("--force", action="store_true", help="overwrite files that exist")
    parser.add_argument("--json", action="store_true", help="the answer as JSON on stdout")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a variable of the script")
    add_recipe_reading(parser)
    add_megatron_version(parser)
    parser.add_argument("--fix", action="append", default=[], metavar="KNOB=N", help="e.g. tp=8, zero=1")
    parser.add_argument("--max", action="append", default=[], metavar="KNOB=N", help="e.g. tp=8")
    parser.add_argument("--forbid", action="append", default=[], metavar="KNOB=V", help="e.g. recompute=full")
    parser.add_argument(
        "--memory-fraction", type=fraction, metavar="F", help="part of each device's memory a plan may use"
    )
    parser.add_argument("--time-limit", type=seconds, metavar="S", help="stop after S seconds with what was found")


def run(args: argparse.Namespace) -> int:
    """Tune, or check."""
    from uniap_tune.deadline import Deadline
    from uniap_tune.errors import InfeasibleError
    from uniap_tune.tuning import tune

    recipe, request = _inputs(args)
    if args.check and args.output is not None:
        return _check_against_file(args, recipe, request)
    try:
        tuning = tune(recipe, request, deadline=Deadline.after(args.time_limit), version=args.megatron_version)
    except InfeasibleError as error:
        if args.json:
            print_infeasible(error)
        raise
    if args.check:
        return _report_drift(args, recipe, tuning.changes, [])
    files, difference = _files(tuning)
    if args.output is not None:
        _write(args, files)
    if args.json:
        print_json(_document(tuning, difference, _notes(tuning, args.megatron_version)))
    else:
        _print_tuning(tuning, difference, _notes(tuning, args.megatron_version))
        if args.output is not None:
            sys.stderr.write(f"written to {args.output}: {', '.join(files)}\n")
    return 0


def _inputs(args: argparse.Namespace) -> tuple[Recipe, Request]:
    from uniap_tune.adapters.cluster import read_cluster
    from uniap_tune.adapters.recipes import ReadOptions, read_recipe
    from uniap_tune.planner import Request
    from uniap_tune.space import parse_knobs

    given = set_values(args.set, example="NNODES=8")
    options = ReadOptions(given=given, overrides=args.override, execute=args.execute)
    recipe = read_recipe(args.recipe, options)
    request = Request(
        model=recipe.model,
        cluster=read_cluster(args.cluster),
        job=recipe.job,
        knobs=parse_knobs(args.fix, args.max, args.forbid),
        memory_fraction=args.memory_fraction,
    )
    return recipe, request


# -- checking ---------------------------------------------------------------------------------------------------------


def _check_against_file(args: argparse.Namespace, recipe: Recipe, request: Request) -> int:
    """Compares with DIR/plan.json: no search."""
    from uniap_tune.errors import InputError
    from uniap_tune.plan import plan_from_dict
    from uniap_tune.tuning import changes_for, tuning_request

    path = args.output / "plan.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read", why=str(error)[:200], fix="tune the recipe with -o first") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: not a plan", fix="tune the recipe with -o first")
    plan = plan_from_dict(data, str(path))
    expected = tuning_request(request, recipe).describe()
    stale = [
        f"{part}.{key} is {now.get(key)!r}, the plan was made for {then.get(key)!r}"
        for part in ("model", "job")
        for now, then in [(expected[part], dict(plan.inputs.get(part, {})))]
        for key in now
        if key != "name" and now[key] != then.get(key)
    ]
    if expected["cluster"] != plan.inputs.get("cluster"):
        stale.append(f"the cluster is {request.cluster.name}, not that of the plan")
    if stale:
        return _report_drift(args, recipe, None, stale)
    return _report_drift(args, recipe, changes_for(recipe, plan, request.cluster, args.megatron_version), [])


def _report_drift(args: argparse.Namespace, recipe: Recipe, changes: Changes | None, stale: list[str]) -> int:
    from uniap_tune.errors import ExitCode

    lines = [*stale, *(_change_lines(recipe, changes) if changes is not None else [])]
    if args.json:
        print_json({"schema_version": 1, "status": "drift" if lines else "ok", "drift": lines})
    else:
        sys.stdout.write("\n".join(lines or [f"{recipe.name}: as planned"]) + "\n")
    return int(ExitCode.DRIFT if lines else ExitCode.OK)


def _change_lines(recipe: Recipe, changes: Changes) -> list[str]:
    lines = []
    for name, value in changes.values.items():
        today = recipe.arguments.get(name)
        shown = "" if value is True else f" {value}"
        where = f" (now {today.value}, {today.where})" if today is not None else ""
        lines.append(f"--{name}{shown}{where}")
    for name in sorted(changes.removed):
        lines.append(f"without --{name} ({recipe.arguments[name].where})")
    for name, setting in changes.environment.items():
        lines.append(f"unset {name}" if setting is None else f"{name}={setting}")
    return lines


# -- writing ----------------------------------------------------------------------------------------------------------


def _files(tuning: Tuning) -> tuple[dict[str, str], str]:
    """The files of the answer, and the difference to the recipe."""
    from uniap_tune import __version__

    source, planning = tuning.recipe.source, tuning.planning
    before = source.originals()
    if planning is None:
        return dict(before), ""
    header = f"{__version__}, inputs {planning.plan.inputs['hash']}"
    after = source.rewritten(tuning.changes, tuning.request.cluster, header)
    difference = "".join(
        "".join(
            difflib.unified_diff(
                before.get(name, "").splitlines(keepends=True),
                text.splitlines(keepends=True),
                f"a/{name}" if name in before else "/dev/null",
                f"b/{name}",
            )
        )
        for name, text in after.items()
    )
    _verify(tuning, after)
    return {**after, "plan.json": planning.plan.to_json()}, difference


def _verify(tuning: Tuning, files: dict[str, str]) -> None:
    """The written recipe, read again, must say the plan: nothing is handed out that does not."""
    from uniap_tune.errors import InputError
    from uniap_tune.recipe import unsaid

    again = tuning.recipe.source.reread(files)
    left = unsaid(tuning.recipe, again, tuning.changes)
    if left:
        raise InputError(
            f"{tuning.recipe.name}: the plan cannot be written into it",
            why="; ".join(left[:5]),
            fix="write these arguments out in the recipe, or tune a plainer one",
        )


def _write(args: argparse.Namespace, files: dict[str, str]) -> None:
    from uniap_tune.files import write_files

    executable = [name for name in files if files[name].startswith("#!")]
    write_files(args.output, files, force=args.force, executable=executable)


# -- showing ----------------------------------------------------------------------------------------------------------


def _print_tuning(tuning: Tuning, difference: str, notes: list[str]) -> None:
    if difference:
        sys.stdout.write(difference if difference.endswith("\n") else difference + "\n")
        sys.stdout.write("\n")
    lines = [_today_line(tuning)]
    if tuning.tuned is not None and tuning.planning is not None:
        from uniap_tune.explain.summary import grid

        lines.append(f"tuned: {_takes(tuning.tuned)}; {grid(tuning.planning.plan)}")
        speedup = tuning.speedup
        if speedup is not None:
            lines.append(f"gain: {speedup:.2f} times as many steps (predicted, nothing was measured)")
    else:
        lines.append("nothing better was found: the recipe stays as it is")
    lines += [f"note: {note}" for note in notes]
    sys.stdout.write("\n".join(lines) + "\n")


def _notes(tuning: Tuning, version: str) -> list[str]:
    """What was assumed, for which other cluster the recipe was written, and what Megatron-LM does not know of it."""
    from uniap_tune.tuning import unknown_arguments

    notes = list(tuning.recipe.notes_on(tuning.request.cluster))
    unknown = unknown_arguments(tuning.recipe, version)
    if unknown:
        notes.append(f"Megatron-LM {version} does not know {', '.join(unknown)}: kept as they are")
    return notes


def _today_line(tuning: Tuning) -> str:
    from uniap_tune.units import format_bytes

    problems = [str(violation) for violation in tuning.broken]
    today = tuning.today
    if today is None:
        return "today: does not run: " + "; ".join(problems)
    if not today.fits:
        stage = today.worst_stage
        problems.insert(0, f"does not fit, stage {stage} short by {format_bytes(-today.room_bytes[stage])}")
    takes = _takes(today)
    return f"today: {takes}" if not problems else f"today: {'; '.join(problems)} ({takes})"


def _takes(configuration: Configuration) -> str:
    from uniap_tune.units import format_bytes, format_seconds

    prediction = configuration.prediction
    held = max(prediction.memory_bytes_per_stage) + prediction.overhead_bytes
    return f"{format_seconds(prediction.step_time_s)} a step, {format_bytes(held)} on the fullest device"


def _document(tuning: Tuning, difference: str, notes: list[str]) -> dict[str, Any]:
    recipe, changes = tuning.recipe, tuning.changes
    return {
        "schema_version": 1,
        "status": "kept" if tuning.is_kept else "tuned",
        "recipe": recipe.name,
        "format": recipe.source.format,
        "today": _configuration_dict(tuning.today) | {"broken_rules": [str(v) for v in tuning.broken]},
        "tuned": _configuration_dict(tuning.tuned) if tuning.tuned is not None else None,
        "speedup": tuning.speedup,
        "changes": {
            "set": dict(changes.values),
            "removed": sorted(changes.removed),
            "environment": dict(changes.environment),
        },
        "diff": difference,
        "plan": tuning.planning.plan.to_dict() if tuning.planning is not None else None,
        "notes": notes,
    }


def _configuration_dict(configuration: Configuration | None) -> dict[str, Any]:
    if configuration is None:
        return {"runs": False}
    prediction = asdict(configuration.prediction)
    keys = ("step_time_s", "steady_memory_bytes", "peak_memory_bytes", "overhead_bytes", "memory_bytes_per_stage")
    return {
        "runs": True,
        "fits": configuration.fits,
        "worst_stage": configuration.worst_stage,
        "room_bytes": list(configuration.room_bytes),
        **{key: prediction[key] for key in keys},
    }
