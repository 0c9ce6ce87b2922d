"""Arguments that several commands share, and how they become a request."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from uniap_tune.planner import Request
    from uniap_tune.spec import Cluster, Precision

_LARGEST_COUNT = 10**12
_HIGHEST_PRICE = 1e9  # of a device-hour, in whatever currency
_TARGETS = ("megatron", "deepspeed", "any")
_PRECISIONS = ("bf16", "fp16", "fp32", "fp8", "mxfp8", "nvfp4")
_MODEL = "a config.json, its folder, or the name of a shipped model"


def add_job_arguments(parser: argparse.ArgumentParser, *, required: bool = True, model: str = _MODEL) -> None:
    """The model, the cluster and the job."""
    parser.add_argument("model", metavar="MODEL", help=model)
    parser.add_argument(
        "--cluster",
        required=required,
        help="NODESxDEVICES:DEVICE such as 8x8:h100, a shipped cluster, or a YAML/TOML file",
    )
    parser.add_argument("--global-batch", type=positive_int, required=required, metavar="N", help="samples of a step")
    parser.add_argument("--seq-length", type=positive_int, required=required, metavar="N", help="tokens of a sample")
    parser.add_argument("--target", choices=_TARGETS, default="megatron", help="engine to plan for (default megatron)")
    add_precision_arguments(parser)
    parser.add_argument(
        "--memory-fraction", type=fraction, metavar="F", help="part of each device's memory a plan may use"
    )
    parser.add_argument(
        "--fix", action="append", default=[], metavar="KNOB=N", help="e.g. tp=8, zero=1, recompute=full"
    )
    parser.add_argument("--max", action="append", default=[], metavar="KNOB=N", help="e.g. tp=8")
    parser.add_argument("--forbid", action="append", default=[], metavar="KNOB=V", help="e.g. recompute=full")


def add_megatron_version(parser: argparse.ArgumentParser) -> None:
    """Which Megatron-LM the launch files are for."""
    from uniap_tune.megatron.versions import DEFAULT_VERSION, VERSIONS

    parser.add_argument(
        "--megatron-version",
        choices=VERSIONS,
        default=DEFAULT_VERSION,
        help=f"Megatron-LM to write arguments for (default {DEFAULT_VERSION})",
    )


def add_recipe_reading(parser: argparse.ArgumentParser) -> None:
    """How a recipe is read."""
    parser.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="KEY=VALUE|FILE",
        help="overrides of a Megatron-Bridge recipe",
    )
    parser.add_argument("--execute", action="store_true", help="run the script, with a stand-in for its launcher")


def add_precision_arguments(parser: argparse.ArgumentParser) -> None:
    """Number formats, the optimizer and the kind of attention."""
    parser.add_argument("--precision", choices=_PRECISIONS, help="default: bf16 where the device has it, else fp16")
    parser.add_argument("--optimizer", choices=("adam", "sgd"), default="adam")
    parser.add_argument(
        "--gradient-bytes", type=int, choices=(2, 4), help="bytes of a gradient (default: the engine's)"
    )
    parser.add_argument("--no-master-weights", action="store_true", help="no fp32 copy of the parameters")
    parser.add_argument("--no-flash-attention", action="store_true", help="attention materializes its scores")


def request_from(args: argparse.Namespace) -> Request:
    """The request that the arguments of :func:`add_job_arguments` describe."""
    from uniap_tune.adapters.cluster import read_cluster
    from uniap_tune.adapters.registry import read_model
    from uniap_tune.planner import Request
    from uniap_tune.space import parse_knobs
    from uniap_tune.spec import Job, OptimizerName
    from uniap_tune.strategy import Target

    model = read_model(args.model)
    cluster = read_cluster(args.cluster)
    job = Job(
        global_batch=args.global_batch,
        seq_length=args.seq_length,
        precision=precision_from(args, cluster),
        optimizer=OptimizerName(args.optimizer),
        flash_attention=has_flash_attention(args, cluster),
    )
    return Request(
        model=model,
        cluster=cluster,
        job=job,
        target=Target(args.target),
        knobs=parse_knobs(args.fix, args.max, args.forbid),
        memory_fraction=args.memory_fraction,
    )


def precision_from(args: argparse.Namespace, cluster: Cluster) -> Precision:
    """The number formats that the options of :func:`add_precision_arguments` ask for on a cluster."""
    from uniap_tune.spec import DType, Precision

    peaks = cluster.device.peak_flops
    fallback = next((d for d in (DType.BF16, DType.FP16, DType.FP32) if d in peaks), DType.FP32)
    return Precision(
        compute=DType(args.precision) if args.precision else fallback,
        master_weights=not args.no_master_weights,
        gradient_bytes=args.gradient_bytes,
    )


def has_flash_attention(args: argparse.Namespace, cluster: Cluster) -> bool:
    """Whether attention is fused: the device can, and it is not switched off."""
    from uniap_tune.hardware import has_fused_attention

    return not args.no_flash_attention and has_fused_attention(cluster.device)


def set_values(texts: Sequence[str], *, example: str) -> dict[str, str]:
    """The values of ``--set NAME=VALUE`` by name.

    Raises:
        InputError: one has another form; ``example`` shows the form.
    """
    from uniap_tune.errors import InputError

    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not (name.isidentifier() or name.isdecimal()):
            raise InputError(f"--set {name}: not of the form NAME=VALUE", fix=f"e.g. --set {example}")
        found[name] = value
    return found


def positive_int(text: str) -> int:
    """An argparse type: a whole number above zero."""
    number = text if text.isascii() and text.isdecimal() else "0"
    if len(number.lstrip("0")) > len(str(_LARGEST_COUNT)) or int(number) > _LARGEST_COUNT:
        raise argparse.ArgumentTypeError(f"{text!r} is more than {_LARGEST_COUNT:,}")
    if int(number) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above zero")
    return int(number)


def fraction(text: str) -> float:
    """An argparse type: a number above 0 and at most 1."""
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0 and at most 1")
    return value


def seconds(text: str) -> float:
    """An argparse type: a time above zero."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above zero")
    return value


def price(text: str) -> float:
    """An argparse type: an amount of money above zero."""
    value = _number(text)
    if not 0 < value <= _HIGHEST_PRICE:
        raise argparse.ArgumentTypeError(f"{text!r} is not a price above zero, at most {_HIGHEST_PRICE:,.0f}")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
