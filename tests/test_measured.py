"""Predictions against measured runs. The figures only keep what was reached; docs/explanation/accuracy.md has them all.

The records are read from ``$UNIAP_MEASURED`` or from beside the checkout, and the tests are skipped without them.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest

from tests.records import MEASURED, NOT_MEASURED
from uniap_tune.cli import main


@cache
def _text(name: str) -> str:
    path = MEASURED / name
    if not path.is_file():
        pytest.skip(f"{name}: {NOT_MEASURED}")
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
    assert row["steady_memory"]["median_error"] < 0.001
    assert row["steady_memory"]["p95_error"] < 0.01
    assert row["peak_memory"]["median_error"] < 0.003
    assert row["called_unfit"] == 0


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_memory_of_encoders(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    row = summary("memory_megatron_ci.jsonl", f"family {family}", capsys)
    assert row["steady_memory"]["median_error"] < 0.025
    assert row["peak_memory"]["median_error"] < 0.03


@pytest.mark.parametrize(
    ("name", "group", "median", "worst"),
    [
        ("memory_megatron_ci.jsonl", "a100-80gb-sxm experts complete", 0.02, 0.04),
        ("throughput_peers.jsonl", "b200 experts complete", 0.01, 0.015),
        ("throughput_peers.jsonl", "b200 dense complete", 0.006, 0.02),
        ("throughput_peers.jsonl", "l4 dense complete", 0.01, 0.04),
        ("throughput_peers.jsonl", "l4 dense with assumptions", 0.035, 0.12),
    ],
)
def test_peaks(name: str, group: str, median: float, worst: float, capsys: pytest.CaptureFixture[str]) -> None:
    errors = summary(name, group, capsys)["peak_memory"]
    assert errors["median_error"] < median
    assert errors["worst_error"] < worst


@pytest.mark.parametrize(
    "name",
    ["memory_megatron_ci", "throughput_peers", "throughput_published", "throughput_vtrain_a100"],
)
def test_what_ran_is_said_to_fit(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Dense models and mixtures of experts alike."""
    assert summary(f"{name}.jsonl", "all", capsys)["called_unfit"] == 0
