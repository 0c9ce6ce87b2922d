"""The exact solver for chains: bounds, stage columns, and a search over budgets.

A round takes a *budget* B on the TPI, builds the columns of every interval whose bound is under B, and finds the
best plan over them. It either returns the optimum (every plan better than B is made of those columns) or proves
that no plan is under B. The closer B is to the optimum, the fewer labels survive, so budgets grow geometrically from
the lower bound in rounds that keep only a beam of labels, until one finds a plan: its TPI is the budget of the one
exact round. An incumbent from elsewhere caps every budget.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from uniap_tune.bounds import ChainBounds, chain_bounds, combine, tighten
from uniap_tune.columns import BUDGET_SLACK, Column, ColumnBuilder
from uniap_tune.deadline import Deadline, DeadlineError
from uniap_tune.pareto import pareto
from uniap_tune.problem import (
    Assignment,
    BoolArray,
    FloatArray,
    IntArray,
    Problem,
    Solution,
    Status,
    evaluate,
    infeasible,
)

SOLVER = "columns"
_FIRST_STEP = 5e-4  # the first budget is this far above the lower bound
_STEP_GROWTH = 3.0
_LAST_STEP = 0.5  # beyond it the budget is infinite
_BEAM = 64
_BISECTIONS = 10  # of the bound of an interrupted search: to a thousandth of its gap
# Bounds made exact before the labels of an exact round: on seconds alone, and with the mean of once-a-step seconds.
_EXACT_WEIGHTS = (0, 3)


def solve_chain(
    problem: Problem,
    *,
    cutoff: float = math.inf,
    deadline: Deadline | None = None,
    bounds: ChainBounds | None = None,
) -> Solution:
    """The optimum of a chain.

    Args:
        cutoff: seconds; a plan with a TPI above it is of no interest. If there is none below, the answer is
            ``limit`` without an assignment and ``bound_s >= cutoff``.
        deadline: when to stop with what there is.
        bounds: ``chain_bounds(problem)`` if it is known already.

    Raises:
        ValueError: if the problem is no chain.
    """
    if not problem.is_chain:
        raise ValueError("solve_chain: the graph has skip edges; use the per-layer formulation")
    deadline = deadline or Deadline()
    if problem.num_stages > problem.num_layers:
        return infeasible(SOLVER)
    bounds = bounds or chain_bounds(problem)
    if math.isinf(bounds.total):
        return infeasible(SOLVER)
    best = _Incumbent(problem)
    try:
        _first_plan(problem, bounds, best, cutoff, deadline)
        budget = min(best.value, cutoff)
        best.offer(_round(problem, bounds, budget, deadline))
    except DeadlineError:
        if best.plan is None:
            best.offer(heuristic_plan(problem, bounds, bounds))
        return Solution(Status.LIMIT, best.plan, best.value, _proven(problem, bounds, best.value), SOLVER)
    # a plan above the cutoff was found, but nothing is proven of it
    if best.plan is not None and best.value <= budget * (1 + BUDGET_SLACK):
        return Solution(Status.OPTIMAL, best.plan, best.value, best.value, SOLVER)
    if math.isinf(budget):
        return infeasible(SOLVER)
    return Solution(Status.LIMIT, None, math.inf, max(bounds.total, budget), SOLVER)


class _Incumbent:
    """The best plan so far, if any."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.plan: Assignment | None = None
        self.value = math.inf

    def offer(self, plan: Assignment | None) -> None:
        """Keep a plan if it is better."""
        value = math.inf if plan is None else evaluate(self.problem, plan).objective_s
        if value < self.value:
            self.plan, self.value = plan, value


def _proven(problem: Problem, bounds: ChainBounds, value: float) -> float:
    """The largest budget below ``value``, by bisection, that the bounds alone prove to hold no plan."""
    low, high = bounds.total, value
    if math.isinf(high):
        return low
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if tighten(problem, bounds, middle) is None:
            low = middle
        else:
            high = middle
    return low


def _first_plan(problem: Problem, bounds: ChainBounds, best: _Incumbent, cutoff: float, deadline: Deadline) -> None:
    """Look for a plan close to the bound: cuts that the bounds suggest, then beams within growing budgets."""
    step = _FIRST_STEP
    while step <= _LAST_STEP and bounds.total > 0:
        budget = min(bounds.total * (1 + step), cutoff, best.value)
        narrowed = tighten(problem, bounds, budget * (1 + BUDGET_SLACK))
        if narrowed is not None:
            if best.plan is None:
                best.offer(heuristic_plan(problem, bounds, narrowed))
            plan = _round(problem, bounds, budget, deadline, beam=_BEAM)
            if plan is not None:
                best.offer(plan)
                return
        if budget >= min(cutoff, best.value):
            return
        step *= _STEP_GROWTH


def heuristic_plan(problem: Problem, bounds: ChainBounds, narrowed: ChainBounds) -> Assignment | None:
    """A plan without proof: the cuts of the shortest path of ``narrowed``, strategies by a beam, if that fits."""
    cuts = _bound_cuts(narrowed)
    allowed = []
    for i in range(problem.num_stages):
        mask = np.zeros_like(bounds.stages[i].lower[0], dtype=np.bool_)
        mask[cuts[i], cuts[i + 1]] = True
        allowed.append(mask)
    columns = ColumnBuilder(problem, bounds).build(allowed, math.inf, Deadline(), beam=_BEAM)
    return best_over(problem, bounds, columns, math.inf, Deadline())


def _round(
    problem: Problem, bounds: ChainBounds, budget: float, deadline: Deadline, beam: int | None = None
) -> Assignment | None:
    """The best plan within a budget; with a beam, a good one or none."""
    found = budget_columns(problem, bounds, budget, deadline, beam)
    return None if found is None else best_over(problem, found[0], found[1], budget, deadline)


def budget_columns(
    problem: Problem, bounds: ChainBounds, budget: float, deadline: Deadline, beam: int | None = None
) -> tuple[ChainBounds, list[list[Column]]] | None:
    """All columns that plans with TPI <= budget can be made of, and the bounds of such plans; ``None`` if none is.

    Where once-a-step times make labels many, the exact least seconds of every interval come first, from labels that
    carry one number of seconds; they tighten the bounds that keep the full labels few.
    """
    narrowed = tighten(problem, bounds, budget * (1 + BUDGET_SLACK))
    if narrowed is None:
        return None
    if beam is None and len(bounds.weights) > 1 and problem.num_stages > 1:
        for weight in _EXACT_WEIGHTS:
            refined = _refine(problem, narrowed, budget, deadline, weight)
            if refined is None:
                return None
            narrowed = refined
    columns = ColumnBuilder(problem, narrowed).build(_allowed(problem, narrowed, budget), budget, deadline, beam)
    return (narrowed, columns) if all(columns) else None


def _allowed(problem: Problem, bounds: ChainBounds, budget: float) -> list[BoolArray]:
    allowed = []
    for i in range(problem.num_stages):
        through = bounds.through(i, problem.num_microbatches)
        allowed.append(np.isfinite(through) & (through <= budget * (1 + BUDGET_SLACK)))
    return allowed


def _refine(
    problem: Problem, bounds: ChainBounds, budget: float, deadline: Deadline, weight: int
) -> ChainBounds | None:
    """Replace one kind of bound on the stages by its exact value, and tighten."""
    builder = ColumnBuilder(problem, bounds, scalar=weight)
    columns = builder.build(_allowed(problem, bounds, budget), budget, deadline)
    stages = []
    for stage, found in zip(bounds.stages, columns, strict=True):
        exact = np.full_like(stage.lower[weight], np.inf)
        for column in found:
            least = float((column.t + bounds.weights[weight] * column.g).min())
            exact[column.first, column.last] = least * (1 - BUDGET_SLACK)
        lower = stage.lower.copy()
        lower[weight] = np.maximum(lower[weight], exact)
        stages.append(replace(stage, lower=np.where(np.isfinite(exact)[None], lower, np.inf)))
    return tighten(problem, combine(problem, bounds.weights, stages), budget * (1 + BUDGET_SLACK))


def _bound_cuts(bounds: ChainBounds) -> list[int]:
    """First layer of each stage (and the end) along the shortest path of the bounds."""
    n = bounds.backward.shape[-1] - 1
    cuts = [0]
    for i in range(len(bounds.stages)):
        lower = bounds.stages[i].lower[0][cuts[-1]]
        after = bounds.backward[0, i + 1] + (bounds.link if i + 1 < len(bounds.stages) else 0.0)
        # the bound on the slowest stage decides between equal sums, so that cuts come out balanced
        score = lower + after
        if len(bounds.stages) > 1:
            score += n * np.maximum(lower - bounds.slowest, 0.0)
        cuts.append(int(np.argmin(score)))
    return cuts


# -- the joint choice of columns ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, slots=True)
class _States:
    """Partial plans that end before one layer: sum, slowest, once-a-step seconds and the layout class left in."""

    total: FloatArray
    slowest: FloatArray
    once: FloatArray
    leave: IntArray
    parent: IntArray  # index into the states of ``came_from``
    came_from: IntArray  # first layer of the stage
    column: IntArray  # index of the column among the stage's
    label: IntArray  # index within the column

    def __len__(self) -> int:
        return len(self.total)

    def take(self, index: IntArray | BoolArray) -> _States:
        return _States(*(getattr(self, name)[index] for name in self.__slots__))


def best_over(
    problem: Problem, bounds: ChainBounds, columns: list[list[Column]], budget: float, deadline: Deadline
) -> Assignment | None:
    """The best plan made of these columns with TPI <= budget, ``None`` if there is none.

    Label setting over stages on (sum, slowest, once a step); the two maxima are clamped to their lower bounds,
    below which they cannot matter.
    """
    c = problem.num_microbatches
    rest = _rest(problem, columns)
    one, zero = np.zeros(1), np.zeros(1, dtype=np.int64)
    start = _States(one, one + bounds.slowest, one + bounds.once, zero, zero, zero, zero, zero)
    levels: list[dict[int, _States]] = [{0: start}]
    for i, stage_columns in enumerate(columns):
        deadline.check()
        into: dict[int, list[_States]] = {}
        for index, column in enumerate(stage_columns):
            states = levels[-1].get(column.first)
            if states is not None and len(states):
                into.setdefault(column.last, []).append(_join(problem, states, column, index))
        level: dict[int, _States] = {}
        for b, parts in into.items():
            states = _concatenate(parts)
            value = states.total + (c - 1) * states.slowest + states.once + rest[i + 1][b]
            states = states.take(value <= budget * (1 + BUDGET_SLACK))
            criteria = np.stack([states.total, states.slowest, states.once], axis=1)
            level[b] = states.take(pareto(criteria, states.leave))
        levels.append(level)
    final = levels[-1].get(problem.num_layers)
    if final is None or not len(final):
        return None
    value = final.total + (c - 1) * final.slowest + final.once
    return _trace(problem, columns, levels, int(np.argmin(value)))


def _rest(problem: Problem, columns: list[list[Column]]) -> list[FloatArray]:
    """[N + 1][n + 1] least seconds of all that follows, from the columns themselves."""
    n = problem.num_layers
    link = np.zeros(n + 1)
    for u, edge in problem.chain_edges.items():
        link[u + 1] = edge.send_s.min()
    rest = [np.full(n + 1, np.inf) for _ in range(len(columns) + 1)]
    rest[-1][n] = 0.0
    for i in range(len(columns) - 1, -1, -1):
        for column in columns[i]:
            after = rest[i + 1][column.last] + link[column.last]
            rest[i][column.first] = min(rest[i][column.first], float(column.t.min()) + after)
    return [r + (link if 0 < i < len(columns) else 0.0) for i, r in enumerate(rest)]


def _join(problem: Problem, states: _States, column: Column, index: int) -> _States:
    """Every state with every label of a column behind it."""
    edge = problem.chain_edges.get(column.first - 1)
    send = edge.send_s[states.leave[:, None], column.entry[None, :]] if edge is not None else np.zeros((1, 1))
    send = np.broadcast_to(send, (len(states), len(column.t)))
    rows, labels = np.divmod(np.arange(send.size), len(column.t))
    return _States(
        (states.total[:, None] + send + column.t[None, :]).ravel(),
        np.maximum(states.slowest[:, None], np.maximum(send, column.t[None, :])).ravel(),
        np.maximum(states.once[:, None], column.g[None, :]).ravel(),
        column.exit[labels],
        rows,
        np.full(send.size, column.first),
        np.full(send.size, index),
        labels,
    )


def _concatenate(parts: list[_States]) -> _States:
    if len(parts) == 1:
        return parts[0]
    return _States(*(np.concatenate([getattr(p, name) for p in parts]) for name in _States.__slots__))


def _trace(problem: Problem, columns: list[list[Column]], levels: list[dict[int, _States]], index: int) -> Assignment:
    stage: list[int] = []
    strategy: list[int] = []
    b = problem.num_layers
    for i in range(problem.num_stages - 1, -1, -1):
        states = levels[i + 1][b]
        column = columns[i][int(states.column[index])]
        chosen = column.node.strategies(int(column.index[states.label[index]]))
        strategy = chosen + strategy
        stage = [i] * len(chosen) + stage
        index, b = int(states.parent[index]), int(states.came_from[index])
    return Assignment(tuple(stage), tuple(strategy))
