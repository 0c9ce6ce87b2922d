"""``solve`` through the command line: against brute force with every solver, and against damaged files."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.oracle import brute_force, cost, problems
from tests.problem_files import small, text
from uniap_tune.cli import main
from uniap_tune.problem import EdgeTable, LayerTable, Problem
from uniap_tune.schedule import Schedule

KEYS = [
    *("schema_version", "status", "objective_s", "bound_s", "gap", "stage", "strategy"),
    *("stage_time_s", "link_time_s", "stage_bytes", "solver", "cpu_s"),
]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file that every example overwrites."""
    return tmp_path_factory.mktemp("solve") / "problem.json"


def solve(path: Path, content: str | bytes, *options: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of ``solve``."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["solve", str(path), *options])
    return code, out.getvalue(), err.getvalue()


def check_answer(problem: Problem, code: int, stdout: str, solver: str) -> None:
    """The answer is the optimum that brute force finds, and its parts belong to its assignment."""
    answer = json.loads(stdout)
    assert sorted(answer) == sorted(KEYS)
    assert answer["schema_version"] == 1
    best = brute_force(problem)
    if math.isinf(best):
        assert code == 3
        assert answer["status"] == "infeasible"
        missing = ("objective_s", "bound_s", "gap", "stage", "strategy", "stage_time_s", "link_time_s", "stage_bytes")
        assert all(answer[key] is None for key in missing)
        return
    assert code == 0
    assert answer["status"] == "optimal"
    assert answer["objective_s"] == pytest.approx(best, rel=1e-9, abs=1e-300)
    assert answer["bound_s"] <= answer["objective_s"]
    assert 0 <= answer["gap"] <= (1e-6 if solver == "cbc" else 1e-9 * (1 + 1e-6))  # CBC prints rounded values
    # what the assignment costs by the oracle's own formulas, memory and order included
    assert cost(problem, answer["stage"], tuple(answer["strategy"])) == pytest.approx(best, rel=1e-9, abs=1e-300)
    assert sorted(set(answer["stage"])) == list(range(problem.num_stages))
    assert answer["stage"] == sorted(answer["stage"])
    assert len(answer["stage_time_s"]) == len(answer["stage_bytes"]) == problem.num_stages
    assert len(answer["link_time_s"]) == problem.num_stages - 1
    assert max(answer["stage_bytes"]) <= problem.memory_limit_bytes * (1 + 1e-12)
    assert answer["solver"] == (solver if solver != "auto" else "columns" if problem.is_chain else "highs")


@pytest.mark.parametrize("solver", ["auto", "highs", "cbc"])
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(problem=problems(leading=False))
def test_optimum_equals_brute_force(path: Path, solver: str, problem: Problem) -> None:
    code, stdout, stderr = solve(path, text(problem), "--json", "--solver", solver)
    assert stderr == ""
    check_answer(problem, code, stdout, solver)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(problem=problems(leading=False, chain=True, max_layers=6))
def test_chains_equal_brute_force(path: Path, problem: Problem) -> None:
    code, stdout, _ = solve(path, text(problem), "--json", "--solver", "columns")
    check_answer(problem, code, stdout, "columns")


def spread(seed: int, decades: int, *, skips: bool = False) -> Problem:
    """A chain (or one with skip edges) whose seconds and bytes lie anywhere in so many powers of ten."""
    rng = np.random.default_rng(seed)
    n, k = int(rng.integers(2, 6)), 3

    def values(*shape: int, top: float) -> np.ndarray:
        return 10.0 ** rng.uniform(top - decades, top, shape) * (rng.random(shape) > 0.1)

    def table() -> LayerTable:
        kinds = (4, 4, 12, 12, 12, 12)
        return LayerTable(rng.integers(0, 2, k), *(values(k, top=top) for top in kinds))

    layers = tuple(table() for _ in range(n))
    pairs = [(u, v) for u in range(n) for v in range(u + 1, n if skips else min(u + 2, n))]
    edges = tuple(EdgeTable(u, v, values(2, 2, top=4), values(2, 2, top=4)) for u, v in pairs)
    need = sum(float((t.static_bytes + t.transient_bytes).min()) for t in layers)
    limit, stages, c = max(need * rng.uniform(0.5, 3), 1.0), int(rng.integers(1, min(3, n) + 1)), [1, 5, 4096][seed % 3]
    return Problem(stages, c, Schedule.ONE_F_ONE_B, limit, 2, layers, edges)


@pytest.mark.parametrize("seed", range(40))
def test_magnitudes_far_apart(path: Path, seed: int) -> None:
    """Seconds from 1e-9 to 1e4 and bytes up to a terabyte in one problem."""
    problem = spread(seed, decades=13)
    code, stdout, stderr = solve(path, text(problem), "--json")
    assert stderr == ""
    check_answer(problem, code, stdout, "auto")


def test_magnitudes_far_apart_on_graphs(path: Path) -> None:
    for seed in range(60):
        problem = spread(seed, decades=13, skips=True)
        code, stdout, stderr = solve(path, text(problem), "--json")
        assert stderr == ""
        check_answer(problem, code, stdout, "auto")


FORTY = 301.3147638634775  # both formulations find it


@pytest.mark.parametrize("solver", ["auto", "highs"])
def test_forty_different_layers(path: Path, solver: str) -> None:
    """2^40 strategies alone: nothing enumerates this."""
    rng = np.random.default_rng(40)
    size = rng.uniform(1, 2, 40)
    layers = [
        {
            "time_s": [float(s), float(1.3 * s)],
            "static_bytes": [10.0 * float(s), 8.0 * float(s)],
            "microbatch_bytes": [float(2 * s), float(0.2 * s)],
            "layout": [0, 1],
        }
        for s in size
    ]
    edges = [
        {"from": u, "to": u + 1, "reshard_s": [[0, 0.05], [0.05, 0]], "send_s": [[0.1, 0.15], [0.15, 0.1]]}
        for u in range(39)
    ]
    data = {
        "schema_version": 1, "num_stages": 4, "num_microbatches": 16, "schedule": "1f1b",
        "memory_limit_bytes": 210.0, "layers": layers, "edges": edges,
    }  # fmt: skip
    code, stdout, _ = solve(path, json.dumps(data), "--json", "--solver", solver, "--gap", "1e-6")
    answer = json.loads(stdout)
    assert code == 0
    assert answer["status"] == "optimal"
    assert answer["gap"] <= 1e-6 * (1 + 1e-6)
    assert max(answer["stage_bytes"]) <= 210.0 * (1 + 1e-12)
    assert set(answer["strategy"]) == {0, 1}  # memory binds, and not everywhere
    assert answer["objective_s"] == pytest.approx(FORTY, rel=2e-6)


def test_for_people(path: Path) -> None:
    code, stdout, stderr = solve(path, json.dumps(small()))
    assert code == 0
    assert stderr == ""
    first, *stages = stdout.splitlines()
    assert first.startswith("optimal: 18.20 s, gap 0")
    assert [line.split(":")[0] for line in stages] == ["stage 0", "stage 1"]
    data = small()
    data["memory_limit_bytes"] = 1.0
    code, stdout, _ = solve(path, json.dumps(data))
    assert (code, stdout) == (3, "infeasible: no plan\n")


def test_more_stages_than_layers_are_infeasible(path: Path) -> None:
    data = small()
    data["num_stages"] = 10**9
    for solver in ("auto", "highs", "cbc"):
        code, stdout, _ = solve(path, json.dumps(data), "--json", "--solver", solver)
        assert code == 3
        assert json.loads(stdout)["status"] == "infeasible"


def test_columns_refuse_what_is_no_chain(path: Path) -> None:
    data = small()
    data["edges"].append({"from": 0, "to": 3})
    code, stdout, stderr = solve(path, json.dumps(data), "--json", "--solver", "columns")
    assert (code, stdout) == (2, "")
    assert "neighbours" in stderr


@pytest.mark.parametrize("gap", ["-1", "1", "nan", "inf"])
def test_gap_is_checked(path: Path, gap: str) -> None:
    code, stdout, stderr = solve(path, json.dumps(small()), "--gap", gap)
    assert (code, stdout) == (2, "")
    assert "--gap" in stderr


@pytest.mark.parametrize("solver", ["auto", "highs", "cbc"])
def test_two_runs_are_equal(path: Path, solver: str) -> None:
    answers = [json.loads(solve(path, json.dumps(small()), "--json", "--solver", solver)[1]) for _ in range(2)]
    for answer in answers:
        assert answer.pop("cpu_s") >= 0
    assert answers[0] == answers[1]


def check_refused_or_solved(code: int, stdout: str, stderr: str) -> None:
    """Never a traceback, an internal error or a warning; a refusal is one message."""
    assert code in (0, 2, 3), stderr
    assert "Traceback" not in stderr
    assert "internal error" not in stderr
    if code == 2:
        assert stdout == ""
        first, *rest = stderr.splitlines()
        assert first.startswith("error: ")
        assert "problem.json" in first
        assert all(line.startswith(("  why: ", "  fix: ")) for line in rest)
    else:
        assert stderr == ""
        json.loads(stdout)


JUNK: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 3, 10**6, 10**400, -0.0, 0.5, -1e-9, 1e-30, 1e30, 1e99, 1e308),
    *(float("nan"), float("inf"), "", "1", "1f1b", "gpipe", "NaN", "\ud800", [], {}, [[]], [0.0], [0, 1, 2], {"a": 1}),
]


def junk(rng: random.Random) -> Any:
    """A value of its own, because later changes may go into it."""
    return copy.deepcopy(rng.choice(JUNK))


def places(data: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a document."""
    found: list[tuple[Any, Any]] = []
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        found.append((data, key))
        found += places(value)
    return found


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32), changes=st.integers(1, 3))
def test_damaged_documents(path: Path, seed: int, changes: int) -> None:
    rng = random.Random(seed)
    data = json.loads(json.dumps(small()))
    for _ in range(changes):
        container, key = rng.choice(places(data))
        action = rng.randrange(4)
        if action == 0:
            del container[key]
        elif action == 1 and isinstance(container, list):
            container.append(junk(rng))
        elif action == 2 and isinstance(container, dict):
            container[rng.choice(["", "extra", "time_s", "from"])] = junk(rng)
        else:
            container[key] = junk(rng)
        if not data:
            break
    check_refused_or_solved(*solve(path, json.dumps(data), "--json"))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
def test_damaged_bytes(path: Path, seed: int) -> None:
    rng = random.Random(seed)
    content = bytearray(json.dumps(small()).encode())
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(content))
        content[at : at + rng.randrange(3)] = bytes(rng.randrange(256) for _ in range(rng.randrange(3)))
    if rng.random() < 0.3:
        del content[rng.randrange(len(content)) :]
    check_refused_or_solved(*solve(path, bytes(content), "--json"))
