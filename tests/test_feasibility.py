"""The least memory of a problem against brute force."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings

from tests.oracle import brute_force, partitions, problems
from uniap_tune.feasibility import least_peak
from uniap_tune.problem import Assignment, Problem, evaluate


def by_force(problem: Problem) -> float:
    """Least, over all assignments, of the fullest stage."""
    choices = [range(t.num_strategies) for t in problem.layers]
    return min(
        max(evaluate(problem, Assignment(tuple(stage), choice)).stage_bytes)
        for stage in partitions(problem.num_layers, problem.num_stages)
        for choice in itertools.product(*choices)
    )


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(problem=problems(leading=False, max_layers=4))
def test_is_exact_without_updates_and_a_bound_with_them(problem: Problem) -> None:
    least = by_force(problem)
    assert least_peak(problem) <= least * (1 + 1e-12)
    layers = tuple(replace(table, step_bytes=0 * table.step_bytes) for table in problem.layers)
    plain = replace(problem, layers=layers)
    assert least_peak(plain) == pytest.approx(by_force(plain), rel=1e-12)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(problem=problems(leading=False, max_layers=4))
def test_decides_whether_anything_fits(problem: Problem) -> None:
    layers = tuple(replace(table, step_bytes=0 * table.step_bytes) for table in problem.layers)
    problem = replace(problem, layers=layers)
    least = least_peak(problem)
    if least > 0:
        assert math.isfinite(brute_force(replace(problem, memory_limit_bytes=least * (1 + 1e-9))))
        assert math.isinf(brute_force(replace(problem, memory_limit_bytes=least * (1 - 1e-9))))


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(problem=problems(leading=False))
def test_needs_a_layer_for_each_stage(problem: Problem) -> None:
    assert math.isinf(least_peak(replace(problem, num_stages=problem.num_layers + 1)))
