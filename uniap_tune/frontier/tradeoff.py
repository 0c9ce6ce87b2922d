"""One job's plans to choose from, and step time against memory: the points of a frontier as plans.

Every point is a full plan of a request of its own, with its peak as the memory limit, which can be rendered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from uniap_tune.assemble import assemble
from uniap_tune.deadline import Deadline, DeadlineError
from uniap_tune.errors import StoppedError
from uniap_tune.frontier.branches import branches, places
from uniap_tune.frontier.epsilon import EpsilonSearch, Found
from uniap_tune.frontier.points import Frontier, fastest_point, leanest_point
from uniap_tune.plan import Plan
from uniap_tune.planner import Request, assumptions, build, infeasible, validate
from uniap_tune.problem import Status
from uniap_tune.search import Candidate
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
        self.places = places(self.space)
        self.search = EpsilonSearch(branches(self.places, self.prices), deadline=deadline)

    def point(self, found: Found) -> Point:
        """The plan of an assignment, as the answer to a request with its peak as the memory limit."""
        pp, c, family = self.places[found.branch]
        formulation = self.prices.formulate(pp, c, family, leading=found.number)
        limited = replace(formulation.problem, memory_limit_bytes=found.peak_bytes)
        assignment = simplify(limited, found.assignment)
        costs = self.prices.costs
        request = self.request.with_memory_limit(found.peak_bytes + costs.reserved_bytes())
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
            assumptions=assumptions(request, costs),
        )
        return Point(request=request, plan=plan)

    def nothing(self, stopped: bool) -> Exception:
        """The error where there is no point."""
        if stopped:
            return StoppedError("stopped before a plan was found", fix="give it more time, or no --time-limit")
        return infeasible(self.request, self.space, self.prices)


def marked(points: Sequence[Point], size: Callable[[Point], float]) -> tuple[Point, ...]:
    """The points, those marked that another beats in simulated step time and in size."""
    judged = []
    for point in points:
        value = (point.plan.step_time_s, size(point))
        rivals = ((other.plan.step_time_s, size(other)) for other in points if other is not point)
        beaten = any(a <= value[0] and b <= value[1] and (a, b) != value for a, b in rivals)
        judged.append(replace(point, dominated=beaten))
    return tuple(judged)
