"""Interleaved pipelines: intervals and MILP against brute force over every cut, and the independent re-evaluation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracle import brute_force
from uniap_tune.interleave import assignment_of, interval_limits, is_regular, solve_regular
from uniap_tune.problem import EdgeTable, LayerTable, LeadingRule, Problem, evaluate, is_valid
from uniap_tune.schedule import Schedule
from uniap_tune.simulate import recompute
from uniap_tune.solvers import solve, solve_interleaved


@st.composite
def interleaved(draw: st.DrawFn, *, regular: bool) -> Problem:
    """Small chains with virtual stages: whole numbers make ties, memory is often at the limit."""
    size, v = draw(st.sampled_from([(2, 2), (2, 3), (3, 2), (4, 2)]))
    each, less = draw(st.sampled_from([1, 1, 2, 4] if size * v == 4 else [1, 1, 2])), draw(st.integers(-1, 2))
    inner = max(1, size * v * each - less)  # the ends make up for some
    groups = draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    whole = draw(st.booleans())
    leading = draw(st.booleans())

    def values(k: int) -> np.ndarray:
        return rng.integers(0, 5, k).astype(float) if whole else rng.random(k)

    def table(k: int, seconds: float, spread: int) -> LayerTable:
        times = seconds + (rng.integers(0, spread + 1, k).astype(float) if whole else spread * rng.random(k))
        return LayerTable(np.zeros(k, dtype=np.int64), times, *(values(k) for _ in range(5)))

    kinds = [table(2 if leading else 1, draw(st.sampled_from([1, 8])), 4) for _ in range(1 if regular else 2)]
    ends = [table(1, *draw(st.sampled_from([(0.0, 0), (0.0, 2), (8.0, 4)]))) for _ in range(2)]
    layers = [ends[0], *(kinds[int(rng.integers(len(kinds)))] for _ in range(inner)), ends[1]]
    send = np.array([[float(rng.random())]])
    edges = tuple(EdgeTable(u, u + 1, np.zeros((1, 1)), send) for u in range(inner + 1))
    rule = None
    if leading:
        marks = [np.array([True, False]) if 0 < u <= inner else np.array([False]) for u in range(inner + 2)]
        counted = tuple(0 < u <= inner for u in range(inner + 2))
        rule = LeadingRule(max(1, inner // (size * v)), counted, tuple(marks))
    most = sum(float(t.static_bytes.max() + t.step_bytes.max() + 9 * t.microbatch_bytes.max()) for t in layers)
    limit = max(1.0, most / size * draw(st.sampled_from([0.4, 0.6, 0.8, 3.0, 3.0])))
    limit = float(math.floor(limit)) if whole else limit
    return Problem(size, groups * size, Schedule.ONE_F_ONE_B, limit, 1, tuple(layers), edges, rule, v)


def check(problem: Problem, name: str) -> None:
    truth = brute_force(problem)
    found = solve_interleaved(problem, name)
    if math.isinf(truth):
        assert found.assignment is None
        assert math.isinf(found.bound_s)
        return
    assert found.objective_s == pytest.approx(truth, rel=1e-9)
    assert found.bound_s <= truth * (1 + 1e-9)
    assert found.gap <= 1e-8
    assert found.assignment is not None
    assert is_valid(problem, found.assignment)
    value, again = evaluate(problem, found.assignment), recompute(problem, found.assignment)
    assert again.feasible
    assert again.objective_s == pytest.approx(value.objective_s, rel=1e-12)
    assert again.stage_bytes == pytest.approx(value.stage_bytes, rel=1e-12)


@given(interleaved(regular=True))
@settings(max_examples=150, deadline=None)
def test_equal_layers_by_intervals(problem: Problem) -> None:
    check(problem, "auto")


@given(interleaved(regular=True))
@settings(max_examples=20, deadline=None)
def test_equal_layers_by_milp(problem: Problem) -> None:
    check(problem, "highs")


@given(interleaved(regular=False))
@settings(max_examples=40, deadline=None)
def test_different_layers(problem: Problem) -> None:
    check(problem, "auto")


@given(interleaved(regular=False))
@settings(max_examples=5, deadline=None)
def test_different_layers_on_cbc(problem: Problem) -> None:
    check(problem, "cbc")


def even(blocks: int, size: int, v: int, *, head: float = 0.0) -> Problem:
    """Equal layers of one second and one byte a micro-batch, an embedding that takes nothing and a head."""

    def table(time: float, size: float) -> LayerTable:
        zero = np.zeros(1)
        return LayerTable(np.zeros(1, dtype=np.int64), np.array([time]), zero, zero, np.array([size]), zero, zero)

    block = table(1.0, 1.0)
    layers = (table(0.0, 0.0), *[block] * blocks, table(head, 0.0))
    edges = tuple(EdgeTable(u, u + 1, np.zeros((1, 1)), np.zeros((1, 1))) for u in range(blocks + 1))
    return Problem(size, 2 * size, Schedule.ONE_F_ONE_B, 1e9, 1, layers, edges, None, v)


def test_even_chunks_have_the_bubble_of_the_paper() -> None:
    """arXiv 2104.04473 section 2.2: (p - 1) / (v m) of the ideal time."""
    found = solve(even(16, 4, 2))
    assert found.objective_s == pytest.approx((8 + 3 / 2) * 4)
    assert found.assignment is not None
    assert [found.assignment.stage.count(s) for s in range(8)] == [3, 2, 2, 2, 2, 2, 2, 3]  # with both ends


def test_a_long_head_takes_the_place_of_layers() -> None:
    found = solve(even(16, 2, 2, head=2.0))
    assert found.assignment is not None
    blocks = [found.assignment.stage[1:-1].count(s) for s in range(4)]
    assert blocks[0] + blocks[2] == 9
    assert found.objective_s == pytest.approx(4 * 9 + 9 / 2)


def test_what_is_no_interleaving() -> None:
    assert interval_limits(even(5, 4, 2)) is None  # a stage would be empty
    assert solve_regular(even(5, 4, 2)).assignment is None
    problem = even(16, 4, 2)
    assert is_regular(problem)
    assert assignment_of(problem, [2] * 8).stage[:4] == (0, 0, 0, 1)
