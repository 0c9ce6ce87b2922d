"""The MIQP with equal layers aggregated: how many of them use each strategy on each stage, not which.

Layers keep what their place decides: their stage and their *layout* (one binary for each layer, stage and layout,
joined by the flow of :mod:`.layers`, which pays for re-sharding and links). Everything else is counted: an integer for
each stage, type of layer and strategy, with

    sum over k with layout a of n[i,t,k]  =  number of layers of type t on stage i with layout a.

This is exact on any graph, without a condition on re-sharding. Layers of one type have one table, so that time, memory
and once-a-step time of a stage depend on the counts alone; re-sharding and sending depend on layouts alone. Every
assignment gives such a point, and of every such point any way to hand out the counted strategies to the layers of their
type and layout on their stage is an assignment of the same cost. Only a rule on places inside a stage (block
recomputation) breaks it: those problems are solved per layer.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import pulp

from uniap_tune.milp.layers import ROOM, LayerModel, decode, frame, objective, skeleton, solve_layers
from uniap_tune.milp.solvers import Limits, MilpSolver, lin_sum, solve_model
from uniap_tune.problem import Assignment, LayerTable, Problem, Solution, Status, evaluate, infeasible

Counts = dict[tuple[int, int], list[Any]]  # (stage, id of the table) -> a variable for each strategy


def solve_counts(problem: Problem, solver: MilpSolver, limits: Limits) -> Solution:
    """Solve the aggregated formulation; as :func:`uniap_tune.milp.layers.solve_layers`."""
    name = str(solver)
    if problem.leading is not None:
        return solve_layers(problem, solver, limits)
    if problem.num_stages > problem.num_layers:
        return infeasible(name)
    known = frame(problem, limits)
    if known.status is not Status.LIMIT:
        return replace(known, solver=name)
    model, layouts, counts = _build(problem, known.objective_s)
    answer = solve_model(model.lp, solver, limits)
    if answer.status is Status.INFEASIBLE:
        return infeasible(name)
    bound = max(answer.bound * model.time_scale, known.bound_s)
    if not answer.has_point:
        return replace(known, bound_s=min(bound, known.objective_s), solver=name)
    assignment = _hand_out(problem, layouts, decode(layouts, model), counts)
    value = evaluate(problem, assignment)
    if not all(problem.fits(size) for size in value.stage_bytes):
        return solve_layers(problem, solver, limits)  # within the solver's tolerance of the limit: decided per layer
    return Solution(answer.status, assignment, value.objective_s, min(bound, value.objective_s), name)


def _build(problem: Problem, known_s: float) -> tuple[LayerModel, Problem, Counts]:
    """The model, the problem of layouts that its skeleton is made of, and the counts."""
    tables = {id(t): _layouts_only(t) for t in problem.layers}
    layouts = replace(problem, layers=tuple(tables[id(t)] for t in problem.layers))
    model = skeleton(layouts, known_s, scale_from=problem)
    types = {id(t): t for t in problem.layers}
    sizes = Counter(id(t) for t in problem.layers)
    counts: Counts = {}
    steps: dict[int, list[Any]] = defaultdict(list)
    for i in range(problem.num_stages):
        for number, (key, table) in enumerate(types.items()):
            members = [u for u, t in enumerate(problem.layers) if id(t) == key and (u, i) in model.x]
            if not members:
                continue
            most = min(sizes[key], len(members))
            counts[i, key] = [
                pulp.LpVariable(f"n_{i}_{number}_{k}", 0, most, cat=pulp.LpInteger) for k in range(table.num_strategies)
            ]
            for place, layout in enumerate(tables[key].layout):
                counted = lin_sum(n for n, a in zip(counts[i, key], table.layout, strict=True) if a == layout)
                model.lp += counted == lin_sum(model.x[u, i][place] for u in members)
            scale = model.time_scale
            model.stage_terms[i] += [
                float(a) / scale * n for a, n in zip(table.time_s, counts[i, key], strict=True) if a
            ]
            steps[i] += [float(g) / scale * n for g, n in zip(table.step_time_s, counts[i, key], strict=True) if g]
        _memory(problem, model, counts, i, sizes)
    objective(problem, model, steps)
    return model, layouts, counts


def _layouts_only(table: LayerTable) -> LayerTable:
    """A table with one free strategy for each layout."""
    used = np.unique(table.layout)
    zero = np.zeros(len(used))
    return LayerTable(used, zero, zero, zero, zero, zero, zero)


def _memory(problem: Problem, model: LayerModel, counts: Counts, i: int, sizes: Counter[int]) -> None:
    """Bytes of stage i, as parts of the limit. A transient is paid for as soon as one layer has it."""
    limit = problem.memory_limit_bytes
    used: list[Any] = []
    update: list[Any] = []
    peak = pulp.LpVariable(f"w_{i}", lowBound=0)
    for table in {id(t): t for t in problem.layers}.values():
        variables = counts.get((i, id(table)))
        if variables is None:
            continue
        held = table.bytes_in_flight(problem.in_flight(i))
        used += [float(m) / limit * n for m, n in zip(held, variables, strict=True) if m]
        update += [float(m) / limit * n for m, n in zip(table.update_bytes, variables, strict=True) if m]
        alone = np.maximum(held + table.transient_bytes, table.update_bytes)
        for k, n in enumerate(variables):
            if not problem.fits(float(alone[k])):
                n.upBound = 0
            elif table.transient_bytes[k]:
                some = pulp.LpVariable(f"u_{n.name}", cat=pulp.LpBinary)
                model.lp += n <= sizes[id(table)] * some
                model.lp += peak >= float(table.transient_bytes[k]) / limit * some
    model.lp += lin_sum([*used, peak]) <= ROOM
    model.lp += lin_sum(update) <= ROOM


def _hand_out(problem: Problem, layouts: Problem, chosen: Assignment, counts: Counts) -> Assignment:
    """Give the counted strategies to the layers of their type and layout on their stage, in order."""
    left: dict[tuple[int, int, int], list[int]] = defaultdict(list)
    for (i, key), variables in counts.items():
        table = next(t for t in problem.layers if id(t) == key)
        for k, n in enumerate(variables):
            left[i, key, int(table.layout[k])] += [k] * round(n.varValue or 0.0)
    strategy = []
    for u, table in enumerate(problem.layers):
        layout = int(layouts.layers[u].layout[chosen.strategy[u]])
        strategy.append(left[chosen.stage[u], id(table), layout].pop(0))
    return Assignment(chosen.stage, tuple(strategy))
