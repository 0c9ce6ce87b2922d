"""How little memory a problem needs, and which relaxation would make an infeasible job fit."""

from __future__ import annotations

import math

import numpy as np

from uniap_tune.problem import FloatArray, Problem


def least_peak(problem: Problem) -> float:
    """Bytes: the least, over all assignments, of the fullest stage's bytes, for any graph (edges need no memory).

    Exact where one strategy of a layer is leanest both for micro-batches and for the update, else a lower bound.
    For each level of transients, every layer takes its leanest strategy with a transient no larger; a stage then
    needs that sum plus the level. The cut that minimizes the largest stage is a bottleneck dynamic program.
    """
    n = problem.num_layers
    if problem.num_stages > n:
        return math.inf
    levels = sorted({float(w) for table in problem.layers for w in table.transient_bytes})
    need: dict[int, FloatArray] = {}
    for i in range(problem.num_stages):
        flight = problem.in_flight(i)
        if flight not in need:
            each = [_stage_need(problem, flight, level) for level in levels]
            need[flight] = np.minimum.reduce(each)
    reach = np.full(n + 1, np.inf)
    reach[0] = 0.0
    for i in range(problem.num_stages):
        reach = np.maximum(reach[:, None], need[problem.in_flight(i)]).min(axis=0)
    return float(reach[n])


def _stage_need(problem: Problem, flight: int, level: float) -> FloatArray:
    """[n + 1, n + 1] bytes of the stage [a, b) whose transients are at most ``level``."""
    n = problem.num_layers
    leanest = np.empty(n)
    update = np.empty(n)
    for u, table in enumerate(problem.layers):
        usable = table.transient_bytes <= level
        leanest[u] = np.min(table.bytes_in_flight(flight)[usable], initial=np.inf)
        update[u] = np.min(table.update_bytes[usable], initial=np.inf)
    result = np.full((n + 1, n + 1), np.inf)
    for a in range(n):
        running = np.cumsum(leanest[a:]) + level
        result[a, a + 1 :] = np.maximum(running, np.cumsum(update[a:]))
    return result
