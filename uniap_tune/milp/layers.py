"""The MIQP of :mod:`uniap_tune.problem`, linearized exactly, in PuLP: one binary per layer, stage and strategy.

PuLP takes no products of variables, so products become flow (docs/explanation/solver.md proves it exact):

- ``x[u,i,k]`` stands for P[u,i] S[u,k]: one binary for each layer, stage it can reach, and strategy;
- an edge between neighbours carries one unit of flow from the layout of u to the layout of v, inside a stage
  (``y``) or over a link (``z``): on a chain that is a path, so only memory, the maxima and rounding are hard;
- any other edge gets a transport polytope for each stage and link, forced to carry one unit where both ends are.

Everything is scaled to order one and there is no big-M.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pulp

from uniap_tune.chain import solve_chain
from uniap_tune.deadline import Deadline
from uniap_tune.milp.solvers import Limits, MilpAnswer, MilpSolver, lin_sum, solve_model
from uniap_tune.problem import (
    Assignment,
    EdgeTable,
    Problem,
    Solution,
    Status,
    evaluate,
    infeasible,
)

# Memory rows are this much looser than the limit, so that a plan exactly at it survives rounding; what exceeds the
# limit is cut off afterwards.
ROOM = 1 + 1e-9

Var = Any  # pulp.LpVariable; PuLP ships no types
Expr = Any


def solve_layers(problem: Problem, solver: MilpSolver, limits: Limits) -> Solution:
    """Solve the per-layer formulation.

    A plan whose exactly recomputed memory exceeds the limit (possible within a solver's tolerance) is cut off
    and the model is solved again, so that the answer never relies on a tolerance.
    """
    name = str(solver)
    if problem.num_stages > problem.num_layers:
        return infeasible(name)
    known = frame(problem, limits)
    if known.status is not Status.LIMIT:  # settled without a model
        return replace(known, solver=name)
    model = build(problem, known.objective_s)
    while True:
        answer = solve_model(model.lp, solver, limits)
        if answer.status is Status.INFEASIBLE:
            return infeasible(name)
        bound = max(answer.bound * model.time_scale, known.bound_s)
        if not answer.has_point:
            return replace(known, bound_s=min(bound, known.objective_s), solver=name)
        assignment = decode(problem, model)
        value = evaluate(problem, assignment)
        broken = [i for i, size in enumerate(value.stage_bytes) if not problem.fits(size)]
        if not broken:
            return _solution(answer, assignment, value.objective_s, bound, name)
        for i in broken:
            _forbid(problem, model, assignment, i)


def frame(problem: Problem, limits: Limits) -> Solution:
    """What is known before the MILP: a bound and, where it is cheap, a plan. Its status is ``limit`` unless that
    settles the problem.

    Edges need no memory and cost no time when left out: the chain without the other edges decides feasibility and
    bounds the objective from below, and its plan, with all edges charged, bounds it from above. The model is scaled by
    that and leaves out what alone costs more: without it seconds of very different sizes break the solvers down.
    """
    name = ""
    if problem.is_chain:
        return Solution(Status.LIMIT, None, math.inf, 0.0, name)
    edges = tuple(edge for edge in problem.edges if edge.target == edge.source + 1)
    chain = solve_chain(replace(problem, edges=edges), deadline=Deadline.after(limits.seconds))
    if chain.assignment is None:
        return replace(chain, solver=name)
    value = evaluate(problem, chain.assignment).objective_s
    settled = value <= chain.bound_s * (1 + 1e-12)
    status = Status.OPTIMAL if settled else Status.LIMIT
    return Solution(status, chain.assignment, value, min(chain.bound_s, value), name)


def _solution(answer: MilpAnswer, assignment: Assignment, objective: float, bound: float, name: str) -> Solution:
    # A solver's bound may exceed the exactly recomputed objective by its tolerance.
    return Solution(answer.status, assignment, objective, min(bound, objective), name)


@dataclass
class LayerModel:
    """The PuLP model and the handles to read it."""

    lp: Any
    time_scale: float
    known_s: float
    x: dict[tuple[int, int], list[Var]] = field(default_factory=dict)
    stage_terms: dict[int, list[Expr]] = field(default_factory=dict)
    link_terms: dict[int, list[Expr]] = field(default_factory=dict)


def build(problem: Problem, known_s: float = math.inf) -> LayerModel:
    """The model: see the module docstring; rows are added by the functions below.

    ``known_s`` is the objective of a known plan: variables that alone cost more are fixed to zero.
    """
    model = skeleton(problem, known_s, scale_from=problem)
    steps: dict[int, list[Expr]] = {}
    for i in range(problem.num_stages):
        placed = [(t, model.x[u, i]) for u, t in enumerate(problem.layers) if (u, i) in model.x]
        for table, variables in placed:
            model.stage_terms[i] += [
                float(a) / model.time_scale * var for a, var in zip(table.time_s, variables, strict=True) if a
            ]
        steps[i] = [
            float(g) / model.time_scale * var
            for table, variables in placed
            for g, var in zip(table.step_time_s, variables, strict=True)
            if g
        ]
    _memory(problem, model)
    _leading(problem, model)
    objective(problem, model, steps)
    return model


def skeleton(problem: Problem, known_s: float, *, scale_from: Problem) -> LayerModel:
    """Variables of layers, and what depends on places and layouts alone: assignment, order, edges."""
    scale = known_s / (problem.num_stages + problem.num_microbatches - 1)
    model = LayerModel(
        pulp.LpProblem("uniap", pulp.LpMinimize), scale if 0 < scale < math.inf else _time_scale(scale_from), known_s
    )
    for u, table in enumerate(problem.layers):
        alone = problem.num_microbatches * table.time_s + table.step_time_s
        for i in _stages(problem, u):
            model.x[u, i] = [
                pulp.LpVariable(f"x_{u}_{i}_{k}", 0, int(alone[k] <= known_s * ROOM), cat=pulp.LpInteger)
                for k in range(table.num_strategies)
            ]
    for i in range(problem.num_stages):
        model.stage_terms[i], model.link_terms[i] = [], []
    _assignment(problem, model)
    _order(problem, model)
    for edge in problem.chain_edges.values():
        _path(problem, model, edge)
    for number, edge in enumerate(problem.skip_edges):
        _transport(problem, model, edge, number)
    return model


def _time_scale(problem: Problem) -> float:
    """Seconds that make an average layer's fastest time one."""
    fastest = [float(table.time_s.min()) for table in problem.layers]
    scale = sum(fastest) / len(fastest)
    if scale > 0:
        return scale
    largest = max(
        max(float(t.time_s.max() + t.step_time_s.max()) for t in problem.layers),
        max((float(e.reshard_s.max() + e.send_s.max()) for e in problem.edges), default=0.0),
    )
    return largest or 1.0


def _stages(problem: Problem, u: int) -> range:
    """Stages layer u can be on: every stage before and after it has a layer of its own."""
    last = problem.num_stages - 1
    return range(max(0, last - (problem.num_layers - 1 - u)), min(u, last) + 1)


def _assignment(problem: Problem, model: LayerModel) -> None:
    """Every layer is on one stage with one strategy; every stage has a layer."""
    for u in range(problem.num_layers):
        model.lp += lin_sum(var for i in _stages(problem, u) for var in model.x[u, i]) == 1
    for i in range(problem.num_stages):
        model.lp += _on_stage(problem, model, i) >= 1


def _on_stage(problem: Problem, model: LayerModel, i: int) -> Expr:
    return lin_sum(var for u in range(problem.num_layers) for var in model.x.get((u, i), ()))


def _order(problem: Problem, model: LayerModel) -> None:
    """Stages are intervals: the stage never falls along the layers' order. Flow on a neighbour edge implies it."""
    for u in range(problem.num_layers - 1):
        if u in problem.chain_edges:
            continue
        for i in range(problem.num_stages):
            later = lin_sum(var for j in range(i, problem.num_stages) for var in model.x.get((u + 1, j), ()))
            model.lp += later >= lin_sum(var for j in range(i, problem.num_stages) for var in model.x.get((u, j), ()))


def _memory(problem: Problem, model: LayerModel) -> None:
    """Bytes of a stage, as a part of the limit: what is held plus the largest transient, and those of the update."""
    limit = problem.memory_limit_bytes
    transients = any(table.transient_bytes.any() for table in problem.layers)
    updates = any(table.step_bytes.any() for table in problem.layers)
    for i in range(problem.num_stages):
        used: list[Expr] = []
        if transients:
            peak = pulp.LpVariable(f"w_{i}", lowBound=0)
            used.append(peak)
        for u, table in enumerate(problem.layers):
            variables = model.x.get((u, i))
            if variables is None:
                continue
            held = table.bytes_in_flight(problem.in_flight(i))
            used.extend(float(m) / limit * var for m, var in zip(held, variables, strict=True) if m)
            # No strategy that cannot fit alone: it tightens the relaxation and costs nothing.
            alone = np.maximum(held + table.transient_bytes, table.update_bytes)
            for k, var in enumerate(variables):
                if not problem.fits(float(alone[k])):
                    var.upBound = 0
            if transients:
                model.lp += peak >= lin_sum(
                    float(w) / limit * var for w, var in zip(table.transient_bytes, variables, strict=True) if w
                )
        model.lp += lin_sum(used) <= ROOM
        if updates:
            model.lp += (
                lin_sum(
                    float(m) / limit * var
                    for u, table in enumerate(problem.layers)
                    for m, var in zip(table.update_bytes, model.x.get((u, i), ()), strict=False)
                    if m
                )
                <= ROOM
            )


def _leading(problem: Problem, model: LayerModel) -> None:
    """Layer u is leading on its stage unless the counted layer ``count`` places before it shares the stage."""
    rule = problem.leading
    if rule is None:
        return
    counted = [u for u in range(problem.num_layers) if rule.counted[u]]
    for place, u in enumerate(counted):
        before = counted[place - rule.count] if 0 < rule.count <= place else None
        for i in _stages(problem, u):
            marked = lin_sum(v for v, m in zip(model.x[u, i], rule.leading[u], strict=True) if m)
            rest = lin_sum(v for v, m in zip(model.x[u, i], rule.leading[u], strict=True) if not m)
            if rule.count == 0:
                model.lp += marked == 0
            elif before is None:
                model.lp += rest == 0
            else:
                shares = lin_sum(model.x.get((before, i), ()))
                model.lp += rest <= shares
                model.lp += marked + shares <= 1


def _layouts(problem: Problem, u: int) -> list[int]:
    return sorted({int(a) for a in problem.layers[u].layout})


def _with_layout(problem: Problem, model: LayerModel, u: int, i: int, layout: int) -> Expr:
    """1 if layer u is on stage i with this layout."""
    variables = model.x.get((u, i), ())
    return lin_sum(var for var, a in zip(variables, problem.layers[u].layout, strict=False) if a == layout)


def _path(problem: Problem, model: LayerModel, edge: EdgeTable) -> None:
    """One unit of flow between neighbours u and v: inside a stage (y) or to the next one (z)."""
    u, v = edge.source, edge.target
    out: dict[tuple[int, int], list[Var]] = {}
    into: dict[tuple[int, int], list[Var]] = {}
    for i in _stages(problem, u):
        for kind, j, cost, terms in (
            ("y", i, edge.reshard_s, model.stage_terms),
            ("z", i + 1, edge.send_s, model.link_terms),
        ):
            if (v, j) not in model.x:
                continue
            for a in _layouts(problem, u):
                for b in _layouts(problem, v):
                    if problem.num_microbatches * cost[a, b] > model.known_s * ROOM:
                        continue
                    var = pulp.LpVariable(f"{kind}_{u}_{i}_{a}_{b}", lowBound=0)
                    out.setdefault((i, a), []).append(var)
                    into.setdefault((j, b), []).append(var)
                    if cost[a, b]:
                        terms[i].append(float(cost[a, b]) / model.time_scale * var)
    for i in _stages(problem, u):
        for a in _layouts(problem, u):
            model.lp += _with_layout(problem, model, u, i, a) == lin_sum(out.get((i, a), ()))
    for j in _stages(problem, v):
        for b in _layouts(problem, v):
            model.lp += _with_layout(problem, model, v, j, b) == lin_sum(into.get((j, b), ()))


def _transport(problem: Problem, model: LayerModel, edge: EdgeTable, number: int) -> None:
    """Any other edge: inside stage i under P[u,i] + P[v,i] - 1; over link j under "u by j" + "v after j" - 1."""
    last = problem.num_stages - 1
    for i in range(last + 1):
        name = f"t_{number}_{i}"
        _carry(problem, model, edge, name, edge.reshard_s, (range(i, i + 1), range(i, i + 1)), model.stage_terms[i])
        if i < last:
            sides = (range(i + 1), range(i + 1, last + 1))
            _carry(problem, model, edge, f"s{name}", edge.send_s, sides, model.link_terms[i])


def _carry(
    problem: Problem,
    model: LayerModel,
    edge: EdgeTable,
    name: str,
    cost: Any,
    sides: tuple[range, range],
    terms: list[Expr],
) -> None:
    """A transport polytope that must carry one unit when u is on a stage of ``sides[0]`` and v of ``sides[1]``."""
    u, v = edge.source, edge.target
    if not cost.any() or not any((u, i) in model.x for i in sides[0]) or not any((v, i) in model.x for i in sides[1]):
        return
    supply = {a: lin_sum(_with_layout(problem, model, u, i, a) for i in sides[0]) for a in _layouts(problem, u)}
    demand = {b: lin_sum(_with_layout(problem, model, v, i, b) for i in sides[1]) for b in _layouts(problem, v)}
    dear = model.known_s * ROOM / problem.num_microbatches
    flow = {
        (a, b): pulp.LpVariable(f"{name}_{a}_{b}", lowBound=0, upBound=None if cost[a, b] <= dear else 0)
        for a in supply
        for b in demand
    }
    model.lp += lin_sum(flow.values()) >= lin_sum(supply.values()) + lin_sum(demand.values()) - 1
    for a in supply:
        model.lp += lin_sum(flow[a, b] for b in demand) <= supply[a]
    for b in demand:
        model.lp += lin_sum(flow[a, b] for a in supply) <= demand[b]
    terms.extend(float(cost[a, b]) / model.time_scale * var for (a, b), var in flow.items() if cost[a, b])


def objective(problem: Problem, model: LayerModel, steps: Mapping[int, list[Expr]]) -> None:
    """TPI, with T and H the epigraphs of the two maxima; ``steps`` are the once-a-step terms of each stage."""
    slowest = pulp.LpVariable("T", lowBound=0)
    once = pulp.LpVariable("H", lowBound=0)
    total: list[Expr] = [(problem.num_microbatches - 1) * slowest, once]
    for terms in (model.stage_terms, model.link_terms):
        for i in range(problem.num_stages):
            if terms[i]:
                total.extend(terms[i])
                model.lp += slowest >= lin_sum(terms[i])
    for terms_of_stage in steps.values():
        if terms_of_stage:
            model.lp += once >= lin_sum(terms_of_stage)
    model.lp.setObjective(lin_sum(total))


def decode(problem: Problem, model: LayerModel) -> Assignment:
    """The plan of the solver's point: for each layer the largest of its x."""
    stage, strategy = [], []
    for u in range(problem.num_layers):
        best = max(
            ((var.varValue or 0.0, i, k) for i in _stages(problem, u) for k, var in enumerate(model.x[u, i])),
            key=lambda item: item[0],
        )
        stage.append(best[1])
        strategy.append(best[2])
    return Assignment(tuple(stage), tuple(strategy))


def _forbid(problem: Problem, model: LayerModel, assignment: Assignment, i: int) -> None:
    """Cut off one stage's exact choice, which needs more memory than there is."""
    chosen = [model.x[u, i][assignment.strategy[u]] for u in range(problem.num_layers) if assignment.stage[u] == i]
    model.lp += lin_sum(chosen) <= len(chosen) - 1
