"""The doctor's verdicts on runs that are known to have happened, and on what was published as not fitting.

The records are those of ``tests/test_measured.py``; the tests are skipped without them.
"""

from __future__ import annotations

import json
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

from tests.doctors import cluster
from tests.test_measured import _text
from uniap_tune.adapters.argument_list import parse_argument_list
from uniap_tune.adapters.records import Evaluated, evaluate_file, read_lines
from uniap_tune.adapters.source_text import SourceFile
from uniap_tune.doctor.diagnosis import LEAST_GAIN, diagnose, limit_for
from uniap_tune.doctor.megatron import MegatronSetup
from uniap_tune.errors import InputError
from uniap_tune.render.shell import quote

PEERS = "throughput_peers.jsonl"
FILES = ("throughput_published.jsonl", "throughput_vtrain_a100.jsonl", PEERS, "memory_megatron_ci.jsonl")
# Configurations of arXiv 2205.05198 figure 1 without recomputation: published as needing more than 80 GB.
PUBLISHED_AS_TOO_LARGE = {"calculon-fig1-megatron-22B-none", "calculon-fig1-gpt3-175B-none"}


@cache
def evaluated(name: str) -> tuple[Evaluated, ...]:
    """Every record of a file with its run."""
    return tuple(evaluate_file(Path(_text(name))))


def is_too_large(one: Evaluated) -> bool:
    """The verdict of the doctor."""
    assert one.run is not None
    assert one.prediction is not None
    return not limit_for(one.run).fits(one.prediction)


def runs(name: str, *, experts: bool) -> list[Evaluated]:
    """The records of a file whose run happened: something was measured."""
    found = []
    for one in evaluated(name):
        if one.run is not None and one.measured is not None and (one.run.model.moe is not None) == experts:
            measured = one.measured
            if measured.step_time_s or measured.peak_bytes or measured.peak_bytes_per_stage:
                found.append(one)
    return found


@pytest.mark.parametrize("name", [name for name in FILES if name != PEERS])
def test_runs_of_dense_models_fit(name: str) -> None:
    """All of them: at most 5% of each file may be called too large. The peers' file is judged with the others below."""
    happened = runs(name, experts=False)
    assert len(happened) >= 20
    assert sum(map(is_too_large, happened)) <= 0.05 * len(happened)


def test_dense_runs_together_and_in_full() -> None:
    happened = [one for name in FILES for one in runs(name, experts=False)]
    wrong = [one.id for one in happened if is_too_large(one)]
    assert len(happened) > 1000
    assert len(wrong) <= 0.01 * len(happened)


def test_runs_of_models_with_experts_fit() -> None:
    happened = [one for name in FILES for one in runs(name, experts=True)]
    assert len(happened) > 100
    assert sum(map(is_too_large, happened)) <= 0.05 * len(happened)


def test_what_was_published_as_too_large_is_called_so() -> None:
    found = {one.id: one for one in evaluated(PEERS) if one.run is not None}
    assert {name for name in PUBLISHED_AS_TOO_LARGE if is_too_large(found[name])} == PUBLISHED_AS_TOO_LARGE


def test_megatron_tests_through_the_whole_diagnosis() -> None:
    """Their arguments as a recipe: every fourth, from reading them to the verdict."""
    lines = list(read_lines(Path(_text("memory_megatron_ci.jsonl"))))
    checked = 0
    for line in lines[::4]:
        arguments = (line.record or {}).get("args")
        if not isinstance(arguments, dict):
            continue
        words = [word for name, value in arguments.items() for word in _words(name, value)]
        try:
            recipe = parse_argument_list(SourceFile(Path("arguments.txt"), " ".join(words) + "\n"))
        except InputError:
            continue  # not a decoder-only transformer, or without the batch
        found = diagnose(MegatronSetup(recipe=recipe, cluster=cluster("1x8:a100-80gb")))
        if found.fits is not None and recipe.model.moe is None:
            checked += 1
            assert found.fits, line.id
    assert checked >= 20


def _words(name: str, value: object) -> list[str]:
    if value is True:
        return [f"--{name}"]
    if value is False or value is None or isinstance(value, dict):
        return []
    values = value if isinstance(value, list) else [value]
    return [f"--{name}", *(quote(json.dumps(v) if isinstance(v, dict) else str(v)) for v in values)]


def _neighbours(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether two (tp, pp, dp, micro-batch) differ by one change: the micro-batch, or a factor between two degrees."""
    changed = [place for place, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
    return changed == [3] or (len(changed) == 2 and 3 not in changed)


def test_the_best_single_change_is_faster_when_measured() -> None:
    """740 runs of GPT models on one node: of each run's measured neighbours the doctor's first choice."""
    jobs: dict[object, dict[tuple[int, ...], tuple[float, float]]] = defaultdict(dict)
    for one in evaluated("throughput_vtrain_a100.jsonl"):
        if one.run is not None and one.prediction is not None and one.measured is not None:
            run, grid, seconds = one.run, one.run.chunks[0][0].strategy, one.measured.step_time_s
            if seconds is not None and run.virtual_stages == 1:
                key = (run.model.name, run.cluster.num_devices, run.job.global_batch)
                place = (grid.tp, run.pp, grid.dp, run.micro_batch // grid.dp)
                jobs[key][place] = (seconds, one.prediction.step_time_s)
    chosen = faster = near = 0
    for job in jobs.values():
        for place, (measured, predicted) in job.items():
            others = [times for other, times in job.items() if _neighbours(place, other)]
            best = min(others, key=lambda times: times[1], default=None)
            if best is not None and 1 - best[1] / predicted > LEAST_GAIN:
                chosen += 1
                faster += best[0] < measured
                near += best[0] <= 1.03 * min(seconds for seconds, _ in others)
    assert chosen >= 400
    assert faster >= 0.9 * chosen
    assert near >= 0.9 * chosen
