"""Reading ``solve``'s problem format: what is written is what is read, and every fault is named with its key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from tests.oracle import problems
from tests.problem_files import document, small, text
from uniap_tune.adapters.problem_json import parse_problem, read_problem
from uniap_tune.errors import InputError
from uniap_tune.problem import Problem
from uniap_tune.schedule import Schedule


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(problem=problems(leading=False))
def test_round_trip(problem: Problem) -> None:
    read = parse_problem(text(problem), "problem.json")
    assert document(read)["layers"] == document(problem)["layers"]
    for name in ("num_stages", "num_microbatches", "schedule", "memory_limit_bytes", "is_chain"):
        assert getattr(read, name) == getattr(problem, name)
    size = read.num_layouts  # layouts that no strategy uses are left out
    assert [(e.source, e.target) for e in read.edges] == [(e.source, e.target) for e in problem.edges]
    for ours, theirs in zip(read.edges, problem.edges, strict=True):
        assert np.array_equal(ours.reshard_s, theirs.reshard_s[:size, :size])
        assert np.array_equal(ours.send_s, theirs.send_s[:size, :size])


def parse(data: object) -> Problem:
    return parse_problem(json.dumps(data), "problem.json")


def test_equal_layers_and_matrices_are_one_object() -> None:
    problem = parse(small())
    assert len({id(table) for table in problem.layers}) == 1
    assert len({id(matrix) for e in problem.edges for matrix in (e.reshard_s, e.send_s)}) == 1


def test_layers_that_differ_in_any_column_are_not_merged() -> None:
    for key in ("layout", "time_s", "step_time_s", "static_bytes", "microbatch_bytes", "transient_bytes", "step_bytes"):
        data = small()
        data["layers"][1][key] = [0, 0]
        assert len({id(table) for table in parse(data).layers}) == 2, key


def test_defaults() -> None:
    data = small()
    for layer in data["layers"]:
        for key in ("name", "layout", "step_time_s", "transient_bytes", "step_bytes"):
            del layer[key]
    del data["schedule"]
    data["edges"] = [{"from": 0, "to": 1}]
    problem = parse(data)
    assert problem.schedule is Schedule.ONE_F_ONE_B
    assert problem.num_layouts == 1
    table = problem.layers[0]
    for column in (table.layout, table.step_time_s, table.transient_bytes, table.step_bytes):
        assert not column.any()
    assert not problem.edges[0].reshard_s.any()
    assert not problem.edges[0].send_s.any()
    del data["edges"]
    assert parse(data).edges == ()


def test_parallel_edges_add() -> None:
    data = small()
    data["edges"] = [
        {"from": 0, "to": 2, "reshard_s": [[1, 2], [3, 4]]},
        {"from": 1, "to": 2, "send_s": [[1, 1], [1, 1]]},
        {"from": 0, "to": 2, "reshard_s": [[10, 20], [30, 40]], "send_s": [[5, 6], [7, 8]]},
    ]
    problem = parse(data)
    assert [(e.source, e.target) for e in problem.edges] == [(0, 2), (1, 2)]
    assert problem.edges[0].reshard_s.tolist() == [[11, 22], [33, 44]]
    assert problem.edges[0].send_s.tolist() == [[5, 6], [7, 8]]


# A change to ``small()`` as a path and a value (``...``: the key is removed), and what the message must name.
BAD: list[tuple[tuple[str | int, ...], Any, str]] = [
    (("schema_version",), 2, "schema_version"),
    (("schema_version",), "1", "schema_version"),
    (("schema_version",), True, "schema_version"),
    (("schema_version",), ..., "schema_version"),
    (("num_stages",), 0, "num_stages"),
    (("num_stages",), -1, "num_stages"),
    (("num_stages",), 2.0, "num_stages"),
    (("num_stages",), "2", "num_stages"),
    (("num_stages",), True, "num_stages"),
    (("num_stages",), ..., "num_stages"),
    (("num_stages",), 10**30, "num_stages"),
    (("num_microbatches",), 0, "num_microbatches"),
    (("num_microbatches",), None, "num_microbatches"),
    (("schedule",), "interleaved", "schedule"),
    (("schedule",), None, "schedule"),
    (("schedule",), 1, "schedule"),
    (("memory_limit_bytes",), 0, "memory_limit_bytes"),
    (("memory_limit_bytes",), -1.0, "memory_limit_bytes"),
    (("memory_limit_bytes",), float("nan"), "memory_limit_bytes"),
    (("memory_limit_bytes",), float("inf"), "memory_limit_bytes"),
    (("memory_limit_bytes",), float("-inf"), "memory_limit_bytes"),
    (("memory_limit_bytes",), 1e-320, "memory_limit_bytes"),
    (("memory_limit_bytes",), "80GiB", "memory_limit_bytes"),
    (("memory_limit_bytes",), ..., "memory_limit_bytes"),
    (("layers",), [], "layers"),
    (("layers",), {}, "layers"),
    (("layers",), ..., "layers"),
    (("layers", 1), [], "layers[1]"),
    (("layers", 1), None, "layers[1]"),
    (("layers", 1, "time_s"), [], "layers[1].time_s"),
    (("layers", 1, "time_s"), [1.0], "layers[1]"),
    (("layers", 1, "time_s"), 1.0, "layers[1].time_s"),
    (("layers", 1, "time_s"), ..., "layers[1].time_s"),
    (("layers", 1, "time_s", 0), -1e-9, "layers[1].time_s[0]"),
    (("layers", 1, "time_s", 1), float("nan"), "layers[1].time_s[1]"),
    (("layers", 1, "time_s", 1), float("inf"), "layers[1].time_s[1]"),
    (("layers", 1, "time_s", 1), 1e308, "layers[1].time_s[1]"),
    (("layers", 1, "time_s", 1), 10**400, "layers[1].time_s[1]"),
    (("layers", 1, "time_s", 1), True, "layers[1].time_s[1]"),
    (("layers", 1, "time_s", 1), "1", "layers[1].time_s[1]"),
    (("layers", 1, "time_s", 1), None, "layers[1].time_s[1]"),
    (("layers", 1, "time_s", 1), [1.0], "layers[1].time_s[1]"),
    (("layers", 1, "static_bytes"), ..., "layers[1].static_bytes"),
    (("layers", 1, "microbatch_bytes"), [1.0, 2.0, 3.0], "layers[1].microbatch_bytes"),
    (("layers", 1, "transient_bytes", 0), -1, "layers[1].transient_bytes[0]"),
    (("layers", 1, "step_bytes"), None, "layers[1].step_bytes"),
    (("layers", 1, "step_time_s"), [], "layers[1].step_time_s"),
    (("layers", 1, "layout"), [0], "layers[1].layout"),
    (("layers", 1, "layout", 0), -1, "layers[1].layout[0]"),
    (("layers", 1, "layout", 0), 0.0, "layers[1].layout[0]"),
    (("layers", 1, "layout", 0), 10**9, "layers[1].layout[0]"),
    (("layers", 1, "layout", 0), 2, "edges[0].reshard_s"),  # the matrices are now too small
    (("layers", 1, "memory"), [1, 1], "layers[1]: unknown key 'memory'"),
    (("edges",), {}, "edges"),
    (("edges",), None, "edges"),
    (("edges", 1), 5, "edges[1]"),
    (("edges", 1, "from"), 2, "edges[1]"),
    (("edges", 1, "from"), 3, "edges[1]"),
    (("edges", 1, "from"), -1, "edges[1].from"),
    (("edges", 1, "to"), 4, "edges[1].to"),
    (("edges", 1, "to"), 1.5, "edges[1].to"),
    (("edges", 1, "to"), ..., "edges[1].to"),
    (("edges", 1, "send_s"), [[0.0]], "edges[1].send_s"),
    (("edges", 1, "send_s"), [[0.0, 1.0], [1.0]], "edges[1].send_s"),
    (("edges", 1, "send_s"), [0.0, 1.0], "edges[1].send_s"),
    (("edges", 1, "send_s"), None, "edges[1].send_s"),
    (("edges", 1, "reshard_s", 0), [0.0, -1.0], "edges[1]"),
    (("edges", 1, "weight"), 1, "edges[1]: unknown key 'weight'"),
    (("stages",), 1, "unknown key 'stages'"),
    (("k" * 10000,), 1, "unknown key 'kkk"),
]


def changed(path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    """``small()`` with one change."""
    data = json.loads(json.dumps(small()))  # the matrices of edges are one object
    place: Any = data
    for step in path[:-1]:
        place = place[step]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return data


@pytest.mark.parametrize(("path", "value", "named"), BAD, ids=[f"{n}" for n in range(len(BAD))])
def test_faults_are_named(path: tuple[str | int, ...], value: Any, named: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(changed(path, value))
    assert caught.value.what.startswith("problem.json")
    assert named in caught.value.what
    assert len(caught.value.what) < 200


@pytest.mark.parametrize("content", ["", "{", "nonsense", "[1, 2", "\ufeff{}", '{"a": 1' * 2, "[" * 100000, "1" * 5000])
def test_what_is_not_json(content: str) -> None:
    with pytest.raises(InputError, match=r"problem\.json: not JSON"):
        parse_problem(content, "problem.json")


@pytest.mark.parametrize("content", ["[]", "1", '"text"', "null", "true", "NaN"])
def test_what_is_no_object(content: str) -> None:
    with pytest.raises(InputError, match="must be an object"):
        parse_problem(content, "problem.json")


def test_what_is_null_or_too_large_is_said_so() -> None:
    for path, value, said in (
        (("edges",), None, "edges must be a list, not missing or null"),
        (("num_stages",), 10**10, "num_stages must be a whole number from 1 to 1000000000"),
    ):
        with pytest.raises(InputError, match=said):
            parse(changed(path, value))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.json", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            read_problem(path)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(InputError, match="not UTF-8"):
        read_problem(tmp_path / "binary.json")
