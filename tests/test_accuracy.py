"""Scores: known values, and the accuracy the documentation promises."""

import argparse
import json
from dataclasses import replace

import pytest

from tests.records import MEASURED, NOT_MEASURED, record
from uniap_tune.accuracy import (
    Case,
    Measured,
    collapse,
    memory_error,
    peak_errors,
    ranking,
    steady_errors,
    summarize,
    time_errors,
)
from uniap_tune.adapters.records import evaluate_file, read_run
from uniap_tune.commands import accuracy as accuracy_command
from uniap_tune.commands import predict as predict_command
from uniap_tune.predict import predict
from uniap_tune.units import GIB, MIB

RUN = read_run(record())
PREDICTION = predict(RUN)


def case(predicted: float, measured: float | None, name: str = "a", **changes: object) -> Case:
    prediction = replace(
        PREDICTION, step_time_s=predicted, step_time_low_s=0.9 * predicted, step_time_high_s=1.1 * predicted
    )
    run = replace(RUN, id=name, **changes)  # type: ignore[arg-type]
    return Case(file="f", run=run, measured=Measured(step_time_s=measured), prediction=prediction)


def test_errors_are_fractions_of_the_measured():
    errors = time_errors([case(1.1, 1.0), case(0.8, 1.0, "b"), case(2.0, 2.0), case(1.0, None)])
    assert errors is not None
    assert errors.count == 3
    assert errors.median == pytest.approx(0.1)
    assert errors.mean == pytest.approx(0.1)
    assert (errors.worst, errors.worst_id) == (pytest.approx(0.2), "b")
    assert errors.in_band == pytest.approx(2 / 3)
    assert time_errors([case(1.0, None)]) is None


def test_small_memories_have_an_absolute_floor():
    assert memory_error(1.1 * GIB, GIB) == pytest.approx(0.1)
    assert memory_error(600 * MIB, 560 * MIB) == 0
    assert memory_error(400 * MIB, 500 * MIB) == pytest.approx(-36 / 500)


def test_stages_are_scored_one_by_one():
    prediction = replace(PREDICTION, memory_bytes_per_stage=(2.0 * GIB, 3.0 * GIB))
    measured = Measured(peak_bytes_per_stage=(2.0 * GIB, 2.5 * GIB))
    errors = peak_errors([Case(file="f", run=RUN, measured=measured, prediction=prediction)])
    assert errors is not None
    assert (errors.count, errors.worst) == (2, pytest.approx(0.2))


def test_repeats_count_once_at_their_median():
    cases = [case(1.0, seconds, name) for seconds, name in ((1.0, "a"), (5.0, "b"), (1.2, "c"))]
    (one,) = collapse(cases)
    assert one.measured.step_time_s == 1.2
    assert len(collapse([*cases, case(1.0, 1.0, "d", micro_batch=8)])) == 2


def test_ranking_leaves_out_pairs_that_measure_the_same():
    cases = [case(1.0, 1.00, pp=1), case(2.0, 1.02, "b", pp=2), case(3.0, 2.0, "c", pp=3)]
    found = ranking(cases)
    assert found is not None
    assert found.kendall_tau == 1.0
    assert found.mean_regret == 0.0
    wrong = ranking([case(1.0, 3.0), case(2.0, 2.0, "b", pp=2)])
    assert wrong is not None
    assert wrong.kendall_tau == -1.0
    assert wrong.worst_regret == pytest.approx(0.5)


def test_a_summary_has_only_what_was_measured():
    found = summarize([case(1.0, 1.0)])
    assert "step_time" in found
    assert "peak_memory" not in found


def write(path, *records):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in records), encoding="utf-8")
    return str(path)


def call(command, *arguments):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(list(arguments)))


def test_predict_prints_a_line_a_record(tmp_path, capsys):
    path = write(tmp_path / "r.jsonl", record(), record(id="b", task="lora"))
    assert call(predict_command, path, "--json") == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    keys = {"line", "id", "step_time_s", "steady_memory_bytes", "peak_memory_bytes", "overhead_bytes",
            "memory_bytes_per_stage", "fits", "assumptions"}  # fmt: skip
    assert keys <= set(first)
    assert second == {"line": 1, "id": "b", "skipped": "lora trains adapters, not the model"}
    assert call(predict_command, path) == 0
    assert "a step" in capsys.readouterr().out


def test_accuracy_adds_a_summary(tmp_path, capsys):
    path = write(tmp_path / "r.jsonl", record(), record(id="b", task="lora"))
    assert call(accuracy_command, path, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    everything = document["summary"][0]
    assert (everything["file"], everything["records_in_file"]) == ("r.jsonl", 2)
    assert everything["skipped"] == {"lora trains adapters, not the model": 1}
    assert everything["step_time"]["count"] == 1
    assert len(document["records"]) == 2
    assert call(accuracy_command, path) == 0
    assert "h100-sxm dense complete" in capsys.readouterr().out


@pytest.fixture(scope="module")
def measured_cases() -> list[Case]:
    if not MEASURED.is_dir():
        pytest.skip(NOT_MEASURED)
    return collapse(
        Case(file=path.name, run=one.run, measured=one.measured, prediction=one.prediction)
        for path in sorted(MEASURED.glob("*.jsonl"))
        for one in evaluate_file(path)
        if one.run is not None and one.measured is not None and one.prediction is not None
    )


def chosen(cases, generation, *files, exact=True):
    return [
        case
        for case in cases
        if case.run.cluster.device.generation == generation
        and case.run.model.moe is None
        and case.run.exact == exact
        and case.file in files
    ]


# What docs/explanation/accuracy.md promises, in the sample, with a little room.
PROMISED = [
    ("ampere", "throughput_vtrain_a100.jsonl", 0.022, 0.045),
    ("ampere", "throughput_published.jsonl", 0.025, 0.035),
    ("ampere", "throughput_peers.jsonl", 0.045, 0.045),
    ("hopper", "throughput_published.jsonl", 0.045, 0.046),
    ("blackwell", "throughput_published.jsonl", 0.042, 0.048),
    ("blackwell", "throughput_peers.jsonl", 0.04, 0.04),
]


def test_experts_on_blackwell_are_as_accurate_as_promised(measured_cases):
    experts = [
        case for case in measured_cases
        if case.run.cluster.device.generation == "blackwell" and case.run.model.moe is not None and case.run.exact
    ]  # fmt: skip
    errors = time_errors(experts)
    assert errors is not None
    assert errors.median < 0.07


@pytest.mark.parametrize(("generation", "file", "median", "mean"), PROMISED)
def test_step_times_are_as_accurate_as_promised(measured_cases, generation, file, median, mean):
    errors = time_errors(chosen(measured_cases, generation, file))
    assert errors is not None
    assert errors.median < median
    assert errors.mean < mean


def test_memory_is_as_accurate_as_promised(measured_cases):
    megatron = chosen(measured_cases, "ampere", "memory_megatron_ci.jsonl")
    steady, peak = steady_errors(megatron), peak_errors(megatron)
    assert steady is not None
    assert peak is not None
    assert steady.median < 0.003
    assert steady.p95 < 0.015
    assert peak.median < 0.003
    assumed = chosen(measured_cases, "ampere", "memory_megatron_ci.jsonl", exact=False)
    large = [case for case in assumed if case.run.model.hidden_size == 4096]
    assert large
    worst = peak_errors(large)
    assert worst is not None
    assert worst.worst < 0.015
    for generation, median in (("blackwell", 0.008), ("ada", 0.01)):
        errors = peak_errors(chosen(measured_cases, generation, "throughput_peers.jsonl"))
        assert errors is not None
        assert errors.median < median


def test_configurations_are_ranked_as_well_as_promised(measured_cases):
    found = ranking(chosen(measured_cases, "ampere", "throughput_vtrain_a100.jsonl"))
    assert found is not None
    assert found.kendall_tau is not None
    assert found.kendall_tau > 0.905
    assert found.mean_regret < 0.02
