"""Step time against the number of devices: the plan that ``plan`` finds on each, and the one that a goal asks for.

These are the modes of TensorOpt (arXiv 2004.10856): its mini-time is ``Goal.MIN_TIME``, its mini-parallelism
``Goal.MIN_DEVICES``, its profiling :func:`against_devices`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from uniap_tune.deadline import Deadline, DeadlineError
from uniap_tune.errors import InfeasibleError, InputError, StoppedError
from uniap_tune.frontier.tradeoff import Axis, Goal, Notify, Point, Tradeoff, end_of_frontier, marked
from uniap_tune.planner import Request, attempt, build, infeasible, validate
from uniap_tune.problem import Status
from uniap_tune.spec import Cluster
from uniap_tune.units import format_bytes, format_seconds

# Up to so many nodes every number is tried by default; beyond, powers of two and three times powers of two.
_EVERY_NODE_UP_TO = 4


def against_devices(
    request: Request,
    counts: Sequence[int],
    *,
    enough: Callable[[Point], bool] | None = None,
    deadline: Deadline | None = None,
    notify: Notify | None = None,
) -> Tradeoff:
    """The plan of the request on each number of devices.

    Args:
        request: the job, on the largest cluster.
        counts: numbers of devices, of :func:`device_counts`.
        enough: where given, nothing larger is tried once this holds for a point.
        deadline: when to stop with the points found so far.
        notify: told of every point.

    Raises:
        InputError: a number of devices that is no part of the cluster, or a job that can be planned on none of them.
    """
    deadline = deadline or Deadline()
    points: list[Point] = []
    left_out: list[tuple[int, str]] = []
    stopped = False
    refusal: InputError | None = None
    for count in sorted(counts):
        part = replace(request, cluster=part_of(request.cluster, count))
        try:
            point = _point_on(part, deadline)
        except InputError as error:  # no degrees for this number of devices, or nothing left of their memory
            left_out.append((count, error.what))
            refusal = error
            continue
        except (DeadlineError, KeyboardInterrupt):
            stopped = True
            break
        if point is None:
            left_out.append((count, f"nothing fits in {format_bytes(part.memory_limit_bytes)} a device"))
            continue
        points.append(point)
        if notify is not None:
            notify(len(points))
        if enough is not None and enough(point):
            break
    if not points:
        largest = replace(request, cluster=part_of(request.cluster, max(counts)))
        raise _nowhere(largest, refusal, stopped)
    return Tradeoff(
        request=request,
        axis=Axis.DEVICES,
        points=marked(points, lambda point: point.devices),
        complete=not stopped,
        stopped=stopped,
        left_out=tuple(left_out),
    )


def _point_on(request: Request, deadline: Deadline) -> Point | None:
    """The plan of a request, ``None`` if nothing fits.

    Raises:
        DeadlineError: it is not proven in time.
    """
    deadline.check()
    planning = attempt(request, deadline=deadline)
    if planning.result.status is Status.LIMIT:
        raise DeadlineError
    return Point(request=request, plan=planning.plan) if planning.plans else None


def _nowhere(request: Request, refusal: InputError | None, stopped: bool) -> Exception:
    """The error where no number of devices has a plan; the request is that on the most."""
    if stopped:
        return StoppedError("stopped before a plan was found", fix="give it more time, or no --time-limit")
    try:
        validate(request)
        return infeasible(request, *build(request))
    except InputError as error:
        return refusal or error


def device_counts(cluster: Cluster, *, every: bool = False) -> list[int]:
    """Numbers of devices worth trying: parts of one node, then numbers of whole nodes.

    Parts of a node are powers of two. Numbers of nodes are all up to 4, then powers of two and three times powers of
    two; with ``every`` all of them. The whole cluster is always one.
    """
    node = cluster.devices_per_node
    counts = {1 << power for power in range(node.bit_length()) if 1 << power < node}
    few = {nodes << power for power in range(cluster.num_nodes.bit_length()) for nodes in (1, 3)}
    nodes = range(1, cluster.num_nodes + 1)
    counts |= {n * node for n in nodes if every or n <= _EVERY_NODE_UP_TO or n in few}
    return sorted(counts | {cluster.num_devices})


def part_of(cluster: Cluster, count: int) -> Cluster:
    """So many devices of a cluster: whole nodes, or a part of one.

    Raises:
        InputError: it has no such part.
    """
    node, several = cluster.devices_per_node, cluster.num_nodes > 1
    if count == cluster.num_devices:
        return cluster
    if not 0 < count < cluster.num_devices or (count > node and count % node):
        raise InputError(
            f"{count} devices: no part of {cluster.name}",
            why=f"it has {cluster.num_nodes} x {node} devices; a part is one node's, or whole nodes",
            fix=f"give numbers up to {node}" + (f", or multiples of it up to {cluster.num_devices}" if several else ""),
        )
    size = min(node, count)
    name = f"{count // size}x{size}:{cluster.device.name}"
    return replace(cluster, name=name, num_nodes=count // size, devices_per_node=size)


# -- one plan --------------------------------------------------------------------------------------------------------


def reach(
    request: Request,
    goal: Goal,
    counts: Sequence[int] = (),
    *,
    longest_step_s: float = math.inf,
    deadline: Deadline | None = None,
    notify: Notify | None = None,
) -> Tradeoff:
    """The plan that a goal asks for, among the points that were looked at for it.

    Args:
        request: the job, on the largest cluster.
        goal: on devices, the simulated step decides.
        counts: numbers of devices to choose among.
        longest_step_s: on devices, plans whose simulated step is longer do not count.
        deadline, notify: see :func:`against_devices`.

    Raises:
        InfeasibleError: also where no step is short enough.
    """
    if goal.axis is Axis.MEMORY:
        return end_of_frontier(request, goal, deadline)

    def meets(point: Point) -> bool:
        return point.plan.step_time_s <= longest_step_s

    enough = meets if goal is Goal.MIN_DEVICES else None
    found = against_devices(request, counts, enough=enough, deadline=deadline, notify=notify)
    good = [i for i, point in enumerate(found.points) if meets(point)]
    if not good:
        raise _too_slow(found, longest_step_s)
    cheapest = min(good, key=lambda i: (found.points[i].device_seconds, found.points[i].devices))
    return replace(found, goal=goal, chosen=good[0] if goal is Goal.MIN_DEVICES else cheapest)


def _too_slow(found: Tradeoff, longest_step_s: float) -> Exception:
    if found.stopped:
        return StoppedError("stopped before a step was short enough", fix="give it more time, or no --time-limit")
    best = min(found.points, key=lambda point: point.plan.step_time_s)
    shortest = format_seconds(best.plan.step_time_s)
    return InfeasibleError(
        f"no number of devices tried makes a step in {format_seconds(longest_step_s)}",
        why=f"the shortest is {shortest}, on {best.devices} devices",
        fix="change one of the following",
        relaxations=(f"--deadline of at least {shortest}", "a --cluster with more or faster devices"),
    )
