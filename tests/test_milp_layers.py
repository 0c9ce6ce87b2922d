"""The per-layer formulation against brute force, for both solvers."""

from __future__ import annotations

import math

import pytest
from hypothesis import HealthCheck, given, settings

from tests.oracle import brute_force, problems
from uniap_tune.milp.layers import solve_layers
from uniap_tune.milp.solvers import Limits, MilpSolver
from uniap_tune.problem import Problem, Status, evaluate, is_valid


@pytest.mark.parametrize("solver", list(MilpSolver))
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(problem=problems())
def test_optimum_equals_brute_force(solver: MilpSolver, problem: Problem) -> None:
    best = brute_force(problem)
    solution = solve_layers(problem, solver, Limits())
    if math.isinf(best):
        assert solution.status is Status.INFEASIBLE
        return
    assert solution.status is Status.OPTIMAL
    assert solution.assignment is not None
    assert is_valid(problem, solution.assignment)
    value = evaluate(problem, solution.assignment)
    assert all(problem.fits(size) for size in value.stage_bytes)
    assert value.objective_s == pytest.approx(solution.objective_s, rel=1e-12)
    assert solution.objective_s == pytest.approx(best, rel=1e-9, abs=1e-300)
    assert solution.bound_s <= solution.objective_s
