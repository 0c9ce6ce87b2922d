r"""Interleaved pipelines: the best cut of a chain into v N intervals, stage i holding those numbered i, N + i, ...

    minimize  sum_i p_i / v + sum_j o_j + (c - 1 / v) max p + max_i g_i    with the memory of problem.py, over

    cuts in which the seconds of every interval are within a quarter of their mean.

Chunks must be nearly of one size: the ramp of the closed form is that of even chunks, and chunks that differ by a half
cost up to 20% more than it says. An interval may take longer only if it holds no more than one layer beside the first
or the last. All others are *inner* layers; where the first N of each interval are recomputed, every interval holds at
least N, and seconds are compared as if none were.

Inner layers are mostly equal. Then seconds and bytes of a stage depend on how many it holds, and for bytes also on
which of its chunks hold them; late chunks have fewer micro-batches in flight, so filling those first needs least.
Hence for any T and H, the most a stage may hold with p <= T, g <= H and its memory is known, and a cut with max p <= T
and max g <= H exists iff these add up to enough. T and H range over few values; the least are found by bisection.
That is exact. Layers that differ take the MILP of :mod:`uniap_tune.milp.interleaved`.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace

from uniap_tune.problem import (
    MEMORY_SLACK,
    Assignment,
    LayerTable,
    Problem,
    Solution,
    Status,
    evaluate,
    infeasible,
)

SOLVER = "intervals"

# By how much of the mean the seconds of an interval may differ from it [Empirical]: with a quarter the closed form is
# within a few percent of the simulated step, with a half up to 20% off.
EVEN = 0.25

# Sums of equal seconds are taken in different orders: a cap may be missed by rounding alone.
_ROUNDING = 1e-12


def plain_seconds(problem: Problem) -> list[float]:
    """Seconds of each layer with the strategy it has where nothing is recomputed for the leading rule."""
    rule = problem.leading
    found = []
    for u, table in enumerate(problem.layers):
        usable = table.time_s
        if rule is not None and rule.counted[u]:
            usable = usable[~rule.leading[u]]
        found.append(float(usable.min()))
    return found


def is_even(problem: Problem, seconds: float, mean: float, inner: int) -> bool:
    """Whether an interval of so many inner layers, and seconds, is of nearly the mean length."""
    leading = problem.leading.count if problem.leading is not None else 0
    if inner < leading or seconds < mean * (1 - EVEN) * (1 - _ROUNDING):
        return False
    return inner <= 1 or seconds <= mean * (1 + EVEN) * (1 + _ROUNDING)


def interval_limits(problem: Problem) -> tuple[list[int], list[int]] | None:
    """Least and most inner layers of each interval where these are equal; ``None`` if no cut is within them."""
    count, inner = problem.num_intervals, problem.num_layers - 2
    seconds = plain_seconds(problem)
    mean = sum(seconds) / count
    ends = {0: seconds[0], count - 1: seconds[-1]}
    low, high = [], []
    by_end: dict[float | None, tuple[int, int]] = {}
    for s in range(count):
        end = ends.get(s)
        if end not in by_end:
            sizes = [
                n
                for n in range(0 if end is not None else 1, inner - count + 4)
                if is_even(problem, n * seconds[1] + (end or 0.0), mean, n)
            ]
            by_end[end] = (sizes[0], sizes[-1]) if sizes else (1, 0)
        least, most = by_end[end]
        low.append(least)
        high.append(most)
    if any(a > b for a, b in zip(low, high, strict=True)):
        return None
    return (low, high) if sum(low) <= inner <= sum(high) else None


def is_regular(problem: Problem) -> bool:
    """Whether all inner layers are equal and neighbours need no re-sharding."""
    inner = problem.layers[1:-1]
    return all(t is inner[0] for t in inner) and not any(edge.reshard_s.any() for edge in problem.edges)


def solve_regular(problem: Problem) -> Solution:
    """The best cut of a chain whose inner layers are equal."""
    limits = interval_limits(problem)
    return infeasible(SOLVER) if limits is None else _Cut(problem, *limits).solve()


@dataclass(frozen=True, slots=True)
class Use:
    """What a layer costs at one place. Seconds and bytes."""

    time_s: float
    step_s: float
    static: float
    microbatch: float
    transient: float
    step_bytes: float


def use_of(table: LayerTable, k: int) -> Use:
    """Strategy ``k`` of a layer."""
    columns = (table.time_s, table.step_time_s, table.static_bytes, table.microbatch_bytes)
    return Use(*(float(column[k]) for column in (*columns, table.transient_bytes, table.step_bytes)))


def strategy_at(problem: Problem, layer: int, first: int) -> int:
    """The one strategy ``layer`` may use in an interval that begins at layer ``first``.

    Raises:
        ValueError: it may use several, or none.
    """
    table = problem.layers[layer]
    if problem.leading is None:
        choices = list(range(table.num_strategies))
    else:
        choices = [int(k) for k in problem.leading.allowed(layer, first).nonzero()[0]]
    if len(choices) != 1:
        raise ValueError(f"layer {layer} has {len(choices)} strategies; interleaving takes one at each place")
    return choices[0]


@dataclass(slots=True)
class _Stage:
    """What is fixed of a stage, and how much its inner layers add; ``most``: inner layers its memory allows."""

    ends: list[Use]
    flights: list[int]
    low: list[int]
    high: list[int]
    time_s: float = 0.0
    step_s: float = 0.0
    most: int = 0


class _Cut:
    """One problem whose inner layers are equal."""

    def __init__(self, problem: Problem, low: list[int], high: list[int]) -> None:
        self.problem = problem
        self.leading = problem.leading.count if problem.leading is not None else 0
        last = problem.num_layers - 1
        # the strategies of a recomputed and of a plain inner layer
        self.lead = use_of(problem.layers[1], strategy_at(problem, 1, 1)) if self.leading else None
        self.plain = use_of(problem.layers[1], self._plain_strategy())
        self.ends = {0: use_of(problem.layers[0], strategy_at(problem, 0, 0))}
        self.ends[problem.num_intervals - 1] = use_of(problem.layers[last], strategy_at(problem, last, last))
        size = problem.num_stages
        self.stages = [self._stage(range(i, problem.num_intervals, size), low, high) for i in range(size)]

    def _plain_strategy(self) -> int:
        rule = self.problem.leading
        if rule is None:
            return strategy_at(self.problem, 1, 1)
        return int((~rule.leading[1]).nonzero()[0][0])

    def _stage(self, intervals: Sequence[int], low: list[int], high: list[int]) -> _Stage:
        stage = _Stage(
            [self.ends[s] for s in intervals if s in self.ends],
            [self.problem.in_flight(s) for s in intervals],
            [low[s] for s in intervals],
            [high[s] for s in intervals],
        )
        stage.time_s = sum(end.time_s for end in stage.ends) + self._extra("time_s") * len(stage.low)
        stage.step_s = sum(end.step_s for end in stage.ends) + self._extra("step_s") * len(stage.low)
        stage.most = self._most(stage)
        return stage

    def _extra(self, name: str) -> float:
        """What the recomputed layers of one interval cost beyond plain ones."""
        if self.lead is None:
            return 0.0
        return self.leading * float(getattr(self.lead, name) - getattr(self.plain, name))

    def _most(self, stage: _Stage) -> int:
        """The most inner layers whose leanest distribution fits; -1 if not even the least do."""
        sizes = list(stage.low)
        if not self._fits(stage, sizes):
            return -1
        for chunk in self._leanest_first(stage):
            while sizes[chunk] < stage.high[chunk]:
                sizes[chunk] += 1
                if not self._fits(stage, sizes):
                    return sum(sizes) - 1
        return sum(sizes)

    def _leanest_first(self, stage: _Stage) -> list[int]:
        return sorted(range(len(stage.flights)), key=lambda chunk: (stage.flights[chunk], -chunk))

    def _fits(self, stage: _Stage, sizes: Sequence[int]) -> bool:
        plain, lead = self.plain, self.lead or self.plain
        count, led = sum(sizes), self.leading * len(sizes)
        uses = [*stage.ends, *([plain] if count > led else []), *([lead] if led else [])]
        static = sum(end.static for end in stage.ends) + (count - led) * plain.static + led * lead.static
        flying = sum(
            flight * ((size - self.leading) * plain.microbatch + self.leading * lead.microbatch)
            for size, flight in zip(sizes, stage.flights, strict=True)
        )
        # embedding and head are in the first chunk of the first stage and the last of the last
        flying += sum(stage.flights[0 if self.ends[0] is end else -1] * end.microbatch for end in stage.ends)
        update = sum(end.step_bytes for end in stage.ends) + (count - led) * plain.step_bytes + led * lead.step_bytes
        peak = static + max(flying + max((use.transient for use in uses), default=0.0), update)
        return peak <= self.problem.memory_limit_bytes * (1 + MEMORY_SLACK)

    # -- the least T and H ----------------------------------------------------------------------------------------

    def solve(self) -> Solution:
        """The optimum; see the module's docstring."""
        if any(stage.most < 0 for stage in self.stages) or self._counts(math.inf, math.inf) is None:
            return infeasible(SOLVER)
        times = self._values(lambda stage: stage.time_s, self.plain.time_s)
        steps = self._values(lambda stage: stage.step_s, self.plain.step_s)
        c, v = self.problem.num_microbatches, self.problem.virtual_stages
        least_step = self._least(steps, lambda h: self._counts(math.inf, h))
        best, chosen = math.inf, None
        first = self._least_index(times, lambda t: self._counts(t, math.inf))
        for slowest in times[first:]:
            if (c - 1 / v) * slowest + least_step >= best * (1 - _ROUNDING):
                break
            once = self._least(steps, lambda h, slowest=slowest: self._counts(slowest, h))  # type: ignore[misc]
            value = (c - 1 / v) * slowest + once
            if value < best:
                best, chosen = value, self._counts(slowest, once)
        if chosen is None:  # all seconds are zero
            chosen = self._counts(math.inf, math.inf) or []
        assignment = self._assignment(chosen)
        value = evaluate(self.problem, assignment).objective_s
        return Solution(Status.OPTIMAL, assignment, value, value, SOLVER)

    def _values(self, fixed: Callable[[_Stage], float], each: float) -> list[float]:
        """All values a stage's sum can take, rising."""
        if each <= 0:
            return sorted({fixed(stage) for stage in self.stages})
        found = {(fixed(stage), count) for stage in self.stages for count in range(sum(stage.low), stage.most + 1)}
        return sorted({start + count * each for start, count in found})

    @staticmethod
    def _least_index(values: Sequence[float], counts: Callable[[float], list[int] | None]) -> int:
        return bisect_left(range(len(values)), True, key=lambda i: counts(values[i]) is not None)

    def _least(self, values: Sequence[float], counts: Callable[[float], list[int] | None]) -> float:
        return values[min(self._least_index(values, counts), len(values) - 1)]

    def _counts(self, slowest: float, once: float) -> list[int] | None:
        """Inner layers of each stage with p <= ``slowest`` and g <= ``once``, as even as can be; ``None``: none."""
        inner = self.problem.num_layers - 2
        counts = [sum(stage.low) for stage in self.stages]
        room = [
            min(
                stage.most,
                _room(slowest, stage.time_s, self.plain.time_s),
                _room(once, stage.step_s, self.plain.step_s),
            )
            for stage in self.stages
        ]
        if any(most < least for most, least in zip(room, counts, strict=True)) or sum(room) < inner:
            return None
        each = self.plain.time_s
        heap = [
            (s.time_s + n * each, i) for i, (s, n) in enumerate(zip(self.stages, counts, strict=True)) if n < room[i]
        ]
        heapify(heap)
        for _ in range(inner - sum(counts)):
            time, i = heap[0]
            counts[i] += 1
            heapreplace(heap, (time + each if counts[i] < room[i] else math.inf, i))
        return counts

    # -- which chunk holds what -----------------------------------------------------------------------------------

    def _assignment(self, counts: Sequence[int]) -> Assignment:
        problem = self.problem
        sizes = [0] * problem.num_intervals
        for i, (stage, count) in enumerate(zip(self.stages, counts, strict=True)):
            for chunk, size in enumerate(self._chunks(stage, count)):
                sizes[chunk * problem.num_stages + i] = size
        return assignment_of(problem, sizes)

    def _chunks(self, stage: _Stage, count: int) -> list[int]:
        """Inner layers of each chunk: as even in time as memory allows."""
        sizes = list(stage.low)
        offset = [0.0] * len(sizes)
        for end in stage.ends:
            offset[0 if self.ends[0] is end else -1] += end.time_s
        each = self.plain.time_s
        for _ in range(count - sum(sizes)):
            open_ones = [k for k in range(len(sizes)) if sizes[k] < stage.high[k]]
            least = min(open_ones, key=lambda k: (offset[k] + sizes[k] * each, -k))
            sizes[least] += 1
        if self._fits(stage, sizes):
            return sizes
        sizes, left = list(stage.low), count - sum(stage.low)
        for chunk in self._leanest_first(stage):
            more = min(left, stage.high[chunk] - sizes[chunk])
            sizes[chunk] += more
            left -= more
        return sizes


def _room(limit: float, fixed: float, each: float) -> float:
    """How many layers of ``each`` fit beside ``fixed``."""
    room = limit * (1 + _ROUNDING) - fixed
    if room < 0:
        return -1
    return math.floor(room / each) if each > 0 and math.isfinite(room) else math.inf


def assignment_of(problem: Problem, sizes: Sequence[int]) -> Assignment:
    """The cut with so many inner layers in each interval."""
    place = [s for s, size in enumerate(sizes) for _ in range(size)]
    place = [0, *place, problem.num_intervals - 1]
    first = {s: place.index(s) for s in set(place)}
    strategy = [strategy_at(problem, u, first[s]) for u, s in enumerate(place)]
    return Assignment(tuple(place), tuple(strategy))
