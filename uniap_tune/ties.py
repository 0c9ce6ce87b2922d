"""Among plans of equal objective, the simplest: a second pass over an optimal assignment."""

from __future__ import annotations

from dataclasses import replace

from uniap_tune.problem import Assignment, Problem, evaluate, is_valid

# Objectives within this relative distance are equal.
_TIE = 1e-9


def simplify(problem: Problem, assignment: Assignment) -> Assignment:
    """Replace strategies by earlier (simpler) ones wherever the objective stays the same and memory allows.

    Strategies of a layer must be sorted simplest first. Within a run of equal layers on one stage with one layout,
    strategies are then put in order, which changes nothing but how the plan reads.
    """
    best = evaluate(problem, assignment).objective_s
    for u, table in enumerate(problem.layers):
        k = assignment.strategy[u]
        for simpler in range(k):
            same_layout = table.layout[simpler] == table.layout[k]
            if not same_layout or table.time_s[simpler] > table.time_s[k] * (1 + _TIE):
                continue
            trial = _with(assignment, u, simpler)
            value = evaluate(problem, trial)
            fits = all(problem.fits(size) for size in value.stage_bytes)
            if fits and value.objective_s <= best * (1 + _TIE) and is_valid(problem, trial):
                assignment = trial
                break
    return assignment if problem.leading is not None else _ordered(problem, assignment)


def _with(assignment: Assignment, u: int, k: int) -> Assignment:
    strategy = assignment.strategy
    return replace(assignment, strategy=(*strategy[:u], k, *strategy[u + 1 :]))


def _ordered(problem: Problem, assignment: Assignment) -> Assignment:
    strategy = list(assignment.strategy)
    start = 0
    for u in range(1, len(strategy) + 1):
        if u < len(strategy) and _same_run(problem, assignment, start, u):
            continue
        strategy[start:u] = sorted(strategy[start:u])
        start = u
    return replace(assignment, strategy=tuple(strategy))


def _same_run(problem: Problem, assignment: Assignment, u: int, v: int) -> bool:
    """Whether layers u and v may swap strategies: equal, on one stage, with one layout, chained only in a row."""
    if not problem.is_chain or problem.layers[u] is not problem.layers[v]:
        return False
    layout = problem.layers[u].layout
    same = layout[assignment.strategy[u]] == layout[assignment.strategy[v]]
    return bool(same) and assignment.stage[u] == assignment.stage[v]
