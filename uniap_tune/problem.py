r"""The optimization problem of one pipeline size and one number of micro-batches, free of any solver.

Given layers V in topological order, edges E, strategies k of each layer u and a pipeline of N stages fed with c
micro-batches (UniAP, arXiv 2307.16375), with binaries P[u,i] (layer u is on stage i) and S[u,k] (layer u uses
strategy k):

    minimize  TPI = sum_i p_i + sum_j o_j + (c - 1) max(p u o) + max_i sum_u P[u,i] S[u] g[u]

    p_i = sum_u P[u,i] S[u] A[u]  +  sum_(u,v) P[u,i] P[v,i] S[u]^T R[u,v] S[v]        seconds of stage i
    o_j = sum_(u,v) (u at or before j, v after j) S[u]^T R'[u,v] S[v]                  seconds of link j

subject to

    sum_i P[u,i] = 1, sum_k S[u,k] = 1                       one stage, one strategy      milp._assignment
    stages are non-empty intervals of the layers' order      pipeline engines             milp._order
    sum_u P[u,i] S[u] (m0[u] + f_i m1[u])
        + max_u P[u,i] S[u] w[u]  <=  memory limit           every stage i                milp._memory
    sum_u P[u,i] S[u] (m0[u] + m2[u])  <=  memory limit      every stage i                milp._memory
    S[u] depends on u's place in its stage                   block recomputation          milp._leading

where f_i is the number of micro-batches in flight on stage i. R and R' depend on the *layout* of a strategy only.
w is memory that lives only while a layer runs (a recomputed layer, the logits), so a stage pays for its largest.
m2 is memory that only the optimizer needs, when no activation is alive. An edge is charged R' on every link it crosses.
For N = 1 the same formulas hold with one stage and no link.

With v *virtual stages* on each stage (interleaved 1F1B, arXiv 2104.04473 section 2.2), layers are cut into v N
intervals, of which stage i holds those numbered i, N + i, 2 N + i, ...; each has its own number of micro-batches in
flight, and :func:`uniap_tune.schedule.step_seconds` takes the place of the first three terms:

    minimize  sum_i p_i / v + sum_j o_j + (c - 1 / v) max p + max_i g_i                    see uniap_tune.interleave
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from uniap_tune.schedule import Schedule, chunks_in_flight, step_seconds

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

# Recomputed bytes may exceed the limit by this relative amount, for the rounding of a sum of floats; nothing
# else is excused (solver tolerances are not).
MEMORY_SLACK = 1e-12


@dataclass(frozen=True, eq=False)
class LayerTable:
    """Costs of one layer under its K strategies; equal layers share one object.

    Attributes:
        layout: [K] index of the activation layout a strategy uses.
        time_s: [K] A, seconds of one micro-batch, forward and backward.
        step_time_s: [K] g, seconds once a step.
        static_bytes: [K] m0, bytes for the whole step.
        microbatch_bytes: [K] m1, bytes for each micro-batch in flight.
        transient_bytes: [K] w, bytes while the layer runs.
        step_bytes: [K] m2, bytes while the optimizer runs.
    """

    layout: IntArray
    time_s: FloatArray
    step_time_s: FloatArray
    static_bytes: FloatArray
    microbatch_bytes: FloatArray
    transient_bytes: FloatArray
    step_bytes: FloatArray

    @property
    def num_strategies(self) -> int:
        """K."""
        return len(self.layout)

    def bytes_in_flight(self, in_flight: int) -> FloatArray:
        """[K] bytes with ``in_flight`` micro-batches held, without transients."""
        return self.static_bytes + in_flight * self.microbatch_bytes

    @property
    def update_bytes(self) -> FloatArray:
        """[K] bytes while the optimizer runs."""
        return self.static_bytes + self.step_bytes


@dataclass(frozen=True, eq=False)
class EdgeTable:
    """Re-sharding (same stage) and sending (across a stage border), seconds, [G, G] from layout to layout."""

    source: int
    target: int
    reshard_s: FloatArray
    send_s: FloatArray


@dataclass(frozen=True, eq=False)
class LeadingRule:
    """A rule on where in a stage a strategy may be used: Megatron's ``--recompute-method block``.

    Among the layers of a stage that are ``counted`` (transformer blocks), the first ``count`` may use only their
    strategies marked in ``leading``, the others only those not marked. Layers not counted are free.

    Attributes:
        counted: [n] whether a layer counts.
        leading: for each layer, [K] marks.
    """

    count: int
    counted: tuple[bool, ...]
    leading: tuple[BoolArray, ...]

    @cached_property
    def rank(self) -> IntArray:
        """[n] number of counted layers before each layer."""
        return np.concatenate([[0], np.cumsum(self.counted)[:-1]]).astype(np.int64)

    def allowed(self, layer: int, first: int) -> BoolArray:
        """[K] strategies ``layer`` may use on a stage that begins at layer ``first``."""
        marks = self.leading[layer]
        if not self.counted[layer]:
            return np.ones(len(marks), dtype=np.bool_)
        is_leading = self.rank[layer] - self.rank[first] < self.count
        return marks if is_leading else ~marks


@dataclass(frozen=True, eq=False)
class Problem:
    """One (pp, c). ``edges`` hold at most one table for each pair of layers, ``source`` < ``target``.

    With ``virtual_stages`` > 1 the graph is a chain, the schedule 1F1B, and each layer has one strategy it may use at
    its place (:mod:`uniap_tune.interleave`).
    """

    num_stages: int
    num_microbatches: int
    schedule: Schedule
    memory_limit_bytes: float
    num_layouts: int
    layers: tuple[LayerTable, ...]
    edges: tuple[EdgeTable, ...]
    leading: LeadingRule | None = None
    virtual_stages: int = 1

    @property
    def num_intervals(self) -> int:
        """Into how many intervals the layers are cut: v N."""
        return self.virtual_stages * self.num_stages

    @property
    def num_layers(self) -> int:
        """n."""
        return len(self.layers)

    @cached_property
    def is_chain(self) -> bool:
        """Whether every edge joins neighbours. A missing edge between neighbours costs nothing to cross."""
        return all(edge.target == edge.source + 1 for edge in self.edges)

    @cached_property
    def chain_edges(self) -> dict[int, EdgeTable]:
        """The edges between neighbours, by source."""
        return {edge.source: edge for edge in self.edges if edge.target == edge.source + 1}

    @cached_property
    def skip_edges(self) -> tuple[EdgeTable, ...]:
        """All other edges."""
        return tuple(edge for edge in self.edges if edge.target != edge.source + 1)

    def in_flight(self, interval: int) -> int:
        """Micro-batches an interval holds at the peak of its stage; see :func:`~uniap_tune.schedule.chunks_in_flight`.

        Without virtual stages an interval is a stage.
        """
        if self.schedule is Schedule.GPIPE:
            return self.num_microbatches
        if self.virtual_stages == 1:
            return min(self.num_microbatches, self.num_stages - interval)
        return self._chunks_in_flight[interval]

    @cached_property
    def _chunks_in_flight(self) -> tuple[int, ...]:
        size, v = self.num_stages, self.virtual_stages
        by_stage = [chunks_in_flight(i, size, self.num_microbatches, v) for i in range(size)]
        return tuple(by_stage[s % size][s // size] for s in range(v * size))

    def fits(self, stage_bytes: float) -> bool:
        """Whether a stage's recomputed bytes are within the limit."""
        return stage_bytes <= self.memory_limit_bytes * (1 + MEMORY_SLACK)


@dataclass(frozen=True, slots=True)
class Assignment:
    """A candidate answer: for each layer its stage (virtual stages: its interval) and the index of its strategy."""

    stage: tuple[int, ...]
    strategy: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What an assignment costs. Seconds and bytes, by stage and by link.

    Link j leads from stage j to the next; with virtual stages the last leads back to the first.
    """

    objective_s: float
    stage_time_s: tuple[float, ...]
    link_time_s: tuple[float, ...]
    stage_step_s: tuple[float, ...]
    stage_bytes: tuple[float, ...]


class Status(StrEnum):
    """How a solve ended."""

    OPTIMAL = "optimal"
    INFEASIBLE = "infeasible"
    LIMIT = "limit"


@dataclass(frozen=True, slots=True)
class Solution:
    """Answer of any solver to a :class:`Problem`.

    ``bound_s`` is a proven lower bound on the objective (``inf`` when infeasible). With status ``limit``
    ``assignment`` may be ``None``: nothing was found in time, and nothing is said about feasibility.
    """

    status: Status
    assignment: Assignment | None
    objective_s: float
    bound_s: float
    solver: str

    @property
    def gap(self) -> float:
        """(objective - bound) / objective; 0 at a proven optimum, ``inf`` without a plan."""
        return relative_gap(self.objective_s, self.bound_s)


def relative_gap(objective: float, bound: float) -> float:
    """(objective - bound) / objective, never negative; 0 for 0/0."""
    if objective == float("inf"):
        return float("inf")
    return max(0.0, (objective - bound) / objective) if objective > 0 else 0.0


def infeasible(solver: str) -> Solution:
    """The answer for a problem proven to have no plan."""
    return Solution(Status.INFEASIBLE, None, float("inf"), float("inf"), solver)


def evaluate(problem: Problem, assignment: Assignment) -> Evaluation:
    """Objective and memory of an assignment, by the formulas at the top. Does not judge feasibility."""
    strategy, size = assignment.strategy, problem.num_stages
    interval = assignment.stage
    time_s = [0.0] * size
    step_s = [0.0] * size
    held = [0.0] * size
    update = [0.0] * size
    transient = [0.0] * size
    link_s = [0.0] * (size if problem.virtual_stages > 1 else size - 1)
    for u, table in enumerate(problem.layers):
        i, k = interval[u] % size, strategy[u]
        time_s[i] += float(table.time_s[k])
        step_s[i] += float(table.step_time_s[k])
        held[i] += float(table.static_bytes[k]) + problem.in_flight(interval[u]) * float(table.microbatch_bytes[k])
        update[i] += float(table.static_bytes[k]) + float(table.step_bytes[k])
        transient[i] = max(transient[i], float(table.transient_bytes[k]))
    for edge in problem.edges:
        u, v = edge.source, edge.target
        a, b = problem.layers[u].layout[strategy[u]], problem.layers[v].layout[strategy[v]]
        if interval[u] == interval[v]:
            time_s[interval[u] % size] += float(edge.reshard_s[a, b])
        for j in range(interval[u], min(interval[v], len(link_s))):  # later rounds use the same links
            link_s[j] += float(edge.send_s[a, b])
    if problem.virtual_stages > 1:
        seconds = step_seconds(time_s, link_s[: size - 1], problem.num_microbatches, problem.virtual_stages)
        objective = seconds + max(step_s)
    else:
        objective = tpi(time_s, link_s, step_s, problem.num_microbatches)
    total = tuple(max(h + w, s) for h, w, s in zip(held, transient, update, strict=True))
    return Evaluation(objective, tuple(time_s), tuple(link_s), tuple(step_s), total)


def tpi(stage_s: Sequence[float], link_s: Sequence[float], step_s: Sequence[float], num_microbatches: int) -> float:
    """Time per iteration, seconds (arXiv 2307.16375 section 3.3; the last term is the exposed once-a-step time)."""
    slowest = max(*stage_s, *link_s, 0.0)
    return sum(stage_s) + sum(link_s) + (num_microbatches - 1) * slowest + max(step_s)


def is_valid(problem: Problem, assignment: Assignment) -> bool:
    """Whether stages are non-empty intervals in order and the leading rule is kept. Says nothing of memory."""
    stage = assignment.stage
    if stage[0] != 0 or stage[-1] != problem.num_intervals - 1:
        return False
    if any(b - a not in (0, 1) for a, b in pairwise(stage)):
        return False
    rule = problem.leading
    if rule is None:
        return True
    first = {i: stage.index(i) for i in range(problem.num_intervals)}
    return all(rule.allowed(u, first[stage[u]])[k] for u, k in enumerate(assignment.strategy))
