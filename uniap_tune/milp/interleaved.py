r"""The MILP of an interleaved pipeline (:mod:`uniap_tune.interleave`): which layers each of its v N intervals holds.

A binary y[s,a,b] for each interval s and each run of layers [a, b) it may hold; they form a path from layer 0 to n:

    minimize  sum t y / v + (c - 1/v) T + H
    sum_b y[s,a,b] = sum_b y[s-1,b,a]                  for every s and a
    T >= sum of t y,  H >= sum of g y                  over the intervals of every stage
    sum of m y + W_i <= memory limit,  W_i >= w y      likewise, for every interval; and for the update without W_i
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import pulp

from uniap_tune.interleave import is_even, plain_seconds, strategy_at, use_of
from uniap_tune.milp.solvers import Limits, MilpSolver, lin_sum, solve_model
from uniap_tune.problem import Assignment, Problem, Solution, Status, evaluate, infeasible


@dataclass(frozen=True, slots=True)
class _Run:
    """Layers [first, last) as an interval: seconds and bytes (``held``: states and activations in flight)."""

    interval: int
    first: int
    last: int
    time_s: float
    step_s: float
    held: float
    transient: float
    update: float


def solve_intervals(problem: Problem, solver: MilpSolver, limits: Limits) -> Solution:
    """The optimum of an interleaved chain by MILP, for layers of any kind."""
    name = str(solver)
    runs = _runs(problem)
    if not runs:
        return infeasible(name)
    model = _Model(problem, runs)
    answer = solve_model(model.lp, solver, limits)
    if answer.status is Status.INFEASIBLE:
        return infeasible(name)
    bound = answer.bound * model.scale + model.links
    if not answer.has_point:
        return Solution(Status.LIMIT, None, math.inf, bound, name)
    assignment = model.assignment()
    value = evaluate(problem, assignment)
    if not all(problem.fits(size) for size in value.stage_bytes):  # the solver's tolerance let a stage overflow
        return Solution(Status.LIMIT, None, math.inf, bound, name)
    return Solution(answer.status, assignment, value.objective_s, min(bound, value.objective_s), name)


def _runs(problem: Problem) -> list[_Run]:
    """All runs of allowed length on some path from layer 0 to n."""
    n, count = problem.num_layers, problem.num_intervals
    upto = [0.0, *accumulate(plain_seconds(problem))]
    mean = upto[n] / count
    starts = {0}
    by_interval: list[list[tuple[int, int]]] = []
    for s in range(count):
        found = [
            (first, last)
            for first in sorted(starts)
            for last in range(first + 1, n + 1 if s == count - 1 else n)
            if (s < count - 1 or last == n) and _is_allowed(problem, upto, mean, first, last)
        ]
        by_interval.append(found)
        starts = {last for _, last in found}
    needed = {n}
    for s in range(count - 1, -1, -1):  # forget runs from which the end is not reached
        by_interval[s] = [(first, last) for first, last in by_interval[s] if last in needed]
        needed = {first for first, _ in by_interval[s]}
    return [_run(problem, s, first, last) for s, runs in enumerate(by_interval) for first, last in runs]


def _is_allowed(problem: Problem, upto: Sequence[float], mean: float, first: int, last: int) -> bool:
    inner = last - first - (first == 0) - (last == problem.num_layers)
    return is_even(problem, upto[last] - upto[first], mean, inner)


def _run(problem: Problem, s: int, first: int, last: int) -> _Run:
    uses = [use_of(problem.layers[u], strategy_at(problem, u, first)) for u in range(first, last)]
    flight = problem.in_flight(s)
    inside = 0.0
    for u in range(first, last - 1):
        edge = problem.chain_edges.get(u)
        if edge is not None:
            a = problem.layers[u].layout[strategy_at(problem, u, first)]
            b = problem.layers[u + 1].layout[strategy_at(problem, u + 1, first)]
            inside += float(edge.reshard_s[a, b])
    return _Run(
        s, first, last,
        sum(use.time_s for use in uses) + inside,
        sum(use.step_s for use in uses),
        sum(use.static + flight * use.microbatch for use in uses),
        max(use.transient for use in uses),
        sum(use.static + use.step_bytes for use in uses),
    )  # fmt: skip


class _Model:
    """The PuLP model, scaled to seconds and memory of order one."""

    def __init__(self, problem: Problem, runs: list[_Run]) -> None:
        self.problem, self.runs = problem, runs
        self.scale = sum(float(t.time_s.max() + t.step_time_s.max()) for t in problem.layers) or 1.0
        self.links = self._link_seconds()
        self.lp = pulp.LpProblem("interleaved", pulp.LpMinimize)
        self.y = [pulp.LpVariable(f"y_{r.interval}_{r.first}_{r.last}", cat=pulp.LpBinary) for r in runs]
        slowest, once = pulp.LpVariable("T", lowBound=0), pulp.LpVariable("H", lowBound=0)
        v, c = problem.virtual_stages, problem.num_microbatches
        total = lin_sum(r.time_s / self.scale / v * y for r, y in zip(runs, self.y, strict=True))
        self.lp += total + (c - 1 / v) * slowest + once
        self._path()
        for i in range(problem.num_stages):
            self._stage(i, slowest, once)

    def _link_seconds(self) -> float:
        """Links are crossed once each in the ramp; with one layout for all layers that is a constant.

        Raises:
            ValueError: borders differ.
        """
        found = {
            float(edge.send_s[a, b])
            for edge in self.problem.edges
            for a in self.problem.layers[edge.source].layout
            for b in self.problem.layers[edge.target].layout
        }
        if len(found) > 1 or (found and len(self.problem.edges) < self.problem.num_layers - 1):
            raise ValueError("interleaving takes equal borders")
        return (self.problem.num_stages - 1) * (found.pop() if found else 0.0)

    def _path(self) -> None:
        into = defaultdict(list)
        out = defaultdict(list)
        for r, y in zip(self.runs, self.y, strict=True):
            out[r.interval, r.first].append(y)
            into[r.interval + 1, r.last].append(y)
        self.lp += lin_sum(out[0, 0]) == 1
        last = (self.problem.num_intervals, self.problem.num_layers)
        for node in sorted({*into, *out} - {(0, 0), last}):
            self.lp += lin_sum(into[node]) == lin_sum(out[node])

    def _stage(self, i: int, slowest: pulp.LpVariable, once: pulp.LpVariable) -> None:
        limit = self.problem.memory_limit_bytes
        own = [(r, y) for r, y in zip(self.runs, self.y, strict=True) if r.interval % self.problem.num_stages == i]
        self.lp += slowest >= lin_sum(r.time_s / self.scale * y for r, y in own)
        self.lp += once >= lin_sum(r.step_s / self.scale * y for r, y in own)
        transient = pulp.LpVariable(f"W_{i}", lowBound=0)
        for s in range(i, self.problem.num_intervals, self.problem.num_stages):
            self.lp += transient >= lin_sum(r.transient / limit * y for r, y in own if r.interval == s)
        self.lp += lin_sum(r.held / limit * y for r, y in own) + transient <= 1
        self.lp += lin_sum(r.update / limit * y for r, y in own) <= 1

    def assignment(self) -> Assignment:
        """The cut of the solver's point."""
        chosen = [r for r, y in zip(self.runs, self.y, strict=True) if (y.varValue or 0.0) > 0.5]
        stage = [0] * self.problem.num_layers
        strategy = [0] * self.problem.num_layers
        for r in chosen:
            for u in range(r.first, r.last):
                stage[u] = r.interval
                strategy[u] = strategy_at(self.problem, u, r.first)
        return Assignment(tuple(stage), tuple(strategy))
