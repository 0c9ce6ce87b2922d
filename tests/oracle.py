"""Brute force over every assignment, and random small problems for it. Shares nothing with the solvers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache

import numpy as np
from hypothesis import strategies as st

from uniap_tune.problem import EdgeTable, LayerTable, LeadingRule, Problem, Schedule


def partitions(n: int, parts: int) -> Iterator[list[int]]:
    """The stage of each of n layers, for every cut into ``parts`` non-empty intervals."""
    for cuts in itertools.combinations(range(1, n), parts - 1):
        yield [sum(u >= cut for cut in cuts) for u in range(n)]


def cost(problem: Problem, stage: list[int], choice: tuple[int, ...]) -> float:
    """The objective by its definition, ``inf`` where memory or the leading rule is broken."""
    n, parts, c, v = len(problem.layers), problem.num_stages, problem.num_microbatches, problem.virtual_stages
    p, g, held, spike, o = [0.0] * parts, [0.0] * parts, [0.0] * parts, [0.0] * parts, [0.0] * (parts - 1)
    update = [0.0] * parts
    seen = [0] * (parts * v)
    for u in range(n):
        t, k, i = problem.layers[u], choice[u], stage[u] % parts
        flying = c if problem.schedule is Schedule.GPIPE else min(c, parts - i)
        if v > 1:
            flying = in_flight(parts, c, v)[stage[u]]
        p[i] += t.time_s[k]
        g[i] += t.step_time_s[k]
        held[i] += t.static_bytes[k] + flying * t.microbatch_bytes[k]
        update[i] += t.static_bytes[k] + t.step_bytes[k]
        spike[i] = max(spike[i], t.transient_bytes[k])
        if problem.leading is not None and problem.leading.counted[u]:
            if bool(problem.leading.leading[u][k]) != (seen[stage[u]] < problem.leading.count):
                return float("inf")
            seen[stage[u]] += 1
    if any(max(held[i] + spike[i], update[i]) > problem.memory_limit_bytes * (1 + 1e-12) for i in range(parts)):
        return float("inf")
    for e in problem.edges:
        a = problem.layers[e.source].layout[choice[e.source]]
        b = problem.layers[e.target].layout[choice[e.target]]
        if stage[e.source] == stage[e.target]:
            p[stage[e.source] % parts] += e.reshard_s[a, b]
        for j in range(stage[e.source], min(stage[e.target], parts - 1)):
            o[j] += e.send_s[a, b]
    if v > 1:
        return float(sum(p) / v + sum(o) + (c - 1 / v) * max(p) + max(g))
    return float(sum(p) + sum(o) + (c - 1) * max(p + o) + max(g))


@cache
def in_flight(parts: int, c: int, v: int) -> list[int]:
    """Micro-batches each interval of an interleaved pipeline holds at most, counted by running the warm-up."""
    held = [0] * (parts * v)
    for stage in range(parts):
        passes = min(2 * (parts - stage - 1) + (v - 1) * parts + 1, c * v)
        order = [chunk for group in range(c // parts) for chunk in range(v) for _ in range(parts)]
        for chunk in order[:passes]:
            held[chunk * parts + stage] += 1
    return held


def cuts(problem: Problem) -> Iterator[list[int]]:
    """Every cut the problem allows: any without virtual stages; nearly even ones with them."""
    n, count = len(problem.layers), problem.num_stages * problem.virtual_stages
    for stage in partitions(n, count):
        if problem.virtual_stages == 1 or is_even(problem, stage, count):
            yield stage


def is_even(problem: Problem, stage: list[int], count: int) -> bool:
    """Whether all intervals take nearly as long; only one of a single inner layer, or none, may take longer."""
    n, rule = len(problem.layers), problem.leading
    seconds = [
        min(t.time_s[k] for k in range(len(t.time_s)) if rule is None or not rule.counted[u] or not rule.leading[u][k])
        for u, t in enumerate(problem.layers)
    ]
    mean = sum(seconds) / count
    inner = [stage[1 : n - 1].count(s) for s in range(count)]
    spent = [sum(seconds[u] for u in range(n) if stage[u] == s) for s in range(count)]
    short = any(time < 0.75 * mean * (1 - 1e-12) for time in spent)
    long = any(time > 1.25 * mean * (1 + 1e-12) for time, size in zip(spent, inner, strict=True) if size > 1)
    return not short and not long and min(inner) >= (0 if rule is None else rule.count)


def brute_force(problem: Problem) -> float:
    """The least objective of all assignments, ``inf`` if none is feasible."""
    choices = [range(len(t.time_s)) for t in problem.layers]
    return min(
        (cost(problem, stage, choice) for stage in cuts(problem) for choice in itertools.product(*choices)),
        default=float("inf"),
    )


@st.composite
def problems(
    draw: st.DrawFn, *, chain: bool | None = None, leading: bool | None = None, max_layers: int = 5
) -> Problem:
    """Small random problems, degenerate ones included: zero times, equal layers, memory exactly at the limit."""
    n = draw(st.integers(1, max_layers))
    parts = draw(st.integers(1, min(3, n)))
    c = draw(st.sampled_from([1, 2, 3, 7, 64, 4096]))
    num_layouts = draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    grain = draw(st.sampled_from([0, 1, 4]))  # whole numbers make ties; 0: continuous
    unit_s = draw(st.sampled_from([1e-9, 1e-3, 1.0, 1e4]))
    unit_b = draw(st.sampled_from([1.0, 1e9, 1e12]))

    def values(*shape: int, unit: float, zero: float = 0.0) -> np.ndarray:
        raw = rng.integers(0, 4 * grain + 1, shape).astype(float) if grain else rng.random(shape)
        return np.where(rng.random(shape) < zero, 0.0, raw * unit)

    def table() -> LayerTable:
        k = int(rng.integers(1, 5))
        return LayerTable(
            layout=rng.integers(0, num_layouts, k),
            time_s=values(k, unit=unit_s, zero=0.1),
            step_time_s=values(k, unit=unit_s * 3, zero=0.3),
            static_bytes=values(k, unit=unit_b),
            microbatch_bytes=values(k, unit=unit_b, zero=0.3),
            transient_bytes=values(k, unit=2 * unit_b, zero=0.5),
            step_bytes=values(k, unit=unit_b, zero=0.7),
        )

    kinds = [table() for _ in range(draw(st.integers(1, n)))]
    layers = tuple(kinds[int(rng.integers(len(kinds)))] for _ in range(n))
    chain = draw(st.booleans()) if chain is None else chain
    pairs = {(u, u + 1) for u in range(n - 1) if rng.random() < 0.9}
    if not chain:
        pairs |= {(u, v) for u in range(n) for v in range(u + 2, n) if rng.random() < 0.5}
    edges = tuple(
        EdgeTable(
            u, v, values(num_layouts, num_layouts, unit=unit_s / 2), values(num_layouts, num_layouts, unit=unit_s)
        )
        for u, v in sorted(pairs)
    )
    rule = None
    if leading if leading is not None else draw(st.booleans()):
        counted = tuple(bool(rng.random() < 0.8) for _ in range(n))
        marks = {id(t): rng.random(t.num_strategies) < 0.5 for t in kinds}
        rule = LeadingRule(int(rng.integers(0, n + 1)), counted, tuple(marks[id(t)] for t in layers))
    schedule = draw(st.sampled_from(list(Schedule)))
    problem = Problem(parts, c, schedule, 1.0, num_layouts, layers, edges, rule)
    need = [
        max(float(np.min(t.bytes_in_flight(problem.in_flight(0)) + t.transient_bytes)) for t in layers),
        sum(float(np.max(t.bytes_in_flight(problem.in_flight(0)) + t.transient_bytes)) for t in layers),
    ]
    tightness = draw(st.sampled_from([0.0, 0.15, 0.3, 0.5, 1.0]))
    limit = max(need[0] + tightness * (need[1] - need[0]), unit_b * 1e-3)
    if grain:
        limit = max(float(np.floor(limit / unit_b)) * unit_b, unit_b)
    return Problem(parts, c, schedule, limit, num_layouts, layers, edges, rule)
