"""Which engine solves a problem: stage columns (chains), or the MILP on HiGHS or CBC."""

from __future__ import annotations

import math
from collections.abc import Callable

from uniap_tune.bounds import ChainBounds
from uniap_tune.chain import SOLVER, solve_chain
from uniap_tune.columns import Deadline
from uniap_tune.problem import Problem, Solution

AUTO = "auto"

# A problem, a TPI above which plans are of no interest, when to stop, and the problem's bounds.
Solve = Callable[[Problem, float, Deadline, ChainBounds], Solution]


def solver_named(name: str = AUTO) -> Solve:
    """``auto``, ``highs`` or ``cbc``, for use by the search."""

    def solve(problem: Problem, cutoff: float, deadline: Deadline, bounds: ChainBounds) -> Solution:
        if name == AUTO and problem.is_chain:
            return solve_chain(problem, cutoff=cutoff, deadline=deadline, bounds=bounds)
        return solve_by_milp(problem, name, deadline)

    return solve


def solve(problem: Problem, name: str = AUTO, *, gap: float = 1e-9, seconds: float | None = None) -> Solution:
    """Solve one problem on its own.

    Args:
        problem: chain or not.
        name: ``auto`` (stage columns on a chain, HiGHS otherwise), ``columns``, ``highs`` or ``cbc``.
        gap: relative gap at which a MILP may stop.
        seconds: time limit.
    """
    deadline = Deadline.after(seconds)
    if name in (AUTO, SOLVER) and problem.is_chain:
        return solve_chain(problem, deadline=deadline)
    return solve_by_milp(problem, name, deadline, gap=gap)


def solve_by_milp(problem: Problem, name: str, deadline: Deadline, *, gap: float = 1e-9) -> Solution:
    """The per-layer MILP; ``auto`` means HiGHS."""
    from uniap_tune.milp.layers import solve_layers
    from uniap_tune.milp.solvers import Limits, MilpSolver

    solver = MilpSolver.CBC if name == MilpSolver.CBC else MilpSolver.HIGHS
    left = deadline.left()
    return solve_layers(problem, solver, Limits(gap=gap, seconds=None if math.isinf(left) else left))
