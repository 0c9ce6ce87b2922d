"""One job's plans to choose from, and step time against memory: the points of a frontier as plans.

Every point is a full plan of a request of its own, with its peak as the memory limit, which can be rendered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from uniap_tune.assemble import assemble
from uniap_tune.deadline import Deadline, DeadlineError
from uniap_tune.errors import StoppedError
from uniap_tune.formulate import Pricer
from uniap_tune.frontier.epsilon import Branch, EpsilonSearch, Found
from uniap_tune.frontier.points import Frontier, fastest_point, leanest_point
from uniap_tune.lean import least_bytes, least_seconds
from uniap_tune.plan import Plan
from uniap_tune.planner import Request, assumptions, build, infeasible, validate
from uniap_tune.problem import Assignment, Problem, Status
from uniap_tune.quick import QuickBounds
from uniap_tune.replay import judged_seconds
from uniap_tune.search import Candidate
from uniap_tune.space import Family, Space
from uniap_tune.ties import simplify

_SECONDS_PER_HOUR = 3600.0


class Axis(StrEnum):
    """What step time is traded against."""

    MEMORY = "memory"
    DEVICES = "devices"


class Goal(StrEnum):
    """Which one plan is wanted."""

    MIN_TIME = "min-time"
    MIN_MEMORY = "min-memory"
    MIN_DEVICES = "min-devices"
    MIN_COST = "min-cost"

    @property
    def axis(self) -> Axis:
        """The axis it chooses on."""
        return Axis.DEVICES if self in (Goal.MIN_DEVICES, Goal.MIN_COST) else Axis.MEMORY


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Point:
    """A plan and the request it answers.

    ``dominated``: by another point, whose simulated step is no longer and which needs no more memory (or devices).
    """

    request: Request
    plan: Plan
    dominated: bool = False

    @property
    def devices(self) -> int:
        """Devices the plan runs on."""
        return self.request.cluster.num_devices

    @property
    def device_seconds(self) -> float:
        """Device-seconds of a step."""
        return self.devices * self.plan.step_time_s

    def cost_per_step(self, price_per_device_hour: float) -> float:
        """What a step costs, in the currency of the price."""
        return self.device_seconds / _SECONDS_PER_HOUR * price_per_device_hour


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Tradeoff:
    """The points of an axis.

    Attributes:
        request: what was asked.
        points: fastest first against memory, fewest devices first against devices.
        complete: there are no others (against devices: every number asked for was decided).
        stopped: the time ran out, or Ctrl-C.
        left_out: numbers of devices without a plan, and why.
        goal, chosen: what was wanted, and which point it is.
    """

    request: Request
    axis: Axis
    points: tuple[Point, ...]
    complete: bool
    stopped: bool = False
    left_out: tuple[tuple[int, str], ...] = ()
    goal: Goal | None = None
    chosen: int | None = None


# Told of the number of points, whenever there is one more.
Notify = Callable[[int], None]


# -- against memory ------------------------------------------------------------------------------------------------


def against_memory(
    request: Request, *, count: int | None = None, deadline: Deadline | None = None, notify: Notify | None = None
) -> Tradeoff:
    """The frontier of time and memory on the request's devices.

    Args:
        request: the job; its memory limit is where the frontier begins.
        count: of points, spread over the memory; all of them by default.
        deadline: when to stop with the points found so far.
        notify: told of every point.

    Raises:
        InputError: inputs that make no sense together.
        InfeasibleError: no plan fits.
        StoppedError: the time ran out before the first point.
    """
    job = _MemoryJob(request, deadline)
    frontier = Frontier(job.search, job.prices.limit_bytes)
    stopped = False
    try:
        for _ in frontier.trace() if count is None else frontier.spread(count):
            if notify is not None:
                notify(len(frontier.points))
    except (DeadlineError, KeyboardInterrupt):
        stopped = True
    points = [job.point(found) for found in frontier.points]
    if not points:
        raise job.nothing(stopped)
    return Tradeoff(
        request=request,
        axis=Axis.MEMORY,
        points=marked(points, lambda point: point.plan.peak_memory_bytes),
        complete=frontier.complete,
        stopped=stopped,
    )


def end_of_frontier(request: Request, goal: Goal, deadline: Deadline | None) -> Tradeoff:
    """The first point of the frontier, or the last."""
    job = _MemoryJob(request, deadline)
    end = leanest_point if goal is Goal.MIN_MEMORY else fastest_point
    try:
        found = end(job.search, job.prices.limit_bytes)
    except (DeadlineError, KeyboardInterrupt):
        raise job.nothing(stopped=True) from None
    if found is None:
        raise job.nothing(stopped=False)
    points = (job.point(found),)
    return Tradeoff(request=request, axis=Axis.MEMORY, points=points, complete=False, goal=goal, chosen=0)


class _MemoryJob:
    """A request, all the problems of its space, and the way back from a found assignment to a plan."""

    def __init__(self, request: Request, deadline: Deadline | None) -> None:
        validate(request)
        self.request = request
        self.space, self.prices = build(request)
        self.places = list(_places(self.space))
        floors = QuickBounds(self.prices)
        branches = [branch_of(self.prices, floors, *place) for place in self.places]
        self.search = EpsilonSearch(branches, deadline=deadline)

    def point(self, found: Found) -> Point:
        """The plan of an assignment, as the answer to a request with its peak as the memory limit."""
        pp, c, family = self.places[found.branch]
        formulation = self.prices.formulate(pp, c, family, leading=found.number)
        limited = replace(formulation.problem, memory_limit_bytes=found.peak_bytes)
        assignment = simplify(limited, found.assignment)
        costs = self.prices.costs
        limit = found.peak_bytes + costs.reserved_bytes()
        request = replace(self.request, memory_fraction=limit / self.request.cluster.device.memory_bytes)
        plan = assemble(
            Candidate(pp, c, family, formulation, assignment, found.objective_s),
            graph=self.prices.graph,
            costs=costs,
            cluster=request.cluster,
            job=request.job,
            target=request.target,
            memory_limit_bytes=request.memory_limit_bytes,
            bound_s=found.bound_s,
            status=str(Status.OPTIMAL),
            inputs=request.describe(),
            assumptions=assumptions(request),
        )
        return Point(request=request, plan=plan)

    def nothing(self, stopped: bool) -> Exception:
        """The error where there is no point."""
        if stopped:
            return StoppedError("stopped before a plan was found", fix="allow more time with --time-limit")
        return infeasible(self.request, self.space, self.prices)


def _places(space: Space) -> Iterator[tuple[int, int, Family]]:
    for pp in space.pipeline_sizes():
        for c in space.microbatch_counts():
            for family in space.families(pp, c):
                yield pp, c, family


def branch_of(prices: Pricer, floors: QuickBounds, pp: int, c: int, family: Family) -> Branch:
    """The problems of a (pp, c, family): one, or one for each number of leading blocks recomputed."""

    def problem(number: int) -> Problem:
        return prices.formulate(pp, c, family, leading=number).problem

    def floor(number: int) -> float:
        return floors.leading(pp, c, family, number) if family.leading else floors(pp, c, family)

    def bound(number: int, limit_bytes: float) -> float:
        return least_seconds(prices, pp, c, family, number, limit_bytes)

    def least(number: int) -> float:
        return least_bytes(prices, pp, c, family, number)

    first = last = 0
    if family.leading:  # recomputing every block is a family of its own
        v = family.virtual_stages
        first, last = 1, prices.num_blocks - 1 if v == 1 else prices.num_blocks // (v * pp)

    def judge(number: int, cut: Assignment) -> float:
        return judged_seconds(prices.formulate(pp, c, family, leading=number), cut)

    is_judged = judge if family.virtual_stages > 1 else None
    return Branch(problem, floor, bound, least, first=first, last=max(first, last), judge=is_judged)


def marked(points: Sequence[Point], size: Callable[[Point], float]) -> tuple[Point, ...]:
    """The points, those marked that another beats in simulated step time and in size."""
    marked = []
    for point in points:
        value = (point.plan.step_time_s, size(point))
        rivals = ((other.plan.step_time_s, size(other)) for other in points if other is not point)
        beaten = any(a <= value[0] and b <= value[1] and (a, b) != value for a, b in rivals)
        marked.append(replace(point, dominated=beaten))
    return tuple(marked)
