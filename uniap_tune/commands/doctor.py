"""Look at a configuration somebody runs: does it fit, where do time and memory go, what would help most."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from uniap_tune.commands.inputs import (
    add_precision_arguments,
    add_recipe_reading,
    fraction,
    has_flash_attention,
    positive_int,
    precision_from,
    set_values,
)
from uniap_tune.commands.outputs import print_json

if TYPE_CHECKING:
    from uniap_tune.doctor.reading import Given

NAME = "doctor"
HELP = "say whether a configuration fits, what it loses, and which change helps"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "recipe",
        nargs="?",
        metavar="RECIPE",
        help="a recipe as for tune, a DeepSpeed JSON, or a plan.json; without it the settings are given by --set",
    )
    parser.add_argument(
        "--cluster",
        help="NODESxDEVICES:DEVICE such as 8x8:h100, a shipped cluster, or a YAML/TOML file (a plan.json has its own)",
    )
    parser.add_argument(
        "--model", help="of settings and a DeepSpeed JSON: a config.json, its folder, or a shipped name"
    )
    parser.add_argument(
        "--global-batch", type=positive_int, metavar="N", help="samples of a step, where RECIPE is silent"
    )
    parser.add_argument(
        "--seq-length", type=positive_int, metavar="N", help="tokens of a sample, where RECIPE is silent"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a parallel setting (tp=2, zero=1, mbs=1, recompute=full), or a variable of the script",
    )
    parser.add_argument(
        "--target", choices=("megatron", "deepspeed"), default="megatron", help="who runs settings (default megatron)"
    )
    add_precision_arguments(parser)
    add_recipe_reading(parser)
    parser.add_argument(
        "--memory-fraction", type=fraction, metavar="F", help="part of each device's memory it may use (default 1)"
    )
    parser.add_argument("--top", type=positive_int, default=3, metavar="K", help="how many changes to show (default 3)")
    parser.add_argument("--json", action="store_true", help="the answer as JSON on stdout")


def run(args: argparse.Namespace) -> int:
    """Diagnose and print; exit code 4 where it does not fit, 2 where the engine refuses it."""
    from uniap_tune.doctor.diagnosis import diagnose
    from uniap_tune.doctor.document import document
    from uniap_tune.doctor.reading import read_setup
    from uniap_tune.errors import ExitCode

    setup = read_setup(args.recipe, _given(args))
    diagnosis = diagnose(setup, memory_fraction=args.memory_fraction, shown=args.top)
    if args.json:
        print_json(document(diagnosis))
    else:
        from uniap_tune.report.doctor import print_diagnosis

        print_diagnosis(diagnosis)
    if diagnosis.fits is None:
        return int(ExitCode.BAD_INPUT)
    return int(ExitCode.OK if diagnosis.fits else ExitCode.OUT_OF_MEMORY)


def _given(args: argparse.Namespace) -> Given:
    from uniap_tune.adapters.cluster import read_cluster
    from uniap_tune.adapters.registry import read_model
    from uniap_tune.doctor.reading import Given
    from uniap_tune.spec import OptimizerName, Precision
    from uniap_tune.strategy import Target

    cluster = read_cluster(args.cluster) if args.cluster else None
    return Given(
        cluster=cluster,
        model=read_model(args.model) if args.model else None,
        global_batch=args.global_batch,
        seq_length=args.seq_length,
        precision=precision_from(args, cluster) if cluster is not None else Precision(),
        optimizer=OptimizerName(args.optimizer),
        flash_attention=cluster is None or has_flash_attention(args, cluster),
        target=Target(args.target),
        pairs=set_values(args.set, example="tp=8"),
        overrides=args.override,
        execute=args.execute,
    )
