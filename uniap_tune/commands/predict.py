"""``uniap-tune predict``: step time and memory of given configurations."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from uniap_tune.adapters.records import Evaluated

NAME = "predict"
HELP = "time and memory of given configurations (JSON lines)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("records", type=Path, nargs="+", metavar="RECORDS.jsonl", help="one JSON object a line")
    parser.add_argument("--json", action="store_true", help="one JSON object a record on stdout")


def run(args: argparse.Namespace) -> int:
    """Predicts every record; records that cannot be are reported with the reason."""
    from uniap_tune.adapters.records import evaluate_file

    for path in args.records:
        for evaluated in evaluate_file(path):
            text = json.dumps(evaluated.as_dict()) if args.json else _for_people(evaluated)
            sys.stdout.write(text + "\n")
    return 0


def _for_people(evaluated: Evaluated) -> str:
    from uniap_tune.units import format_bytes, format_seconds

    name = evaluated.id or f"line {evaluated.line}"
    prediction = evaluated.prediction
    if prediction is None:
        return f"{name}: skipped: {evaluated.reason}"
    seconds = format_seconds(prediction.step_time_s)
    band = f"{format_seconds(prediction.step_time_low_s)} to {format_seconds(prediction.step_time_high_s)}"
    peak = format_bytes(prediction.peak_memory_bytes)
    return f"{name}: {seconds} a step ({band}), peak {peak}, {'fits' if prediction.fits else 'does not fit'}"
