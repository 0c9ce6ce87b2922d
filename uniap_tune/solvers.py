"""Which engine solves a problem: stage columns (chains), intervals (interleaved chains), or a MILP on HiGHS or CBC."""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import StrEnum

from uniap_tune.bounds import ChainBounds, chain_bounds
from uniap_tune.chain import SOLVER, solve_chain
from uniap_tune.deadline import Deadline, DeadlineError
from uniap_tune.interleave import is_regular, solve_regular
from uniap_tune.problem import Problem, Solution, Status

AUTO = "auto"
COLUMNS = SOLVER


class Formulation(StrEnum):
    """Formulations of the MILP."""

    AUTO = "auto"  # over stage columns for chains, over layers for other graphs
    COLUMNS = "columns"
    LAYERS = "layers"
    COUNTS = "counts"  # over layers, equal ones aggregated


# A problem, a TPI above which plans are of no interest, when to stop, and the problem's bounds.
# None: of an interleaved pipeline, which has no such bounds.
Solve = Callable[[Problem, float, Deadline, ChainBounds | None], Solution]


def solver_named(name: str = AUTO) -> Solve:
    """``auto``, ``highs`` or ``cbc``, for use by the search."""

    def solve(problem: Problem, cutoff: float, deadline: Deadline, bounds: ChainBounds | None) -> Solution:
        if problem.virtual_stages > 1:
            return solve_interleaved(problem, name, deadline)
        if name == AUTO and problem.is_chain:
            return solve_chain(problem, cutoff=cutoff, deadline=deadline, bounds=bounds)
        return solve_by_milp(problem, name, deadline, cutoff=cutoff, bounds=bounds)

    return solve


def solve(
    problem: Problem,
    name: str = AUTO,
    *,
    formulation: Formulation = Formulation.AUTO,
    gap: float = 1e-9,
    seconds: float | None = None,
) -> Solution:
    """Solve one problem on its own.

    Args:
        problem: chain or not.
        name: ``auto`` (stage columns on a chain, HiGHS otherwise), ``columns``, ``highs`` or ``cbc``.
        formulation: of the MILP.
        gap: relative gap at which a MILP may stop.
        seconds: time limit.
    """
    deadline = Deadline.after(seconds)
    if problem.virtual_stages > 1:
        return solve_interleaved(problem, name, deadline)
    if name in (AUTO, SOLVER) and problem.is_chain and formulation is Formulation.AUTO:
        return solve_chain(problem, deadline=deadline)
    return solve_by_milp(problem, name, deadline, gap=gap, formulation=formulation)


def solve_interleaved(problem: Problem, name: str = AUTO, deadline: Deadline | None = None) -> Solution:
    """The best cut of an interleaved pipeline: by intervals where inner layers are equal, else by MILP."""
    if name in (AUTO, COLUMNS) and is_regular(problem):
        return solve_regular(problem)
    return solve_by_milp(problem, name, deadline or Deadline())


def solve_by_milp(
    problem: Problem,
    name: str,
    deadline: Deadline,
    *,
    gap: float = 1e-9,
    formulation: Formulation = Formulation.AUTO,
    cutoff: float = math.inf,
    bounds: ChainBounds | None = None,
) -> Solution:
    """The MILP on a solver (``auto`` means HiGHS): over stage columns for chains, over the intervals of interleaved
    ones, over layers for other graphs."""
    from uniap_tune.milp.counts import solve_counts
    from uniap_tune.milp.interleaved import solve_intervals
    from uniap_tune.milp.layers import solve_layers
    from uniap_tune.milp.master import solve_master
    from uniap_tune.milp.solvers import Limits, MilpSolver

    solver = MilpSolver.CBC if name == MilpSolver.CBC else MilpSolver.HIGHS
    left = deadline.left()
    limits = Limits(gap=gap, seconds=None if math.isinf(left) else left)
    if problem.virtual_stages > 1:
        return solve_intervals(problem, solver, limits)
    if formulation is Formulation.COUNTS:
        return solve_counts(problem, solver, limits)
    if problem.is_chain and formulation is not Formulation.LAYERS:
        try:
            return solve_master(problem, solver, limits, cutoff=cutoff, bounds=bounds)
        except DeadlineError:
            bound = bounds or chain_bounds(problem)
            return Solution(Status.LIMIT, None, math.inf, bound.total, name)
    return solve_layers(problem, solver, limits)
