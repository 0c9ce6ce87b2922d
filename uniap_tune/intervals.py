"""Lower bounds on one stage of any layers [a, b), without building it.

For any multiplier lambda >= 0 on the memory of a stage and any weight omega on once-a-step time, a stage with
micro-batch seconds p and once-a-step seconds G satisfies (weak duality; re-sharding is >= 0 and left out)

    p + omega G  >=  sum_u min_k (A[u,k] + omega g[u,k] + lambda m[u,k])  -  lambda (limit - max_u min_k w[u,k]),

a difference of prefix sums, so all intervals cost one subtraction each. A stage that changes its layout pays for at
least one change of layout; one that does not is bounded for each layout by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from uniap_tune.problem import BoolArray, FloatArray, IntArray, LayerTable, LeadingRule, Problem

# Multipliers tried for each in-flight count: hull slopes of the layers' (memory, time) points, thinned to this many.
_MAX_MULTIPLIERS = 16


@dataclass(frozen=True, eq=False)
class PrefixSums:
    """Over layers: reduced costs [W, Z, n + 1], least bytes [n + 1], and layers without a usable strategy [n + 1]."""

    reduced: FloatArray
    leanest: FloatArray
    impossible: FloatArray


@dataclass(frozen=True, eq=False)
class StageBounds:
    """Bounds of all stages with one in-flight count.

    Attributes:
        multipliers: [Z] lambda.
        mixed: prefix sums over all strategies (under a leading rule: of layers that do not lead).
        single: for each layout its own prefix sums, or ``None``.
        move: least seconds of a change of layout.
        lower: [W, n + 1, n + 1] bounds on p + omega G of the stage [a, b); inf where it cannot fit or b <= a.
    """

    multipliers: FloatArray
    mixed: PrefixSums
    single: tuple[PrefixSums | None, ...]
    move: float
    lower: FloatArray


def stage_bounds(problem: Problem, flight: int, weights: FloatArray) -> StageBounds:
    """The bounds of all stages with this many micro-batches in flight, for each weight omega."""
    limit = problem.memory_limit_bytes
    bytes_of = {id(t): t.bytes_in_flight(flight) for t in problem.layers}
    multipliers = _multipliers(problem, bytes_of, weights)
    spare = limit - _largest_between(problem)
    if problem.leading is not None:
        return _leading_bounds(problem, problem.leading, bytes_of, weights, multipliers, spare)
    mixed = _prefix_sums(problem, bytes_of, weights, multipliers)
    lower = _intervals(mixed, multipliers, spare, limit)
    layouts = sorted({int(a) for table in problem.layers for a in table.layout})
    move = _least_move(problem)
    single: list[PrefixSums] = []
    if len(layouts) > 1 and move > 0:
        single = [_prefix_sums(problem, bytes_of, weights, multipliers, layout=a) for a in layouts]
        one = np.minimum.reduce([_intervals(sums, multipliers, spare, limit) for sums in single])
        lower = np.minimum(one, lower + move)
    by_layout: list[PrefixSums | None] = [None] * problem.num_layouts
    for layout, sums in zip(layouts, single, strict=False):
        by_layout[layout] = sums
    return StageBounds(multipliers, mixed, tuple(by_layout), move, lower)


def _intervals(sums: PrefixSums, multipliers: FloatArray, spare: FloatArray, limit: float) -> FloatArray:
    """[W, n + 1, n + 1] the bound at its best multiplier, inf where a stage cannot be."""
    interval = sums.reduced[:, :, None, :] - sums.reduced[:, :, :, None]
    interval -= multipliers[None, :, None, None] * spare[None, None]
    need = sums.leanest[None, :] - sums.leanest[:, None]
    possible = np.triu(sums.impossible[None, :] == sums.impossible[:, None], 1)
    fits = possible & (need <= spare + limit * 1e-9)
    return np.where(fits[None], np.maximum(interval.max(axis=1), 0.0), np.inf)


def _leading_bounds(
    problem: Problem,
    rule: LeadingRule,
    bytes_of: dict[int, FloatArray],
    weights: FloatArray,
    multipliers: FloatArray,
    spare: FloatArray,
) -> StageBounds:
    """As without the rule, with the first layers of [a, b) priced as leading and the others as not."""
    lead = _prefix_sums(problem, bytes_of, weights, multipliers, leading=True)
    rest = _prefix_sums(problem, bytes_of, weights, multipliers, leading=False)
    turn = _turns(problem, rule)  # [n + 1, n + 1]: where the leading part of [a, b) ends
    first = np.arange(problem.num_layers + 1)[:, None]

    def both(of_lead: FloatArray, of_rest: FloatArray) -> FloatArray:
        return of_lead[..., turn] - of_lead[..., first] + of_rest[..., None, :] - of_rest[..., turn]

    interval = both(lead.reduced, rest.reduced) - multipliers[None, :, None, None] * spare[None, None]
    fits = np.triu(both(lead.impossible, rest.impossible) == 0, 1)
    fits &= both(lead.leanest, rest.leanest) <= spare + problem.memory_limit_bytes * 1e-9
    lower = np.where(fits[None], np.maximum(interval.max(axis=1), 0.0), np.inf)
    return StageBounds(multipliers, rest, (None,) * problem.num_layouts, 0.0, lower)


def _least_move(problem: Problem) -> float:
    """Least seconds of a change of layout inside a stage; 0 where neighbours are not joined by an edge."""
    if len(problem.chain_edges) < problem.num_layers - 1 or problem.num_layouts == 1:
        return 0.0
    changes = ~np.eye(problem.num_layouts, dtype=np.bool_)
    unique = {id(edge.reshard_s): edge.reshard_s for edge in problem.chain_edges.values()}
    return min((float(cost[changes].min()) for cost in unique.values()), default=0.0)


def _largest_between(problem: Problem) -> FloatArray:
    """[n + 1, n + 1] the largest transient that a stage of layers [a, b) cannot avoid."""
    n = problem.num_layers
    least = [float(table.transient_bytes.min()) for table in problem.layers]
    largest = np.zeros((n + 1, n + 1))
    if any(least):
        for u in range(n):
            largest[: u + 1, u + 1] = np.maximum(largest[: u + 1, u], least[u])
    return largest


def _prefix_sums(
    problem: Problem,
    bytes_of: dict[int, FloatArray],
    weights: FloatArray,
    multipliers: FloatArray,
    *,
    leading: bool | None = None,
    layout: int | None = None,
) -> PrefixSums:
    """Sums over strategies with one layout (or any) and, under a leading rule, those marked ``leading``."""
    n, rule = problem.num_layers, problem.leading
    sums = PrefixSums(np.zeros((len(weights), len(multipliers), n + 1)), np.zeros(n + 1), np.zeros(n + 1))
    cache: dict[tuple[int, int | None], tuple[FloatArray, float] | None] = {}
    for u, table in enumerate(problem.layers):
        marks = rule.leading[u] if rule is not None and rule.counted[u] else None
        key = (id(table), None if marks is None else id(marks))
        if key not in cache:
            usable = np.ones(table.num_strategies, dtype=np.bool_) if marks is None else marks == leading
            if layout is not None:
                usable = usable & (table.layout == layout)
            cache[key] = _least(table, bytes_of[id(table)], weights, multipliers, usable)
        found = cache[key]
        reduced, least = found if found is not None else (0.0, 0.0)
        sums.reduced[:, :, u + 1] = sums.reduced[:, :, u] + reduced
        sums.leanest[u + 1] = sums.leanest[u] + least
        sums.impossible[u + 1] = sums.impossible[u] + (found is None)
    return sums


def _least(
    table: LayerTable, held: FloatArray, weights: FloatArray, multipliers: FloatArray, usable: BoolArray
) -> tuple[FloatArray, float] | None:
    """[W, Z] least reduced cost and the least bytes of a layer; ``None`` if no strategy is usable."""
    if not usable.any():
        return None
    time, once, held = table.time_s[usable], table.step_time_s[usable], held[usable]
    base = time + weights[:, None] * once  # [W, K]
    reduced = (base[:, None, :] + multipliers[None, :, None] * held).min(axis=2)
    return reduced, float(held.min())


def _turns(problem: Problem, rule: LeadingRule) -> IntArray:
    """[n + 1, n + 1] first layer of [a, b) that is not among its ``count`` leading counted layers (b if none)."""
    n = problem.num_layers
    counted = np.flatnonzero(rule.counted)
    ends = np.full(n + 1, n, dtype=np.int64)
    for a in range(n):
        place = np.searchsorted(counted, a) + rule.count
        ends[a] = counted[place] if place < len(counted) else n
    return np.minimum(ends[:, None], np.arange(n + 1)[None, :]).clip(min=np.arange(n + 1)[:, None])


def _multipliers(problem: Problem, bytes_of: dict[int, FloatArray], weights: FloatArray) -> FloatArray:
    """Slopes of the lower hulls of the layers' (bytes, seconds) points: the breakpoints of the dual function."""
    slopes = {0.0}
    for table in {id(t): t for t in problem.layers}.values():
        for omega in weights[:2]:
            slopes |= _hull_slopes(bytes_of[id(table)], table.time_s + omega * table.step_time_s)
    ordered = np.array(sorted(slopes))
    if len(ordered) > _MAX_MULTIPLIERS:
        picks = np.unique(np.linspace(0, len(ordered) - 1, _MAX_MULTIPLIERS).round().astype(int))
        ordered = ordered[picks]
    return ordered


def _hull_slopes(size: FloatArray, time: FloatArray) -> set[float]:
    """-d(time)/d(bytes) along the lower convex hull, where it falls."""
    order = np.lexsort((time, size))
    hull: list[tuple[float, float]] = []
    for x, y in zip(size[order].tolist(), time[order].tolist(), strict=True):
        if hull and (x == hull[-1][0] or y >= min(p[1] for p in hull)):
            continue
        while len(hull) >= 2 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) >= (y - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((x, y))
    return {(p[1] - q[1]) / (q[0] - p[0]) for p, q in pairwise(hull)}
