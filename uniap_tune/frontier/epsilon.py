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
from collections.abc import Callable, Iterator, Sequence
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


def _nothing_under(_number: int, _limit_bytes: float) -> float:
    return 0.0


@dataclass(frozen=True, eq=False, slots=True)
class Branch:
    """Problems alike but for one number, ``first`` to ``last``: how many blocks of a stage are recomputed.

    For a fixed cut, time does not fall and memory does not rise with the number. A problem of its own is a branch with
    one number.

    Attributes:
        problem: the problem of a number; its memory limit means nothing.
        floor_s: no plan of a number has a TPI below this, under any limit; it does not fall with the number.
        bound_s: no plan of a number has a TPI below this under a limit; cheap, and at least ``floor_s`` where it helps.
        least_bytes: no plan of a number has a peak below this; it does not rise with the number.
        judge: where plans are compared by something else than their TPI, but not less: the seconds of a plan. The plan
            with the least TPI under a limit then stands for all of its number.
    """

    problem: Callable[[int], Problem]
    floor_s: Callable[[int], float] = _nothing
    bound_s: Callable[[int, float], float] = _nothing_under
    least_bytes: Callable[[int], float] = _nothing
    first: int = 0
    last: int = 0
    judge: Callable[[int, Assignment], float] | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """A plan: its branch and number, its TPI (or what it is judged by), and the bytes of its fullest stage.

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
        # where plans are judged: the limits asked for, the plan with the least TPI, and the same by its judgement
        self._cuts: dict[_Key, list[tuple[float, Found, Found | None]]] = {}
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
        """Bytes: no plan of any branch has a peak below this; ``inf`` without branches."""
        return next((size for size, *_ in self.by_least_bytes()), math.inf)

    def by_least_bytes(self) -> Iterator[tuple[float, int, int]]:
        """(bytes, branch, number) of all problems that may be leanest, by rising bytes, below which no plan has a peak.

        Of a branch that is the last number; with virtual stages another may allow a leaner cut.
        """
        queue = [(self._least(index, branch.last), index, branch.last) for index, branch in enumerate(self.branches)]
        heapq.heapify(queue)
        while queue:
            size, index, number = heapq.heappop(queue)
            yield size, index, number
            if number > self.branches[index].first and self._problem(index, number, size).virtual_stages > 1:
                heapq.heappush(queue, (self._least(index, number - 1), index, number - 1))

    def plan_of(self, branch: int, number: int, limit_bytes: float) -> Found | None:
        """The fastest plan of one problem under a memory limit, ``None`` if nothing fits.

        Raises:
            DeadlineError: the time ran out before the proof.
        """
        if limit_bytes < 0 or not self._has_room(branch, number, limit_bytes):
            return None
        self.deadline.check()
        entry = _Entry(self._floor(branch, number), branch, number, _Step.SOLVE)
        return self._solve_at(entry, limit_bytes, math.inf)

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
        if entry.step is _Step.SOLVE:
            self._solve_at(entry, limit, cutoff)
        elif not self._has_room(entry.branch, entry.number, limit):
            self._skip(entry, queue, limit)
        elif entry.step is _Step.OPEN:
            known = self._bound(entry.branch, entry.number, limit)
            self._push(queue, replace(entry, bound_s=max(entry.bound_s, known), step=_Step.BOUND))
            self._push_from(queue, entry, entry.number + 1)
        else:
            self._bound_at(entry, queue, limit)

    def _push_from(self, queue: list[_Entry], entry: _Entry, number: int) -> None:
        """Queue a number of a branch and all after it."""
        if number <= self.branches[entry.branch].last:
            self._push(queue, replace(entry, number=number, bound_s=self._floor(entry.branch, number)))

    def _skip(self, entry: _Entry, queue: list[_Entry], limit: float) -> None:
        """Go on with the smallest number that may fit; this one needs too much memory."""
        index = entry.branch
        self._proofs(index, entry.number).add(limit, math.inf)
        if entry.step is _Step.OPEN:
            last = self.branches[index].last
            number = _first(lambda n: self._has_room(index, n, limit), entry.number + 1, last)
            self._numbers.setdefault(index, _Proofs()).add(limit, number)
            self._push_from(queue, entry, number)

    def _bound_at(self, entry: _Entry, queue: list[_Entry], limit: float) -> None:
        """Raise the bound of an entry: by prices alone if they do, else from the arrays of its problem."""
        index, number, bounds = entry.branch, entry.number, None
        total, step = self.branches[index].bound_s(number, limit), entry.step
        if total <= entry.bound_s:
            step = _Step.SOLVE  # at once for interleaved pipelines, which have no other bounds
            problem = self._problem(index, number, limit)
            if problem.virtual_stages == 1:
                bounds = chain_bounds(problem)
                total = bounds.total
        self._proofs(index, number).add(limit, total)
        self._push(queue, replace(entry, bound_s=max(entry.bound_s, total), step=step, bounds=bounds))

    def _solve_at(self, entry: _Entry, limit: float, cutoff: float) -> Found | None:
        judge = self.branches[entry.branch].judge
        if judge is None:
            found = self._solved(entry, limit, cutoff)
        else:
            found = self._judged(entry, limit, cutoff, judge)
        if found is not None:
            self._plans.add(found)
        return found

    def _judged(
        self, entry: _Entry, limit: float, cutoff: float, judge: Callable[[int, Assignment], float]
    ) -> Found | None:
        """The plan with the least TPI under a limit, by its judgement; ``None`` where even its TPI is too long.

        It is the same under every limit from its peak to that it was found under.
        """
        known = self._cuts.setdefault((entry.branch, entry.number), [])
        place = next((i for i, (asked, cut, _) in enumerate(known) if cut.peak_bytes <= limit <= asked), None)
        if place is None:
            cut = self._solved(entry, limit, math.inf)
            if cut is None:
                return None
            place = len(known)
            known.append((limit, cut, None))
        asked, cut, judged = known[place]
        if cut.objective_s > cutoff:
            return None
        if judged is None:
            judged = replace(cut, objective_s=judge(cut.number, cut.assignment))
            known[place] = (asked, cut, judged)
        return judged

    def _solved(self, entry: _Entry, limit: float, cutoff: float) -> Found | None:
        problem = self._problem(entry.branch, entry.number, limit)
        solution = self._solve(problem, cutoff, self.deadline, entry.bounds)
        self.solved += 1
        self._proofs(entry.branch, entry.number).add(limit, max(entry.bound_s, solution.bound_s))
        if solution.status is Status.LIMIT:  # by the cut-off, which proves all that is asked, or by the deadline
            self.deadline.check()
        if solution.assignment is None:
            return None
        value = evaluate(problem, solution.assignment)
        place = (entry.branch, entry.number)
        return Found(*place, solution.assignment, value.objective_s, max(value.stage_bytes), solution.bound_s)

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
