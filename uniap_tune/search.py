"""The unified optimization process (arXiv 2307.16375 section 3.1): the best plan over every (pp, c) and family.

Every (pp, c, family) gets a lower bound from its prices alone, cheapest first; they are solved in the order of their
bounds, and the incumbent ends the search as soon as the best bound left reaches it. What was solved, what was pruned
and by which bound is the certificate.

A family that recomputes the first N blocks of each stage is a problem for each N. For a fixed cut, time rises with N
and memory falls, so the smallest N that fits is found by bisection, and larger ones are tried only while their bound
without any memory limit is below the incumbent.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Protocol

from uniap_tune.bounds import chain_bounds
from uniap_tune.deadline import Deadline
from uniap_tune.formulate import Formulation, Pricer
from uniap_tune.lean import least_bytes
from uniap_tune.problem import Assignment, Status, relative_gap
from uniap_tune.quick import QuickBounds
from uniap_tune.replay import judged_seconds
from uniap_tune.solvers import Solve, solver_named
from uniap_tune.space import Family, Space
from uniap_tune.ties import simplify

# Objectives this close are equal; the simpler plan wins.
TIE = 1e-9

# Least bytes are sums in another order than those of a plan: relative slack far above their rounding.
_ROUNDING = 1e-11


class SharedValue(Protocol):
    """A float shared between processes (``multiprocessing.Value``)."""

    value: float

    def get_lock(self) -> AbstractContextManager[object]:
        """Its lock."""


class Outcome(StrEnum):
    """How a (pp, c) ended."""

    SOLVED = "solved"
    PRUNED = "pruned"
    INFEASIBLE = "infeasible"
    OPEN = "open"  # stopped before it was decided


@dataclass(frozen=True, slots=True)
class PairRecord:
    """What is proven of one (pp, c): no plan of it has a TPI below ``bound_s`` (``inf``: none fits)."""

    pp: int
    num_microbatches: int
    outcome: Outcome
    bound_s: float
    objective_s: float | None


@dataclass(frozen=True, eq=False, slots=True)
class Candidate:
    """The best plan of one (pp, c, family)."""

    pp: int
    num_microbatches: int
    family: Family
    formulation: Formulation
    assignment: Assignment
    objective_s: float

    @property
    def key(self) -> tuple[int, int, str]:
        """What makes two candidates different plans: not recomputation or virtual stages alone."""
        return (self.pp, self.num_microbatches, self.family.grid)

    @property
    def simplicity(self) -> tuple[int, ...]:
        """The tie-break: fewer stages, less recompute, lower ZeRO, lower tp, fewer micro-batches and virtual stages."""
        chosen = [s[k] for s, k in zip(self.formulation.strategies, self.assignment.strategy, strict=True)]
        sums = [sum(column) for column in zip(*(s.simplicity for s in chosen), strict=True)]
        return (self.pp, *sums, self.num_microbatches, self.family.virtual_stages)


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a search stands."""

    solved: int
    pruned: int
    left: int
    incumbent_s: float
    bound_s: float


@dataclass(frozen=True, eq=False, slots=True)
class SearchResult:
    """Candidates, best first (empty if infeasible), and the certificate."""

    status: Status
    candidates: tuple[Candidate, ...]
    bound_s: float
    pairs: tuple[PairRecord, ...]
    solver: str

    @property
    def gap(self) -> float:
        """Proven relative gap of the best candidate."""
        return relative_gap(self.candidates[0].objective_s, self.bound_s) if self.candidates else math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """How to search.

    Attributes:
        top: how many different plans to prove best.
        window: find every plan within this relative distance of the best, too.
        deadline: when to stop with the best plan so far.
        solve: solves one problem.
        solver: the name of ``solve``, for the certificate.
        notify: called after every entry.
    """

    top: int = 1
    window: float = TIE
    deadline: Deadline = field(default_factory=Deadline)
    solve: Solve = field(default_factory=solver_named)
    solver: str = "auto"
    notify: Callable[[Progress], None] | None = None


@dataclass(order=True, slots=True)
class _Entry:
    """A problem not solved yet, by its bound; ``leading`` is N (0: no leading rule). A refined bound is that of
    :mod:`uniap_tune.bounds`, any other comes from prices alone. ``followed``: the next N is queued already."""

    bound: float
    pp: int
    c: int
    number: int
    leading: int
    family: Family = field(compare=False)
    refined: bool = field(compare=False, default=False)
    followed: bool = field(compare=False, default=False)


class Search:
    """The state of one search, over all entries or (``share``: number, of how many) a part of them.

    ``limit`` is the best objective found elsewhere, shared between the parts.
    """

    def __init__(
        self,
        space: Space,
        pricer: Pricer,
        options: SearchOptions,
        share: tuple[int, int] = (0, 1),
        limit: SharedValue | None = None,
    ) -> None:
        self.space, self.pricer, self.options = space, pricer, options
        self.share, self.limit = share, limit
        self.best: dict[tuple[int, int, str], Candidate] = {}
        self.bounds: dict[tuple[int, int], float] = {}
        self.solved = 0
        self.pruned = 0
        self.queue: list[_Entry] = []
        self.quick_bounds = QuickBounds(pricer)
        self._cuts: dict[tuple[int, int, int, int], Assignment] = {}  # of interleaved entries not judged yet

    def run(self) -> bool:
        """Solve or prune every entry; whether that was cut short."""
        self._fill()
        stopped = False
        entry: _Entry | None = None
        try:
            while self.queue and self.queue[0].bound <= self._cutoff():
                if self.best and self.options.deadline.is_over():
                    stopped = True
                    break
                entry = heapq.heappop(self.queue)
                self._step(entry)
                entry = None
                self._notify()
        except KeyboardInterrupt:
            stopped = True
        if entry is not None:
            self._prove(entry, entry.bound)
        self.pruned += len(self.queue)
        for entry in self.queue:
            self._prove(entry, entry.bound)
        return stopped

    def _fill(self) -> None:
        count = 0
        for pp in self.space.pipeline_sizes():
            for c in self.space.microbatch_counts():
                for number, family in enumerate(self.space.families(pp, c)):
                    count += 1
                    if count % self.share[1] != self.share[0]:
                        continue
                    bound = self.quick_bounds(pp, c, family)
                    entry = _Entry(bound, pp, c, number, int(family.leading), family)
                    self.bounds.setdefault((pp, c), math.inf)
                    if math.isfinite(bound):
                        self.queue.append(entry)
        heapq.heapify(self.queue)

    def _cutoff(self) -> float:
        """Entries whose bound is above this cannot be among the plans asked for."""
        values = sorted(candidate.objective_s for candidate in self.best.values())
        top = self.options.top
        if self.limit is not None and top == 1:
            values = [min([self.limit.value, *values[:1]])]
        if len(values) < top:
            return math.inf
        return max(values[top - 1] * (1 + TIE), values[0] * (1 + self.options.window))

    def _step(self, entry: _Entry) -> None:
        """Solve or discard one entry."""
        if not self._may_fit(entry):
            self._skip(entry, self._may_fit)
            return
        formulation = self._formulate(entry)
        if entry.family.virtual_stages > 1:
            self._step_interleaved(entry, formulation)
            return
        bounds = chain_bounds(formulation.problem)
        if entry.leading and math.isinf(bounds.total):
            self._skip(entry, lambda other: math.isfinite(chain_bounds(self._formulate(other).problem).total))
            return
        if bounds.total > self._cutoff():
            self.pruned += 1
            self._prove(entry, bounds.total)
            if self._has_next_leading(entry):  # prune all that follow at once, if that is what time alone says
                self._queue_leading(entry, entry.leading + 1, self._bound_without_limit(entry))
            return
        if not entry.refined and self.queue and bounds.total > self.queue[0].bound:
            # another entry may now be more promising, and may prune this one
            self._queue_next_leading(entry)  # its memory, and so its bound, may be lower
            bound = max(entry.bound, bounds.total)
            heapq.heappush(self.queue, replace(entry, bound=bound, refined=True, followed=True))
            return
        solution = self.options.solve(formulation.problem, self._cutoff(), self.options.deadline, bounds)
        if solution.assignment is not None:
            self._keep(entry, formulation, simplify(formulation.problem, solution.assignment))
        self._prove(entry, max(entry.bound, solution.bound_s))
        self.solved += 1
        self._queue_next_leading(entry)

    def _step_interleaved(self, entry: _Entry, formulation: Formulation) -> None:
        """Find the cut of an interleaved pipeline; judge it when nothing else is more promising."""
        place = (entry.pp, entry.c, entry.number, entry.leading)
        cut = self._cuts.pop(place, None)
        if cut is None:
            self._queue_next_leading(entry)
            solution = self.options.solve(formulation.problem, self._cutoff(), self.options.deadline, None)
            self.solved += 1
            entry = replace(entry, bound=max(entry.bound, solution.bound_s), followed=True)
            cut = solution.assignment
            if cut is None:
                self._prove(entry, entry.bound)
                return
            if self.queue and entry.bound > self.queue[0].bound:
                self._cuts[place] = cut
                heapq.heappush(self.queue, entry)
                return
        self._prove(entry, max(entry.bound, self._keep(entry, formulation, cut)))

    def _formulate(self, entry: _Entry) -> Formulation:
        return self.pricer.formulate(entry.pp, entry.c, entry.family, leading=entry.leading)

    def _keep(self, entry: _Entry, formulation: Formulation, assignment: Assignment) -> float:
        """Add a candidate; the seconds by which it is judged."""
        value = judged_seconds(formulation, assignment)
        self.add(Candidate(entry.pp, entry.c, entry.family, formulation, assignment, value))
        return value

    def add(self, candidate: Candidate) -> None:
        """Keep a candidate if it is the best of its kind."""
        value = candidate.objective_s
        if self.limit is not None:
            with self.limit.get_lock():
                self.limit.value = min(self.limit.value, value)
        known = self.best.get(candidate.key)
        if known is None or (value, candidate.simplicity) < (known.objective_s, known.simplicity):
            self.best[candidate.key] = candidate

    def _prove(self, entry: _Entry, bound: float) -> None:
        pair = (entry.pp, entry.c)
        self.bounds[pair] = min(self.bounds[pair], bound)

    # -- recomputing the first N blocks ---------------------------------------------------------------------------

    def _may_fit(self, entry: _Entry) -> bool:
        """Whether prices alone do not rule it out."""
        needed = least_bytes(self.pricer, entry.pp, entry.c, entry.family, entry.leading)
        return needed <= self.pricer.limit_bytes * (1 + _ROUNDING)

    def _skip(self, entry: _Entry, may_fit: Callable[[_Entry], bool]) -> None:
        """Go on with the smallest N that may fit, if any; that of ``entry`` does not."""
        low, high = entry.leading, self._most_leading(entry)
        if low >= high or not may_fit(replace(entry, leading=high)):
            return
        while high - low > 1:  # low does not fit, high may
            middle = (low + high) // 2
            low, high = (low, middle) if may_fit(replace(entry, leading=middle)) else (middle, high)
        self._queue_leading(entry, high)

    def _most_leading(self, entry: _Entry) -> int:
        return entry.family.most_leading(self.pricer.num_blocks, entry.pp)

    def _has_next_leading(self, entry: _Entry) -> bool:
        return bool(entry.leading) and not entry.followed and entry.leading < self._most_leading(entry)

    def _queue_next_leading(self, entry: _Entry) -> None:
        if self._has_next_leading(entry):
            self._queue_leading(entry, entry.leading + 1)

    def _bound_without_limit(self, entry: _Entry) -> float:
        """A bound on this N and all larger ones, which take longer for the same cut."""
        problem = self._formulate(entry).problem
        everything = sum(float(t.bytes_in_flight(entry.c).max() + t.transient_bytes.max()) for t in problem.layers)
        return chain_bounds(replace(problem, memory_limit_bytes=2 * everything)).total

    def _queue_leading(self, entry: _Entry, count: int, bound: float = 0.0) -> None:
        bound = max(bound, self.quick_bounds.leading(entry.pp, entry.c, entry.family, count))
        heapq.heappush(self.queue, replace(entry, leading=count, bound=bound, refined=False, followed=False))

    # -- the answer -----------------------------------------------------------------------------------------------

    def _notify(self) -> None:
        if self.options.notify is not None:
            best = min((c.objective_s for c in self.best.values()), default=math.inf)
            bound = min(best, self.queue[0].bound) if self.queue else best
            self.options.notify(Progress(self.solved, self.pruned, len(self.queue), best, bound))

    def result(self, stopped: bool) -> SearchResult:
        """The candidates, best first, and the certificate."""
        best = min((c.objective_s for c in self.best.values()), default=math.inf)

        def rank(candidate: Candidate) -> tuple[float, tuple[int, ...]]:
            tied = candidate.objective_s <= best * (1 + TIE)
            return (best if tied else candidate.objective_s, candidate.simplicity)

        candidates = tuple(sorted(self.best.values(), key=rank))
        bound = min(self.bounds.values(), default=math.inf)
        stopped |= self.options.deadline.is_over()  # inside a solver, perhaps the last one
        if candidates:
            status = Status.LIMIT if stopped and bound < best * (1 - TIE) else Status.OPTIMAL
            bound = min(bound, candidates[0].objective_s)
        else:
            status = Status.LIMIT if stopped and math.isfinite(bound) else Status.INFEASIBLE
        return SearchResult(status, candidates, bound, tuple(self._records()), self.options.solver)

    def _records(self) -> Iterator[PairRecord]:
        """Of each (pp, c), the least bound of its families and the best plan found."""
        best = min((x.objective_s for x in self.best.values()), default=math.inf)
        for (pp, c), bound in sorted(self.bounds.items()):
            values = [x.objective_s for x in self.best.values() if (x.pp, x.num_microbatches) == (pp, c)]
            objective = min(values, default=None)
            if math.isinf(bound):
                outcome = Outcome.INFEASIBLE
            elif objective is None:
                outcome = Outcome.PRUNED if bound >= best * (1 - TIE) else Outcome.OPEN
            else:
                outcome = Outcome.SOLVED
            yield PairRecord(pp, c, outcome, bound, objective)


def search(space: Space, pricer: Pricer, options: SearchOptions | None = None) -> SearchResult:
    """The best plan of a space, with its certificate. Ctrl-C and the deadline keep what was found."""
    state = Search(space, pricer, options or SearchOptions())
    return state.result(state.run())
