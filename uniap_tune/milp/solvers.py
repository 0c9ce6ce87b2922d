"""HiGHS and CBC behind one call, with the status and the bound read from the solver itself.

PuLP's own status is not enough: its HiGHS interface reports a time limit as optimal, and it reads no bound.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import highspy
import pulp

from uniap_tune.errors import TuneError
from uniap_tune.problem import Status

# The tightest tolerances both solvers accept: models are scaled to order one, and answers must agree with
# brute force to 1e-9.
_TOLERANCE = 1e-9
_SEED = 1


class MilpSolver(StrEnum):
    """Supported MILP solvers."""

    HIGHS = "highs"
    CBC = "cbc"


@dataclass(frozen=True, slots=True)
class Limits:
    """When a solve may stop: at this relative gap, or after this many seconds."""

    gap: float = 1e-9
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class MilpAnswer:
    """Outcome in the model's own units. The point is in the variables' ``varValue`` if ``has_point``."""

    status: Status
    has_point: bool
    bound: float


def lin_sum(terms: Iterable[Any]) -> Any:
    """Sum of linear expressions, as an expression even when there are none."""
    return pulp.lpSum(list(terms))


def solve_model(lp: Any, solver: MilpSolver, limits: Limits) -> MilpAnswer:
    """Minimize ``lp`` on one thread with a fixed seed."""
    return _highs(lp, limits) if solver is MilpSolver.HIGHS else _cbc(lp, limits)


class _Highs(pulp.HiGHS):  # type: ignore[misc]  # PuLP ships no types
    """PuLP's interface reads values HiGHS does not have when presolve proves a model infeasible."""

    def findSolutionValues(self, lp: Any) -> tuple[int, int]:  # noqa: N802
        values = list(lp.solverModel.getSolution().col_value)
        for variable in lp.variables():
            variable.varValue = values[variable.index] if values else None
        return pulp.LpStatusNotSolved, pulp.LpSolutionNoSolutionFound  # not used: read from the solver below


def _highs(lp: Any, limits: Limits) -> MilpAnswer:
    lp.solve(
        _Highs(
            msg=False,
            threads=1,
            gapRel=limits.gap,
            gapAbs=0.0,
            timeLimit=limits.seconds,
            random_seed=_SEED,
            primal_feasibility_tolerance=_TOLERANCE,
            dual_feasibility_tolerance=_TOLERANCE,
            mip_feasibility_tolerance=_TOLERANCE,
            small_matrix_value=1e-12,  # the least it allows; smaller coefficients count as zero
        )
    )
    model = lp.solverModel
    status, info = model.getModelStatus(), model.getInfo()
    if status in (highspy.HighsModelStatus.kInfeasible, highspy.HighsModelStatus.kUnboundedOrInfeasible):
        return MilpAnswer(Status.INFEASIBLE, False, math.inf)
    has_point = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
    if status == highspy.HighsModelStatus.kOptimal:
        is_mip = any(v.cat == pulp.LpInteger for v in lp.variables())
        return MilpAnswer(Status.OPTIMAL, True, info.mip_dual_bound if is_mip else info.objective_function_value)
    if status in (highspy.HighsModelStatus.kTimeLimit, highspy.HighsModelStatus.kInterrupt):
        bound = info.mip_dual_bound if math.isfinite(info.mip_dual_bound) else 0.0
        return MilpAnswer(Status.LIMIT, has_point, bound)
    raise TuneError(f"HiGHS stopped with status {model.modelStatusToString(status)}", fix="try --solver cbc")


_CBC_BOUND = re.compile(r"^Lower bound:\s+(\S+)", re.MULTILINE)


def _cbc_path() -> str:
    """PuLP < 4 ships a CBC; an installed one serves as well."""
    bundled = str(pulp.PULP_CBC_CMD.pulp_cbc_path)
    return bundled if Path(bundled).exists() else "cbc"


def _cbc(lp: Any, limits: Limits) -> MilpAnswer:
    with tempfile.TemporaryDirectory(prefix="uniap-cbc-") as folder:
        log = Path(folder) / "cbc.log"
        driver = pulp.COIN_CMD(
            msg=False,
            path=_cbc_path(),
            timeLimit=limits.seconds,
            timeMode="cpu",
            gapRel=limits.gap,
            gapAbs=0.0,
            logPath=str(log),
            options=[
                f"primalTolerance {_TOLERANCE}",
                f"integerTolerance {_TOLERANCE}",
                f"randomCbcSeed {_SEED}",
                "increment 0",
                "preprocess off",  # CBC's own preprocessing has lost optima of small models with skip edges
            ],
        )
        driver.tmpDir = folder
        lp.solve(driver)
        text = log.read_text(errors="replace")
    if lp.sol_status == pulp.LpSolutionOptimal:
        value = float(pulp.value(lp.objective) or 0.0)
        return MilpAnswer(Status.OPTIMAL, True, value * (1 - limits.gap))
    if lp.status == pulp.LpStatusInfeasible:
        return MilpAnswer(Status.INFEASIBLE, False, math.inf)
    match = _CBC_BOUND.search(text)
    bound = float(match.group(1)) if match else 0.0
    return MilpAnswer(Status.LIMIT, lp.sol_status == pulp.LpSolutionIntegerFeasible, bound)
