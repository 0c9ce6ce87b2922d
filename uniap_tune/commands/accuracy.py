"""``uniap-tune accuracy``: predictions against measurements."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from uniap_tune.accuracy import Case
    from uniap_tune.adapters.records import Evaluated

NAME = "accuracy"
HELP = "predictions against measurements (JSON lines)"
SCHEMA_VERSION = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("records", type=Path, nargs="+", metavar="RECORDS.jsonl", help="one JSON object a line")
    parser.add_argument("--json", action="store_true", help="the records and the summary as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Scores every record that says what was measured."""
    from uniap_tune.adapters.records import evaluate_file

    evaluated = {path.name: list(evaluate_file(path)) for path in args.records}
    summary = _summary(evaluated)
    if args.json:
        records = [{"file": name, **one.as_dict()} for name, found in evaluated.items() for one in found]
        document = {"schema_version": SCHEMA_VERSION, "records": records, "summary": summary}
        sys.stdout.write(json.dumps(document) + "\n")
    else:
        sys.stdout.write(_table(summary))
    return 0


def _summary(evaluated: dict[str, list[Evaluated]]) -> list[dict[str, object]]:
    """Scores by file, and within a file by GPU and by family, complete records apart from those with assumptions."""
    from uniap_tune.accuracy import Case, summarize

    rows: list[dict[str, object]] = []
    for name, found in evaluated.items():
        cases = [
            Case(file=name, run=one.run, measured=one.measured, prediction=one.prediction)
            for one in found
            if one.run is not None and one.measured is not None and one.prediction is not None
        ]
        skipped = Counter(one.reason for one in found if one.prediction is None)
        rows.append(
            {"file": name, "group": "all", "records_in_file": len(found), "skipped": dict(skipped), **summarize(cases)}
        )
        for label, chosen in _groups(cases):
            rows.append({"file": name, "group": label, **summarize(chosen)})
    return rows


def _groups(cases: Sequence[Case]) -> list[tuple[str, list[Case]]]:
    keys: tuple[Callable[[Case], str], ...] = (_kind, lambda case: f"family {case.run.model.family}")
    groups = []
    for key in keys:
        labels = sorted({key(case) for case in cases})
        groups += [(label, [case for case in cases if key(case) == label]) for label in labels]
    return groups


def _kind(case: Case) -> str:
    """GPU, dense or experts, complete or with assumptions that can change the answer."""
    model = "experts" if case.run.model.moe is not None else "dense"
    return f"{case.run.cluster.device.name} {model} {'complete' if case.run.exact else 'with assumptions'}"


def _table(summary: Sequence[dict[str, object]]) -> str:
    """For people: median, mean and 90th percentile of the absolute error, in percent."""
    lines = [f"{'':46} {'count':>5}  {'median':>7} {'mean':>7} {'p90':>7}\n"]
    for row in summary:
        title = str(row["file"]) if row["group"] == "all" else f"  {row['group']}"
        lines.append(f"{title}\n")
        for part in ("step_time", "steady_memory", "peak_memory"):
            score = row.get(part)
            if isinstance(score, dict):
                errors = " ".join(f"{100 * score[key]:6.1f}%" for key in ("median_error", "mean_error", "p90_error"))
                lines.append(f"    {part.replace('_', ' '):42} {score['count']:5}  {errors}\n")
        order = row.get("ranking")
        if isinstance(order, dict) and order["kendall_tau"] is not None and row["group"] == "all":
            tau, regret = order["kendall_tau"], 100 * order["mean_regret"]
            lines.append(f"    ranking: Kendall's tau {tau:.2f}, first choice {regret:.1f}% from the best on average\n")
        skipped = row.get("skipped")
        if isinstance(skipped, dict):
            lines.extend(f"    skipped {count}: {reason}\n" for reason, count in skipped.items())
    return "".join(lines)
