"""Four ways to the same optimum: the master MILP, the per-layer MILP, the threshold search and brute force."""

from __future__ import annotations

import math
import os

import pytest
from hypothesis import HealthCheck, given, settings

from tests.oracle import brute_force, problems
from uniap_tune.chain import solve_chain
from uniap_tune.milp.layers import solve_layers
from uniap_tune.milp.master import solve_master
from uniap_tune.milp.solvers import Limits, MilpSolver
from uniap_tune.problem import Problem, Status
from uniap_tune.simulate import recompute

THOROUGH = os.environ.get("UNIAP_THOROUGH") == "1"


@settings(max_examples=2000 if THOROUGH else 300, deadline=None, suppress_health_check=list(HealthCheck))
@given(problem=problems(chain=True))
def test_all_ways_agree(problem: Problem) -> None:
    best = brute_force(problem)
    solutions = [
        solve_chain(problem),
        solve_master(problem, MilpSolver.HIGHS, Limits()),
        solve_layers(problem, MilpSolver.HIGHS, Limits()),
    ]
    for solution in solutions:
        if math.isinf(best):
            assert solution.status is Status.INFEASIBLE
            continue
        assert solution.status is Status.OPTIMAL
        assert solution.assignment is not None
        assert solution.objective_s == pytest.approx(best, rel=1e-9, abs=1e-300)
        checked = recompute(problem, solution.assignment)
        assert checked.feasible
        assert checked.objective_s == pytest.approx(solution.objective_s, rel=1e-12, abs=1e-300)
        assert solution.bound_s <= checked.objective_s * (1 + 1e-12)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(problem=problems(chain=True))
def test_master_on_cbc(problem: Problem) -> None:
    best = brute_force(problem)
    solution = solve_master(problem, MilpSolver.CBC, Limits())
    assert solution.objective_s == pytest.approx(best, rel=1e-9, abs=1e-300)
