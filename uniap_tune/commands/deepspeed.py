"""DeepSpeed's launcher with --autotune uniap, and the hook that gives it to the deepspeed command itself."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uniap_tune.commands.inputs import positive_int

if TYPE_CHECKING:
    from uniap_tune.deepspeed.check import Case

NAME = "deepspeed"
HELP = "deepspeed's launcher with --autotune uniap; enable, disable, status, check"

_DESCRIPTION = """uniap-tune deepspeed ARGUMENTS runs DeepSpeed's launcher, which then knows --autotune uniap:
plan for `deepspeed ARGUMENTS`, and with --autotuning run train. The other commands:"""
_OWN = ("enable", "disable", "status", "check")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments are DeepSpeed's own; see :func:`pass_through`."""
    parser.add_argument("arguments", nargs=argparse.REMAINDER)


def pass_through(arguments: Sequence[str]) -> int:
    """Run with all words after ``deepspeed``, unparsed: they are the launcher's unless one of ours comes first."""
    if arguments and arguments[0] in _OWN:
        args = _parser().parse_args(list(arguments))
        return int(args.run(args))
    if not arguments:
        _parser().print_help()
        return 2
    if arguments[0] in ("-h", "--help"):
        _parser().print_help()
        if find_spec("deepspeed") is None:
            return 0
        sys.stdout.write("\nDeepSpeed's own help, with the options added to it:\n\n")
        sys.stdout.flush()
    return _launch(list(arguments))


def run(args: argparse.Namespace) -> int:
    """As :func:`pass_through`."""
    return pass_through(args.arguments)


def _launch(arguments: list[str]) -> int:
    from uniap_tune.errors import InputError

    if find_spec("deepspeed") is None:
        raise InputError("DeepSpeed is not installed", fix="pip install 'uniap-tune[deepspeed]'")
    from uniap_tune.deepspeed.hook import install

    install()
    from deepspeed.launcher import runner

    sys.argv = ["deepspeed", *arguments]  # the launcher names itself by it
    runner.main(arguments)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="uniap-tune deepspeed", description=_DESCRIPTION, allow_abbrev=False)
    commands = parser.add_subparsers(metavar="COMMAND")
    for name, text, function in (
        ("enable", "let `deepspeed --autotune uniap` work by itself in this environment", _enable),
        ("disable", "take that back", _disable),
        ("status", "whether it is enabled, and where", _status),
    ):
        commands.add_parser(name, help=text, description=text, allow_abbrev=False).set_defaults(run=function)
    text = "try a DeepSpeed JSON on DeepSpeed itself, for any number of devices, without them"
    check = commands.add_parser("check", help=text, description=text, allow_abbrev=False)
    check.add_argument("config", type=Path, metavar="DS_CONFIG.json")
    check.add_argument("--world-size", type=positive_int, required=True, metavar="N", help="devices")
    check.add_argument(
        "--pp",
        type=positive_int,
        metavar="N",
        help="pipeline stages (default: those of a pipeline_split.json beside the configuration)",
    )
    check.add_argument("--layers", type=positive_int, metavar="N", help="layers of the stand-in model")
    check.add_argument("--json", action="store_true", help="the verdict as JSON on stdout")
    check.set_defaults(run=_check)
    return parser


def _enable(_args: argparse.Namespace) -> int:
    from uniap_tune.deepspeed.activation import enable

    path = enable()
    sys.stdout.write(f"enabled by {path}\n`deepspeed --autotune uniap …` works now; `disable` takes it back\n")
    return 0


def _disable(_args: argparse.Namespace) -> int:
    from uniap_tune.deepspeed.activation import disable

    gone = disable()
    sys.stdout.write("".join(f"removed {path}\n" for path in gone) or "it was not enabled\n")
    return 0


def _status(_args: argparse.Namespace) -> int:
    from uniap_tune.deepspeed.activation import status

    places = [place for place in status() if place.enabled]
    for place in places:
        note = "" if place.current else " (written by another version; `enable` renews it)"
        sys.stdout.write(f"enabled by {place.path}{note}\n")
    if not places:
        sys.stdout.write("not enabled; `uniap-tune deepspeed enable` does it\n")
    return 0


def _check(args: argparse.Namespace) -> int:
    from uniap_tune.deepspeed.check import check_cases
    from uniap_tune.errors import ExitCode

    verdict = check_cases([_case(args)])[0]
    if args.json:
        status = "refused" if verdict.refused else "accepted" if verdict.roles else "not tried"
        document: dict[str, Any] = {"schema_version": 1, "status": status, "reason": verdict.reason}
        sys.stdout.write(
            json.dumps({**document, "roles": verdict.roles, "deepspeed": verdict.version}, indent=2) + "\n"
        )
    else:
        sys.stdout.write(f"{args.config} on {args.world_size} devices: {verdict.sentence}\n")
    return int(ExitCode.BAD_INPUT if verdict.refused else ExitCode.OK)


def _case(args: argparse.Namespace) -> Case:
    """What to try; the pipeline comes from ``--pp``, a split beside the file, or its ``pipeline.stages``."""
    from uniap_tune.adapters.deepspeed import read_config, section, whole
    from uniap_tune.deepspeed.check import Case
    from uniap_tune.deepspeed.pipeline import read_split
    from uniap_tune.errors import InputError

    config = read_config(args.config)
    beside = args.config.parent / "pipeline_split.json"
    if args.pp is None and args.layers is None and beside.exists():
        parts = read_split(beside).parts
        return Case(config=config, world_size=args.world_size, layers=parts[-1], parts=parts)
    where = str(args.config)
    stages = args.pp or whole(section(config, "pipeline", where), "stages", where) or 0
    layers = args.layers or max(2 * stages, 4)
    if stages > layers:
        raise InputError(f"--pp {stages}: the model has {layers} layers", fix="use fewer stages")
    parts = tuple(layers * stage // stages for stage in range(stages + 1)) if stages else ()
    return Case(config=config, world_size=args.world_size, layers=layers, parts=parts)
