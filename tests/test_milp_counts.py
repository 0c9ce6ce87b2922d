"""The aggregated formulation against brute force and the per-layer one, on chains and graphs."""

from __future__ import annotations

import math

import pytest
from hypothesis import HealthCheck, given, settings

from tests.benchmarks.instances import equal_layers
from tests.oracle import brute_force, problems
from uniap_tune.chain import solve_chain
from uniap_tune.milp.counts import solve_counts
from uniap_tune.milp.solvers import Limits, MilpSolver
from uniap_tune.problem import Problem, Status, is_valid
from uniap_tune.simulate import recompute


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(problem=problems())
def test_optimum_equals_brute_force(problem: Problem) -> None:
    best = brute_force(problem)
    solution = solve_counts(problem, MilpSolver.HIGHS, Limits())
    if math.isinf(best):
        assert solution.status is Status.INFEASIBLE
        return
    assert solution.status is Status.OPTIMAL
    assert solution.assignment is not None
    assert is_valid(problem, solution.assignment)
    assert recompute(problem, solution.assignment).feasible
    assert solution.objective_s == pytest.approx(best, rel=1e-9, abs=1e-300)


def test_a_transformer_agrees_with_the_columns() -> None:
    problem = equal_layers(14, 2, 6, c=8)
    counted = solve_counts(problem, MilpSolver.HIGHS, Limits(gap=1e-6))
    assert counted.objective_s == pytest.approx(solve_chain(problem).objective_s, rel=2e-6)
