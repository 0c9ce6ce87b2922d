"""Predictions against measured runs. The figures only keep what was reached; docs/explanation/accuracy.md has them all.

The records are read from ``$UNIAP_MEASURED`` or from beside the checkout, and the tests are skipped without them.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from uniap_tune.cli import main

ROOT = Path(__file__).parent.parent
FOLDER = Path(os.environ.get("UNIAP_MEASURED") or ROOT.parent / "shared" / "data" / "measured")


@cache
def _text(name: str) -> str:
    path = FOLDER / name
    if not path.is_file():
        pytest.skip(f"{name} is not in $UNIAP_MEASURED nor beside the checkout")
    return str(path)


def summary(name: str, group: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """One row of ``accuracy --json``."""
    assert main(["accuracy", _text(name), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["summary"]
    found: dict[str, Any] = next(row for row in rows if row["group"] == group)
    return found


def test_step_times_of_gpt_models_on_a_node(capsys: pytest.CaptureFixture[str]) -> None:
    row = summary("throughput_vtrain_a100.jsonl", "a100-80gb-sxm dense complete", capsys)
    assert row["step_time"]["count"] >= 700
    assert row["step_time"]["median_error"] < 0.035
    assert row["step_time"]["mean_error"] < 0.055


def test_published_step_times(capsys: pytest.CaptureFixture[str]) -> None:
    row = summary("throughput_published.jsonl", "gb300 dense complete", capsys)
    assert row["step_time"]["median_error"] < 0.05


def test_memory_of_megatron_jobs(capsys: pytest.CaptureFixture[str]) -> None:
    row = summary("memory_megatron_ci.jsonl", "a100-80gb-sxm dense complete", capsys)
    assert row["steady_memory"]["median_error"] < 0.003
    assert row["peak_memory"]["median_error"] < 0.005
    assert row["called_unfit"] == 0
