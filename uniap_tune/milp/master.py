"""The master problem over stage columns, in PuLP: which column each stage takes.

Every column of :mod:`uniap_tune.columns` (a stage, its layers, its border layouts, its seconds) is a binary; unit flow
through nodes (stage border, layer, layout left in) joins them, and pays for links; T and H are the epigraphs of the two
maxima. For a fixed T the model is a network, hence integral; T is bounded from below by the bottleneck bound, which
leaves a root gap of a fraction of a percent.

    minimize  sum t z + sum R' y + (c - 1) T + H
    T >= sum of t z over stage i,   T >= sum of R' y over link i,   H >= sum of g z over stage i
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import pulp

from uniap_tune.bounds import ChainBounds, chain_bounds
from uniap_tune.chain import budget_columns, heuristic_plan
from uniap_tune.columns import Column
from uniap_tune.deadline import Deadline
from uniap_tune.milp.solvers import Limits, MilpSolver, lin_sum, solve_model
from uniap_tune.problem import Assignment, Problem, Solution, Status, evaluate, infeasible

# Budgets above the bound in which columns are built, until a plan is found among them.
_STEPS = (2e-3, 1e-2, 5e-2, 0.3, math.inf)


def solve_master(
    problem: Problem,
    solver: MilpSolver,
    limits: Limits,
    *,
    cutoff: float = math.inf,
    bounds: ChainBounds | None = None,
) -> Solution:
    """The optimum of a chain by the master problem. ``cutoff`` as in :func:`uniap_tune.chain.solve_chain`."""
    name = str(solver)
    if problem.num_stages > problem.num_layers:
        return infeasible(name)
    bounds = bounds or chain_bounds(problem)
    if math.isinf(bounds.total):
        return infeasible(name)
    deadline = Deadline.after(limits.seconds)
    for step in _STEPS:
        budget = min(bounds.total * (1 + step) if bounds.total > 0 else math.inf, cutoff)
        found = budget_columns(problem, bounds, budget, deadline)
        if found is not None:
            solution = _solve(problem, *found, solver, Limits(limits.gap, _left(limits, deadline)), budget)
            if solution is not None:
                return solution
        if budget >= cutoff or math.isinf(budget):
            break
    if math.isinf(cutoff):
        return infeasible(name)
    return Solution(Status.LIMIT, None, math.inf, max(bounds.total, cutoff), name)


def _left(limits: Limits, deadline: Deadline) -> float | None:
    return None if limits.seconds is None else deadline.left()


def _solve(
    problem: Problem,
    bounds: ChainBounds,
    columns: list[list[Column]],
    solver: MilpSolver,
    limits: Limits,
    budget: float,
) -> Solution | None:
    """The best plan of these columns; ``None`` if none is within the budget (a better one may need other columns)."""
    model = _Master(problem, bounds, columns)
    answer = solve_model(model.lp, solver, limits)
    if answer.status is Status.INFEASIBLE:
        return None
    bound = answer.bound * model.scale
    if not answer.has_point:
        plan = heuristic_plan(problem, bounds, bounds)
        value = math.inf if plan is None else evaluate(problem, plan).objective_s
        return Solution(Status.LIMIT, plan, value, min(max(bound, bounds.total), value), str(solver))
    assignment = model.decode()
    value = evaluate(problem, assignment).objective_s
    if value > budget * (1 + 1e-9):
        return None
    return Solution(answer.status, assignment, value, min(bound, value), str(solver))


def _largest(problem: Problem, columns: list[list[Column]]) -> float:
    """Seconds of the slowest column or link: the scale where the bound is zero."""
    stages = [float(max(column.t.max(), column.g.max())) for stage in columns for column in stage]
    return max([*stages, *(float(edge.send_s.max()) for edge in problem.chain_edges.values())])


class _Master:
    """The PuLP model of one set of columns."""

    def __init__(self, problem: Problem, bounds: ChainBounds, columns: list[list[Column]]) -> None:
        self.problem = problem
        self.columns = columns
        self.lp = pulp.LpProblem("master", pulp.LpMinimize)
        average = bounds.total / (problem.num_stages + problem.num_microbatches - 1)
        self.scale = average or _largest(problem, columns) or 1.0
        self.z: dict[tuple[int, int, int], Any] = {}
        self.total: list[Any] = []
        self.slowest = pulp.LpVariable("T", lowBound=bounds.slowest / self.scale)
        self.once = pulp.LpVariable("H", lowBound=bounds.once / self.scale)
        out: list[dict[tuple[int, int], list[Any]]] = []
        into: list[dict[tuple[int, int], list[Any]]] = []
        for i, stage in enumerate(columns):
            leaving, entering = self._stage(i, stage)
            out.append(leaving)
            into.append(entering)
        for i in range(len(columns) - 1):
            self._link(i, out[i], into[i + 1])
        self.lp += lin_sum(v for v in self._ends(into[0], 0)) == 1
        self.lp += lin_sum(v for v in self._ends(out[-1], problem.num_layers)) == 1
        c = problem.num_microbatches
        self.lp.setObjective(lin_sum([*self.total, (c - 1) * self.slowest, self.once]))

    @staticmethod
    def _ends(nodes: dict[tuple[int, int], list[Any]], layer: int) -> list[Any]:
        return [v for (border, _), variables in nodes.items() if border == layer for v in variables]

    def _stage(
        self, i: int, stage: list[Column]
    ) -> tuple[dict[tuple[int, int], list[Any]], dict[tuple[int, int], list[Any]]]:
        """Binaries of a stage's columns, by the nodes they leave to and come from; the stage's rows of T and H."""
        leaving, entering = defaultdict(list), defaultdict(list)
        time, step = [], []
        for number, column in enumerate(stage):
            for label in range(len(column.t)):
                variable = pulp.LpVariable(f"z_{i}_{number}_{label}", cat=pulp.LpBinary)
                self.z[i, number, label] = variable
                leaving[column.last, int(column.exit[label])].append(variable)
                entering[column.first, int(column.entry[label])].append(variable)
                time.append(float(column.t[label]) / self.scale * variable)
                step.append(float(column.g[label]) / self.scale * variable)
        self.total.extend(time)
        self.lp += lin_sum(self.z[i, n, k] for n, col in enumerate(stage) for k in range(len(col.t))) == 1
        self.lp += self.slowest >= lin_sum(time)
        self.lp += self.once >= lin_sum(step)
        return leaving, entering

    def _link(
        self, i: int, leaving: dict[tuple[int, int], list[Any]], entering: dict[tuple[int, int], list[Any]]
    ) -> None:
        """Flow from the layout a stage leaves in to the one the next enters in, at every border between them."""
        cost: list[Any] = []
        flow: dict[tuple[int, int, int], Any] = {}
        for b, left in leaving:
            edge = self.problem.chain_edges.get(b - 1)
            for other, entered in entering:
                if other == b:
                    flow[b, left, entered] = pulp.LpVariable(f"y_{i}_{b}_{left}_{entered}", lowBound=0)
                    if edge is not None and edge.send_s[left, entered]:
                        cost.append(float(edge.send_s[left, entered]) / self.scale * flow[b, left, entered])
        for (b, left), variables in leaving.items():
            arcs = [v for (at, a, _), v in flow.items() if (at, a) == (b, left)]
            self.lp += lin_sum(variables) == lin_sum(arcs)
        for (b, entered), variables in entering.items():
            arcs = [v for (at, _, a), v in flow.items() if (at, a) == (b, entered)]
            self.lp += lin_sum(variables) == lin_sum(arcs)
        if cost:
            self.total.extend(cost)
            self.lp += self.slowest >= lin_sum(cost)

    def decode(self) -> Assignment:
        """The plan of the solver's point: of each stage the column with the largest z."""
        stage: list[int] = []
        strategy: list[int] = []
        for i, columns in enumerate(self.columns):
            place = max(
                ((n, k) for n, column in enumerate(columns) for k in range(len(column.t))),
                key=lambda at, i=i: self.z[i, *at].varValue or 0.0,  # type: ignore[misc]
            )
            column = columns[place[0]]
            chosen = column.node.strategies(int(column.index[place[1]]))
            strategy += chosen
            stage += [i] * len(chosen)
        return Assignment(tuple(stage), tuple(strategy))
