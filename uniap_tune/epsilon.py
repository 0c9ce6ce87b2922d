"""The least time under a memory limit, for one limit after the other: the epsilon-constraint method.

What one limit has taught is kept for the others. A bound proven at a limit holds at every smaller one, and a plan fits
under every limit that is not below its peak. So where a problem's best plan at some limit has a peak of p bytes,
nothing is solved for it between p and that limit, and a problem whose bound at a larger limit is above the best plan
known at this one is not even built. What is left goes the way of :mod:`uniap_tune.search`: a bound from prices, then
one from :func:`~uniap_tune.bounds.chain_bounds`, then the solver with the best plan known as its cut-off.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum

from uniap_tune.bounds import ChainBounds, chain_bounds
from uniap_tune.deadline import Deadline
from uniap_tune.problem import MEMORY_SLACK, Assignment, Problem, Status, evaluate
from uniap_tune.search import TIE
from uniap_tune.solvers import Solve, solver_named

_Key = tuple[int, int]  # branch and number

# Least bytes are sums in another order than those of a plan: relative slack far above their rounding, far below TIE.
_ROUNDING = 1e-11


def _nothing(_number: int) -> float:
    return 0.0


@dataclass(frozen=True, eq=False, slots=True)
class Branch:
    """Problems alike but for one number, ``first`` to ``last``: how many blocks of a stage are recomputed.

    For a fixed cut, time does not fall and memory does not rise with the number. A problem of its own is a branch with
    one number.

    Attributes:
        problem: the problem of a number; its memory limit means nothing.
        floor_s: no plan of a number has a TPI below this, under any limit; it does not fall with the number.
        least_bytes: no plan of a number has a peak below this; it does not rise with the number.
    """

    problem: Callable[[int], Problem]
    floor_s: Callable[[int], float] = _nothing
    least_bytes: Callable[[int], float] = _nothing
    first: int = 0
    last: int = 0


@dataclass(frozen=True, slots=True)
class Found:
    """A plan: its branch and number, its TPI, and the bytes of its fullest stage.

    ``bound_s``: no plan under the limit it was asked for has a TPI below it (0 if that is not known).
    """

    branch: int
    number: int
    assignment: Assignment
    objective_s: float
    peak_bytes: float
    bound_s: float = 0.0


class EpsilonSearch:
    """All plans of several branches, to be asked for the fastest under any memory limit."""

    def __init__(
        self, branches: Sequence[Branch], *, solve: Solve | None = None, deadline: Deadline | None = None
    ) -> None:
        self.branches = branches
        self.deadline = deadline or Deadline()
        self.solved = 0
        self._solve = solve or solver_named()
        self._plans = _Staircase()
        self._problems: dict[_Key, Problem] = {}
        self._bounds: dict[_Key, _Proofs] = {}
        self._numbers: dict[int, _Proofs] = {}  # the smallest number that may fit
        self._floors: dict[_Key, float] = {}
        self._least_bytes: dict[_Key, float] = {}

    def fastest(self, limit_bytes: float, budget_s: float = math.inf) -> Found | None:
        """The plan with the least TPI under a memory limit, proven to within a relative ``TIE``.

        With a budget: such a plan with a TPI within it, or ``None``, which proves that there is none.

        Raises:
            DeadlineError: the time ran out before the proof.
        """
        queue = self._queue(limit_bytes) if limit_bytes >= 0 else []
        while True:
            known = self._plans.fastest(limit_bytes)
            best_s = known.objective_s if known is not None else math.inf
            if not queue or queue[0].bound_s > budget_s or queue[0].bound_s >= best_s * (1 - TIE):
                break
            self.deadline.check()
            self._step(heapq.heappop(queue), queue, limit_bytes, min(budget_s, best_s))
        if known is None or best_s > budget_s:
            return None
        return replace(known, bound_s=min([best_s, *(entry.bound_s for entry in queue[:1])]))

    def least_bytes(self) -> float:
        """Bytes: no plan of any branch has a peak below this."""
        return min((self._least(number, branch.last) for number, branch in enumerate(self.branches)), default=math.inf)

    # -- one limit ------------------------------------------------------------------------------------------------

    def _queue(self, limit: float) -> list[_Entry]:
        queue = []
        for index, branch in enumerate(self.branches):
            number = branch.first
            if index in self._numbers:
                number = max(number, int(self._numbers[index].at(limit)))
            if number > branch.last:
                continue
            bound = self._floor(index, number)
            if branch.first == branch.last:
                entry = _Entry(max(bound, self._bound(index, number, limit)), index, number, _Step.BOUND)
            else:
                entry = _Entry(bound, index, number, _Step.OPEN)
            if math.isfinite(entry.bound_s):
                queue.append(entry)
        heapq.heapify(queue)
        return queue

    def _step(self, entry: _Entry, queue: list[_Entry], limit: float, cutoff: float) -> None:
        if entry.step is _Step.OPEN:
            self._open(entry, queue, limit)
        elif entry.step is _Step.BOUND:
            total, bounds = self._bound_at(entry.branch, entry.number, limit)
            self._push(queue, replace(entry, bound_s=max(entry.bound_s, total), step=_Step.SOLVE, bounds=bounds))
        else:
            self._solve_at(entry, limit, cutoff)

    def _open(self, entry: _Entry, queue: list[_Entry], limit: float) -> None:
        """Turn "this number and all after it" into an entry of this number and one of those after it."""
        index, number = entry.branch, entry.number
        known = self._bound(index, number, limit)
        if known > 0:
            self._push(queue, replace(entry, bound_s=max(entry.bound_s, known), step=_Step.BOUND))
        else:
            total, bounds = self._bound_at(index, number, limit)
            if math.isinf(total):
                self._skip(entry, queue, limit)
                return
            self._push(queue, replace(entry, bound_s=max(entry.bound_s, total), step=_Step.SOLVE, bounds=bounds))
        if number < self.branches[index].last:
            self._push(queue, replace(entry, number=number + 1, bound_s=self._floor(index, number + 1)))

    def _skip(self, entry: _Entry, queue: list[_Entry], limit: float) -> None:
        """Go on with the smallest number that may fit; this one does not."""
        index, last = entry.branch, self.branches[entry.branch].last
        if self._has_room(index, entry.number, limit):  # the sum of the bytes does not rule it out

            def may_fit(number: int) -> bool:
                return math.isfinite(self._bound_at(index, number, limit)[0])

        else:

            def may_fit(number: int) -> bool:
                return self._has_room(index, number, limit)

        number = _first(may_fit, entry.number + 1, last)
        self._numbers.setdefault(index, _Proofs()).add(limit, number)
        if number <= last:
            self._push(queue, replace(entry, number=number, bound_s=self._floor(index, number)))

    def _solve_at(self, entry: _Entry, limit: float, cutoff: float) -> None:
        problem = self._problem(entry.branch, entry.number, limit)
        solution = self._solve(problem, cutoff, self.deadline, entry.bounds)
        self.solved += 1
        self._proofs(entry.branch, entry.number).add(limit, max(entry.bound_s, solution.bound_s))
        if solution.assignment is not None:
            value = evaluate(problem, solution.assignment)
            place = (entry.branch, entry.number)
            self._plans.add(Found(*place, solution.assignment, value.objective_s, max(value.stage_bytes)))
        if solution.status is Status.LIMIT:  # by the cut-off, which proves all that is asked, or by the deadline
            self.deadline.check()

    @staticmethod
    def _push(queue: list[_Entry], entry: _Entry) -> None:
        if math.isfinite(entry.bound_s):
            heapq.heappush(queue, entry)

    # -- what is known ----------------------------------------------------------------------------------------------

    def _problem(self, index: int, number: int, limit: float) -> Problem:
        key = (index, number)
        if key not in self._problems:
            self._problems[key] = self.branches[index].problem(number)
        return replace(self._problems[key], memory_limit_bytes=limit)

    def _proofs(self, index: int, number: int) -> _Proofs:
        return self._bounds.setdefault((index, number), _Proofs())

    def _bound(self, index: int, number: int, limit: float) -> float:
        proofs = self._bounds.get((index, number))
        return proofs.at(limit) if proofs is not None else 0.0

    def _bound_at(self, index: int, number: int, limit: float) -> tuple[float, ChainBounds | None]:
        """A bound on TPI under this limit, ``inf`` if nothing fits; interleaved pipelines are left to their solver."""
        bounds = None
        total = self._floor(index, number)
        if not self._has_room(index, number, limit):
            total = math.inf
        elif (problem := self._problem(index, number, limit)).virtual_stages == 1:
            bounds = chain_bounds(problem)
            total = bounds.total
        self._proofs(index, number).add(limit, total)
        return total, bounds

    def _has_room(self, index: int, number: int, limit: float) -> bool:
        return self._least(index, number) * (1 - _ROUNDING) <= limit

    def _least(self, index: int, number: int) -> float:
        key = (index, number)
        if key not in self._least_bytes:
            self._least_bytes[key] = self.branches[index].least_bytes(number)
        return self._least_bytes[key]

    def _floor(self, index: int, number: int) -> float:
        key = (index, number)
        if key not in self._floors:
            self._floors[key] = self.branches[index].floor_s(number)
        return self._floors[key]


def _first(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The first number from ``low`` to ``high`` for which a condition holds that holds for all after; else high + 1."""
    while low <= high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle - 1
        else:
            low = middle + 1
    return low


class _Step(IntEnum):
    """What is to be done with an entry."""

    OPEN = 0  # it stands for a number and all after it
    BOUND = 1
    SOLVE = 2


@dataclass(order=True, frozen=True, slots=True)
class _Entry:
    """Plans of a branch not looked at yet under the present limit, by a bound on their TPI."""

    bound_s: float
    branch: int
    number: int
    step: _Step
    bounds: ChainBounds | None = field(compare=False, default=None)


class _Proofs:
    """A value proven at memory limits. It holds at smaller limits too, where it can only grow."""

    def __init__(self) -> None:
        self._limits: list[float] = []  # rising
        self._values: list[float] = []  # falling

    def at(self, limit: float) -> float:
        """The largest value known to hold at a limit, 0 if none is."""
        place = bisect_left(self._limits, limit)
        return self._values[place] if place < len(self._values) else 0.0

    def add(self, limit: float, value: float) -> None:
        """Learn a value at a limit."""
        if value <= self.at(limit):
            return
        start = bisect_left(self._limits, limit)
        end = start + (start < len(self._limits) and self._limits[start] == limit)
        while start > 0 and self._values[start - 1] <= value:
            start -= 1
        self._limits[start:end] = [limit]
        self._values[start:end] = [value]


class _Staircase:
    """Plans of which none has both less time and less memory than another."""

    def __init__(self) -> None:
        self._peaks: list[float] = []  # rising
        self._plans: list[Found] = []  # with falling TPI

    def fastest(self, limit: float) -> Found | None:
        """The fastest plan that fits."""
        place = bisect_right(self._peaks, limit * (1 + MEMORY_SLACK))
        return self._plans[place - 1] if place else None

    def add(self, found: Found) -> None:
        """Take a plan in, unless one as lean is as fast."""
        start = bisect_left(self._peaks, found.peak_bytes)
        end = start
        if start < len(self._plans) and self._peaks[start] == found.peak_bytes:
            rival: Found | None = self._plans[start]
        else:
            rival = self._plans[start - 1] if start else None
        if rival is not None and rival.objective_s <= found.objective_s:
            return
        while end < len(self._plans) and self._plans[end].objective_s >= found.objective_s:
            end += 1
        self._peaks[start:end] = [found.peak_bytes]
        self._plans[start:end] = [found]
