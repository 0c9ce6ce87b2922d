"""The column engine against brute force."""

from __future__ import annotations

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.oracle import brute_force, problems
from uniap_tune.bounds import chain_bounds
from uniap_tune.chain import solve_chain
from uniap_tune.problem import Problem, Status, evaluate, is_valid


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(problem=problems(chain=True))
def test_optimum_equals_brute_force(problem: Problem) -> None:
    best = brute_force(problem)
    solution = solve_chain(problem)
    if math.isinf(best):
        assert solution.status is Status.INFEASIBLE
        return
    assert solution.status is Status.OPTIMAL
    assert solution.assignment is not None
    assert is_valid(problem, solution.assignment)
    value = evaluate(problem, solution.assignment)
    assert all(problem.fits(size) for size in value.stage_bytes)
    assert solution.objective_s == pytest.approx(best, rel=1e-9, abs=1e-300)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(problem=problems(chain=True))
def test_bound_never_exceeds_the_optimum(problem: Problem) -> None:
    best = brute_force(problem)
    if math.isfinite(best):
        assert chain_bounds(problem).total <= best * (1 + 1e-9)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(problem=problems(chain=True), part=st.sampled_from([0.5, 0.99, 1.0, 1.01, 2.0]))
def test_a_cutoff_hides_what_is_above_it_and_nothing_else(problem: Problem, part: float) -> None:
    best = brute_force(problem)
    if math.isinf(best) or best == 0:
        return
    solution = solve_chain(problem, cutoff=best * part)
    if part >= 1:
        assert solution.status is Status.OPTIMAL
        assert solution.objective_s == pytest.approx(best, rel=1e-9)
    else:
        assert solution.status is Status.LIMIT
        assert solution.assignment is None
        assert best * part * (1 - 1e-9) <= solution.bound_s <= best * (1 + 1e-9)
